"""The replay log and its independent checker: true logs hold, and whatever is changed in one is noticed."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from certified_pairs import CHECKER, load_checker, prompts_of, subject, tiny_pair

from qexport.runtime.certifying import evidence
from qexport.runtime.certifying.certify import MIXED, PURE, TOP_K
from qexport.runtime.certifying.log import record, to_jsonl
from qexport.runtime.certifying.subject import CASCADE, DRAFT, LOOKUP, Way, make_rows
from qexport.runtime.certifying.trials import references
from qexport.runtime.sampling.settings import Sampling
from qexport.safe_io import digest_bytes

IMPORTS = ["hashlib", "json", "sys", "pathlib", "numpy", "onnxruntime"]
BIASED = Sampling(temperature=0.8, min_p=0.03, logit_bias={3: 1.5, 7: -2.0}, seed=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Paths of target and draft, and the pair."""
    folder, files = tmp_path_factory.mktemp("models"), tiny_pair(50)
    paths = {}
    for name, data in zip(("target", "draft"), files[:2], strict=True):
        (folder / name).mkdir()
        paths[name] = folder / name / "model.onnx"
        paths[name].write_bytes(data)
    return paths, files


@pytest.fixture(scope="module")
def log(models):
    """The lines of runs with all kinds of rounds, and the runs."""
    paths, files = models
    loop, prompts = subject(files), prompts_of(50)
    sources = references(loop, prompts, 14)
    ways = [
        Way(PURE, 3, DRAFT),
        Way(replace(MIXED, seed=1), 2, DRAFT),
        Way(replace(TOP_K, seed=2), 4, LOOKUP),
        Way(replace(PURE, seed=3), 4, CASCADE, steady=False),
        Way(BIASED, 2, DRAFT),
        Way(replace(MIXED, seed=5), 3, DRAFT, coupled=True),
        Way(Sampling(), 3, DRAFT),
    ]
    runs = [record(loop, way, make_rows(prompts, 3, sources if "lookup" in way.proposer else ()), 11) for way in ways]
    digests = {name: {"model.onnx": digest_bytes(path.read_bytes())} for name, path in paths.items()}
    return [[json.loads(line) for line in to_jsonl([run], digests).splitlines()] for run in runs], runs


@pytest.fixture
def judge(models, tmp_path):
    """What the checker says of lines: its counts, or why it gave up."""
    paths, checker = models[0], load_checker()

    def check(lines):
        path = tmp_path / "log.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return checker.check(path, paths)

    return check


