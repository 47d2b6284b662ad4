"""``qexport generate``: its flags, what it writes where, and how it ends."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import click
import pytest
from cached_models import Tiny
from generating import broken, near, opened, write_folder
from helpers import call

from qexport.cli.generate import generate as command
from qexport.runtime.generation.stops import Stop

FLAGS = {
    "--draft": "small",
    "--prompt": "Once",
    "--prompts": "prompts.txt",
    "--reference": "notes.txt",
    "--max-tokens": "9",
    "--temperature": "0.7",
    "--top-k": "5",
    "--top-p": "0.9",
    "--min-p": "0.1",
    "--repetition-penalty": "1.1",
    "--logit-bias": "3=-1.5",
    "--seed": "4",
    "--stop": "end",
    "--speculate": "4",
    "--lookup": None,
    "--no-lookup": None,
    "--rule": "equality",
    "--batch": "2",
    "--threads": "1",
    "--backend": "ort-cpu",
    "--draft-backend": "ort-cpu",
    "--stats": None,
    "--limit-memory": "4G",
    "--limit-time": "900",
    "--json": None,
    "--debug": None,
}
ONE = ("--threads", "1", "--max-tokens", "12")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [str(write_folder(root / "target")), str(write_folder(root / "draft", near(Tiny(), 0.05)))]


@pytest.fixture(scope="module")
def expected(folders):
    """What the prompts of most tests give."""
    with opened(folders[0], speculate="off") as generator:
        return generator.complete(["the band", "ab", "a thing"], stop=Stop(12))


def test_the_documented_flags_are_the_flags_of_generate():
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    assert known - {"target"} == set(FLAGS)


@pytest.mark.parametrize("pair", list(itertools.combinations(FLAGS, 2)), ids=" ".join)
def test_every_pair_of_flags_parses(pair):
    words = [word for flag in pair for word in (flag, FLAGS[flag]) if word is not None]
    assert str(command.make_context("generate", ["TARGET", *words]).params["target"]) == "TARGET"


def test_one_output_is_the_text_alone(capsys, folders, expected):
    target, draft = folders
    for flags in ((), ("--draft", draft), ("--draft", draft, "--speculate", "3"), ("--speculate", "off")):
        told = call(capsys, "generate", target, "--prompt", "the band", *ONE, *flags)
        assert told == (0, f"{expected[0].text}\n", "")


def test_several_outputs_are_in_order_with_how_they_ended(capsys, folders, expected):
    code, out, err = call(
        capsys, "generate", folders[0], "--prompt", "the band", "--prompt", "ab", "--batch", "1", *ONE
    )
    assert (code, err) == (0, "")
    pieces = [
        f"--- {number}: {len(found.tokens)} tokens, {found.reason}\n{found.text}\n"
        for number, found in enumerate(expected[:2])
    ]
    assert out == "\n".join(pieces)


def test_json_is_one_object_with_every_output_and_what_it_took(capsys, folders, expected, tmp_path):
    lines = [{"prompt": "the band"}, {"prompt": "ab", "references": [expected[1].text]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    code, out, err = call(
        capsys, "generate", folders[0], "--draft", folders[1], "--prompts", str(file), "--json", *ONE, "--batch", "1"
    )
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["schema"] == "qexport.generate/1"
    for found, wanted, line in zip(told["outputs"], expected[:2], lines, strict=True):
        assert found["prompt"] == line["prompt"]
        assert (tuple(found["tokens"]), found["text"], found["reason"]) == (
            wanted.tokens,
            wanted.text,
            wanted.reason,
        )
        assert (found["error"], found["stats"]["rows"]) == (None, 1)
        assert found["stats"]["tokens"] == len(wanted.tokens)
    assert told["stats"]["rows"] == 2
    assert told["stats"]["tokens"] == sum(found["stats"]["tokens"] for found in told["outputs"])


def test_references_from_files_are_named_by_their_path(capsys, folders, expected, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text(f"ab{expected[1].text} the band{expected[0].text}")
    flags = ("--reference", str(notes), "--speculate", "6", "--json")
    code, out, _ = call(capsys, "generate", folders[0], "--prompt", "the band", *ONE, *flags)
    (found,) = json.loads(out)["outputs"]
    assert code == 0
    assert found["text"] == expected[0].text
    assert str(notes) in {piece["source"] for piece in found["copied"]}


def test_a_file_has_a_prompt_on_every_line_that_is_not_empty(capsys, folders, tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("the band\n\nab\n")
    code, out, _ = call(capsys, "generate", folders[0], "--prompts", str(file), *ONE, "--json")
    assert code == 0
    assert [found["prompt"] for found in json.loads(out)["outputs"]] == ["the band", "ab"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the band\r\n\n\xc3\xa9")))
    code, out, _ = call(capsys, "generate", folders[0], "--prompts", "-", *ONE, "--json")
    assert [found["prompt"] for found in json.loads(out)["outputs"]] == ["the band", "é"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n\xff")))
    assert call(capsys, "generate", folders[0], "--prompts", "-", *ONE)[0] == 2


def test_stats_go_to_stderr_with_the_speed_of_plain_decoding(capsys, folders, expected):
    flags = ("--draft", folders[1], "--speculate", "3", "--stats")
    code, out, err = call(capsys, "generate", folders[0], "--prompt", "the band", *ONE, *flags)
    assert (code, out) == (0, f"{expected[0].text}\n")
    for word in ("first token", "x plain", "tokens each", "proposed by draft", "MBU"):
        assert word in err
    code, out, _ = call(capsys, "generate", folders[0], "--prompt", "the band", *ONE, *flags, "--json")
    told = json.loads(out)["stats"]
    assert told["baseline"] > 0
    assert told["speedup"] > 0
    assert told["hardware"] is not None


def test_drawing_goes_by_its_flags(capsys, folders):
    def told(*flags):
        return call(capsys, "generate", folders[0], "--prompt", "ab", *ONE, "--temperature", "1", *flags)

    assert told("--seed", "1") == told("--seed", "1")
    assert told("--seed", "1") != told("--seed", "2")
    assert told("--top-k", "1") == call(capsys, "generate", folders[0], "--prompt", "ab", *ONE)
    assert told("--logit-bias", "9=100")[1] == "i" * 12 + "\n"
    assert told("--logit-bias", "9=100", "--stop", "iii")[1] == "\n"


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ((), 2, "there is no prompt"),
        (("--prompt", ""), 5, "there is nothing to continue"),
        (("--prompt", "a", "--max-tokens", "0"), 2, "at most 0 tokens"),
        (("--prompt", "a", "--speculate", "0"), 2, "speculate is 0"),
        (("--prompt", "a", "--speculate", "-2"), 2, "speculate is -2"),
        (("--prompt", "a", "--speculate", "fast"), 2, "speculate is 'fast'"),
        (("--prompt", "a", "--speculate", "4", "--no-lookup"), 2, "neither a draft nor lookup"),
        (("--prompt", "a", "--temperature", "nan"), 2, "temperature is nan"),
        (("--prompt", "a", "--top-k", "4"), 2, "temperature is 0, which is greedy"),
        (("--prompt", "a", "--logit-bias", "x=1"), 2, "--logit-bias is 'x=1'"),
        (("--prompt", "a", "--logit-bias", "50=1"), 2, "logit_bias names token 50"),
        (("--prompt", "a", "--stop", ""), 2, "a stop string has 0 characters"),
        (("--prompt", "a", "--seed", str(2**70)), 2, "seed is"),
        (("--prompt", "a", "--speculate", "9" * 5000), 2, "speculate is '9999"),
        (("--prompt", "a", "--threads", "-1"), 2, "--threads is -1"),
        (("--prompt", "a", "--threads", "100000"), 2, "threads is 100000, expected 0 to 1024"),
        (("--prompt", "a", "--stop", "\udcff"), 2, "is not Unicode"),
        (("--prompt", "a", "--batch", "0"), 2, "batch is 0"),
        (("--prompt", "a", "--backend", "abacus"), 2, "no backend called 'abacus'"),
        (("--prompts", "nowhere.txt"), 2, "nowhere.txt"),
        (("--prompt", "a", "--reference", "nowhere.txt"), 2, "nowhere.txt"),
        (("--prompt", "a", "--draft", "nowhere"), 2, "no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_done_is_told(capsys, folders, flags, code, words):
    found, out, err = call(capsys, "generate", folders[0], *flags)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert words in err


def test_lines_end_at_newlines_alone_and_a_byte_order_mark_is_none_of_the_first(capsys, folders, tmp_path, monkeypatch):
    lines = ["a\u2028b", "c\x0bd\x85e", "ab"]
    text, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8", newline="")
    objects.write_text(
        "\ufeff" + "\n".join(json.dumps({"prompt": line}, ensure_ascii=False) for line in lines), "utf-8"
    )
    for source in (text, objects, "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.read_bytes())))
        code, out, _ = call(capsys, "generate", folders[0], "--prompts", str(source), *ONE, "--json")
        assert code == 0
        assert [found["prompt"] for found in json.loads(out)["outputs"]] == lines


def test_a_reference_of_megabytes_is_refused_unread(capsys, folders, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_bytes(b"ab" * (1 << 23) + b"a")
    code, _, err = call(capsys, "generate", folders[0], "--prompt", "a", "--reference", str(notes))
    assert (code, "the file has 16777217 bytes, the limit is 16777216" in err) == (9, True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected an object"),
        ('{"text": "a"}', "line 2: expected an object"),
        ('{"prompt": "a", "top_k": 3}', "line 2: expected an object"),
        ('{"prompt": 3}', 'line 2: "prompt" is neither'),
        ('{"prompt": [true]}', 'line 2: "prompt" is neither'),
        ('{"prompt": "a", "references": "b"}', 'line 2: "references" is no list'),
    ],
)
def test_a_line_that_is_no_prompt_is_told_by_its_number(capsys, folders, tmp_path, line, words):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": [1, 2]}}\n{line}\n')
    code, out, err = call(capsys, "generate", folders[0], "--prompts", str(file))
    assert (code, out) == (5, "")
    assert words in err


def test_a_file_without_prompts_is_told(capsys, folders, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n \n")
    assert call(capsys, "generate", folders[0], "--prompts", str(file))[0] == 5


def test_an_output_that_fails_is_told_and_the_others_are_there(capsys, tmp_path):
    folder = str(write_folder(tmp_path / "target", broken(3)))  # c
    code, out, err = call(capsys, "generate", folder, "--prompt", "c", "--prompt", "ab", *ONE)
    assert code == 5
    assert out.startswith("--- 0: 0 tokens, failed\n\n\n--- 1: ")
    assert err.startswith("error: prompt 0: the largest logit at position 1 is nan")
    code, out, err = call(capsys, "generate", folder, "--prompt", "c", "--prompt", "ab", *ONE, "--json")
    told = json.loads(out)["outputs"]
    assert (code, err) == (5, "")
    assert [found["reason"] for found in told] == ["failed", told[1]["reason"]]
    assert "nan" in told[0]["error"]


def test_text_that_would_steer_a_terminal_is_escaped(monkeypatch, capsys):
    from qexport.cli import outputs

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    outputs._write("a\tb\n\x1b[2J é")
    assert capsys.readouterr().out == "a\tb\n\\u001b[2J é"


# ---------------------------------------------------------------- a process


def started(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qexport", "generate", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, **pipes)


LONG = ("--prompt", "the band", "--max-tokens", "900", "--threads", "1", "--speculate", "off", "--logit-bias", "0=-99")


def test_text_comes_while_it_is_made_and_a_reader_may_leave(folders):
    with started(folders[0], *LONG) as process:
        assert process.stdout.read(10)
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == b""


def test_an_interrupt_ends_it(folders):
    with started(folders[0], *LONG, "--logit-bias", "1=9") as process:
        assert process.stdout.read(1)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert time.monotonic() - began < 5
        assert b"Traceback" not in err


def test_help_tells_what_a_target_is():
    with click.Context(command) as context:
        assert "TARGET is a folder that export or build wrote" in command.get_help(context).replace("\n  ", " ")