def test_a_true_log_holds_in_a_process_without_qexport(models, log, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for lines in log[0] for line in lines))
    command = [sys.executable, "-I", str(CHECKER), str(path), *map(str, models[0].values())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["wrong"] == 0
    assert told["decisions"] > 300
    assert re.findall(r"^(?:import|from) (\w+)", CHECKER.read_text(), re.MULTILINE) == IMPORTS


def test_a_log_that_was_changed_ends_the_process_with_an_error(models, log, tmp_path):
    lines = copy.deepcopy(log[0][0])
    lines[0]["sampling"]["seed"] += 1
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-I", str(CHECKER), str(path), *map(str, models[0].values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["wrong"] > 10


def test_the_log_has_rounds_of_every_kind(log):
    lines = [line for lines in log[0] for line in lines if "round" in line]
    drawn = [line for line in lines if line["drawn"]]
    assert {line["proposer"] for line in lines} == {"", "draft", "reference", "lookup"}
    assert any(line["accepted"] == len(line["proposed"]) > 0 for line in drawn)
    assert any(line["accepted"] < len(line["proposed"]) for line in drawn)
    assert any(line["accepted"] for line in lines if line["proposer"] == "reference")


def first(lines, wanted):
    """The first line behind a header that is as wanted."""
    return next(line for line in lines if "round" in line and wanted(line))


def taken_whole(line):
    return line["drawn"] and line["accepted"] == len(line["proposed"]) > 0


def refused(line):
    return line["drawn"] and line["accepted"] < len(line["proposed"])


def other(token):
    return (token + 1) % 50


def change_token(lines):
    line = first(lines, refused)
    line["tokens"][-1] = other(line["tokens"][-1])


def change_accepted_token(lines):
    line = first(lines, taken_whole)
    line["tokens"][0] = line["proposed"][0] = other(line["tokens"][0])


def change_proposal_behind_a_rejection(lines):
    line = first(lines, lambda line: refused(line) and line["accepted"] + 1 < len(line["proposed"]))
    line["proposed"][-1] = other(line["proposed"][-1])


def change_spare(lines):
    line = first(lines, refused)
    line["spare"] = other(line["spare"])


def forget_spare(lines):
    first(lines, taken_whole)["spare"] = None


def count_one_less(lines):
    first(lines, taken_whole)["accepted"] -= 1


def say_that_nothing_was_drawn(lines):
    first(lines, taken_whole)["drawn"] = False


def move(lines):
    first(lines, refused)["position"] += 1


def give_a_row_another_rows_tokens(lines):
    one, two = (first(lines, lambda line, row=row: line["round"] == 0 and line["row"] == row) for row in (0, 2))
    one["tokens"], two["tokens"] = two["tokens"], one["tokens"]


def drop_a_bonus(lines):
    first(lines, taken_whole)["tokens"].pop()


def drop_a_round(lines):
    lines.remove(first(lines, lambda line: line["round"] == 1))


def drop_the_last_round_of_a_row(lines):
    end = next(place for place, line in enumerate(lines) if "lines" in line)
    del lines[end - 1]
    lines[end - 1]["lines"] -= 1


def repeat_a_round(lines):
    line = first(lines, lambda line: line["round"] == 1)
    lines.insert(lines.index(line), copy.deepcopy(line))


def cut_the_end(lines):
    del lines[-3:]


def change_header(name, value):
    def change(lines):
        lines[0][name] = value

    return change


def change_setting(name, value):
    def change(lines):
        lines[0]["sampling"][name] = value

    return change


def change_stream(lines):
    lines[0]["rows"][1]["stream"] += 7


def change_prompt(lines):
    lines[0]["rows"][1]["prompt"][0] = other(lines[0]["rows"][1]["prompt"][0])


def change_greedy_token(lines):
    line = first(lines, lambda line: not line["proposed"])
    line["tokens"][0] = other(line["tokens"][0])


def change_certain_proposal(lines):
    line = first(lines, lambda line: line["accepted"] + 1 < len(line["proposed"]))
    line["proposed"][-1] = other(line["proposed"][-1])


def change_digest(lines):
    lines[0]["files"]["draft"]["model.onnx"] = "sha256:" + 64 * "0"


TAMPERINGS = {
    "a token": (0, change_token),
    "an accepted token with its proposal": (0, change_accepted_token),
    "a proposal behind a rejection": (0, change_proposal_behind_a_rejection),
    "a spare": (0, change_spare),
    "a spare that is forgotten": (0, forget_spare),
    "what was accepted": (0, count_one_less),
    "drawn or not": (0, say_that_nothing_was_drawn),
    "a position": (0, move),
    "rows that swap tokens": (0, give_a_row_another_rows_tokens),
    "a bonus": (0, drop_a_bonus),
    "a round that is missing": (0, drop_a_round),
    "the last round of a row, and the count": (0, drop_the_last_round_of_a_row),
    "a round twice": (0, repeat_a_round),
    "the end": (0, cut_the_end),
    "the schema": (0, change_header("schema", "qexport.replay/0")),
    "the seed": (0, change_setting("seed", 99)),
    "the temperature": (0, change_setting("temperature", 0.9)),
    "top-k": (2, change_setting("top_k", 3)),
    "top-p": (1, change_setting("top_p", 0.5)),
    "min-p": (4, change_setting("min_p", 0.3)),
    "the penalty": (1, change_setting("repetition_penalty", 1.5)),
    "a bias": (4, change_setting("logit_bias", {"3": 1.5})),
    "a stream": (0, change_stream),
    "a prompt": (0, change_prompt),
    "a greedy token": (6, change_greedy_token),
    "a greedy proposal": (6, change_certain_proposal),
    "a proposal drawn with the target's numbers": (5, change_certain_proposal),
    "a model": (0, change_digest),
}


def noticed(judge, lines):
    try:
        return judge(lines)["wrong"] > 0
    except SystemExit as refusal:
        return bool(refusal.code)  # a reason, which is an error


@pytest.mark.parametrize("name", TAMPERINGS)
def test_what_is_changed_in_a_log_is_noticed(name, log, judge):
    run, change = TAMPERINGS[name]
    lines = copy.deepcopy(log[0][run])
    change(lines)
    assert lines != log[0][run]
    assert noticed(judge, lines)


def test_the_certificate_recomputes_the_same_decisions(models, log):
    sampled = [run for run in log[1] if not run.way.sampling.greedy]
    found = evidence.gather(sampled, subject(models[1]), 1e-6)
    assert found.missed() == []
    assert found.broken == []
    assert len(found.outputs) + found.unsure == sum(len(tokens) for run in sampled for tokens in run.outputs())
