"""``qexport certify``: certificates of sound pairs, their files, what is refused, and greedy output in near ties."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from cached_models import Tiny, forward
from certified_pairs import ONE, drafting, load_checker, prompts_of, subject, tiny_pair
from generating import END, broken, near, tokenizer, write_folder
from helpers import call

from qexport.errors import DataInvalid, ModelInvalid, UsageError
from qexport.runtime.certifying import greedy, gtest
from qexport.runtime.certifying.certificate import Test as Trial
from qexport.runtime.certifying.certificate import judge
from qexport.runtime.certifying.certify import GREEDY, LONG, PURE, CertifyOptions, certify, examine
from qexport.runtime.certifying.exact import Grain
from qexport.runtime.certifying.gtest import Fit
from qexport.runtime.certifying.subject import PLAIN, UNROLLED, Subject, Way, make_rows
from qexport.runtime.decoder import Decoder
from qexport.runtime.generation.generator import Generator
from qexport.runtime.sampling.settings import Sampling
from qexport.runtime.speculation.chains import Chains

pair = cache(tiny_pair)
FEW = ("--samples", "40", "--seeds", "4", "--rows", "4", "--length", "16", "--threads", "1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return write_folder(root / "target", Tiny()), write_folder(root / "draft", near(Tiny(), 0.1))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("the band\n\nand the ring\nabba\n")
    return path


@pytest.fixture(scope="module")
def examined():
    """All checks of the whole pair, its unrolled draft among them, and the runs behind them."""
    files = pair(50)
    loop = subject(files, chains=Chains(files[1], ONE))
    return examine(loop, prompts_of(50), CertifyOptions(samples=300, seeds=6, rows=6, length=16))


def test_a_sound_pair_is_certified_in_every_way_to_decode(examined):
    checks, runs = examined
    assert [check.name for check in checks if not check.passed] == []
    assert {check.group for check in checks} >= {"sound", "greedy", "decisions", "joint", "seeds", "outputs", "numbers"}
    assert len([check for check in checks if check.group == "joint"]) == 10
    assert [replace(run.way, sampling=PURE) for run in runs[:-1]] == [replace(way, sampling=PURE) for way in LONG]
    decisions = next(check for check in checks if check.group == "decisions")
    assert decisions.samples > 800
    assert decisions.details["unsure"] < 0.05 * decisions.samples


def test_every_test_tells_what_it_would_have_found(examined):
    tested = [check for check in examined[0] if check.group in {"joint", "outputs", "numbers"}]
    for check in tested:
        assert 0 < check.finds <= 1
        assert check.p > 0
        expected = gtest.power(check.details["freedom"], check.samples, 1e-3 / (len(tested) + 1))
        assert check.finds == pytest.approx(expected)


def test_copies_alone_are_certified_where_there_is_no_draft():
    options = CertifyOptions(samples=100, seeds=4, rows=4, length=12)
    whole = subject(pair(50))
    checks, runs = examine(Subject(whole.target, whole.truth), prompts_of(50), options)
    assert all(check.passed for check in checks)
    assert {run.way.proposer for run in runs} == {"lookup"}
    assert [check.name for check in checks if check.group == "joint"] == ["copies, 3 ahead", "control: plain decoding"]


def test_judging_all_tests_at_once_allows_for_their_number():
    def passed(*values):
        return [one.passed for one in judge([Trial("joint", "a", Fit(1.0, 3, p, 50)) for p in values], 1e-3)]

    assert passed(5e-4) == [False]
    assert passed(5e-4, 0.5, 0.9) == [True, True, True]
    assert passed(1e-9, 6e-4, 0.9) == [False, True, True]


def test_a_certificate_goes_into_a_folder_with_a_log_that_checks(folders, prompts, tmp_path, capsys):
    target, draft = map(str, folders)
    output = tmp_path / "certificate"
    code, out, _ = call(
        capsys, "certify", target, "--draft", draft, *FEW, "--prompts", str(prompts), "-o", str(output), "--json"
    )
    told = json.loads(out)
    assert code == 0
    assert told["schema"] == "qexport.certificate/1"
    assert told["passed"] is True
    assert told["options"]["samples"] == 40
    assert json.loads((output / "certificate.json").read_text())["checks"] == told["checks"]
    assert "checks hold" in (output / "certificate.txt").read_text()
    checked = load_checker().check(
        output / "replay.jsonl", {name: f"{told[name]['path']}/model.onnx" for name in ("target", "draft")}
    )
    assert checked["wrong"] == 0
    assert checked["decisions"] > 500
    assert call(capsys, "certify", target, *FEW, "--prompts", str(prompts), "-o", str(output))[0] == 0  # replaces it


def test_a_fault_is_told_and_exits_with_7(folders, prompts, tmp_path, capsys, monkeypatch):
    def colder(chances, sampler, scores, row, ids):
        return type(sampler)(replace(sampler.settings, temperature=0.5)).chances(scores, row, ids)

    bent = drafting(draws=colder)
    monkeypatch.setattr(Subject, "_draft", lambda self, sampler: bent(self.draft, sampler, 50))
    asked = ("certify", str(folders[0]), "--draft", str(folders[1]), *FEW, "--prompts", str(prompts))
    code, out, error = call(capsys, *asked, "-o", str(tmp_path / "out"))
    assert code == 7
    assert "FAIL every decision recomputed" in out
    assert "checks fail: every decision recomputed" in error
    assert (tmp_path / "out/replay.jsonl").exists()
    code, out, _ = call(capsys, *asked, "--json")
    assert code == 7
    assert json.loads(out)["passed"] is False


def test_a_generator_that_says_something_else_than_the_loop_is_found(folders, prompts, capsys, monkeypatch):
    complete = Generator.complete

    def altered(self, given, sampling=None, stop=None):
        first, *others = complete(self, given, sampling, stop)
        return [replace(first, tokens=(*first.tokens[:5], (first.tokens[5] + 25) % 50, *first.tokens[6:])), *others]

    asked = ("certify", str(folders[0]), "--draft", str(folders[1]), *FEW, "--prompts", str(prompts))
    monkeypatch.setattr(Generator, "complete", altered)
    code, out, error = call(capsys, *asked)
    assert code == 7
    assert re.search(r"1 of \d+ checks fail: the generator says the same", error)
    assert "12 of 16 rows equal, 0 differ in a tie; draft row 0 differs at token 5" in out


def test_a_draft_with_another_tokenizer_is_refused(folders, tmp_path, capsys):
    other = write_folder(tmp_path / "other", near(Tiny(), 0.1), tokenizer(end=END + END))
    code, _, error = call(capsys, "certify", str(folders[0]), "--draft", str(other))
    assert code == DataInvalid.exit_code
    assert "tokenizer is not that of the target" in error


def test_a_draft_without_numbers_is_told(folders, tmp_path, capsys):
    silent = write_folder(tmp_path / "draft", broken(*range(50)))
    asked = ("--samples", "100", "--seeds", "2", "--rows", "2", "--length", "8", "--threads", "1")
    code, _, error = call(capsys, "certify", str(folders[0]), "--draft", str(silent), *asked)
    assert code == DataInvalid.exit_code
    assert re.search(r"error: the largest logit of the model behind \d+ tokens is nan", error)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (("--samples", "9"), "9 samples are too few for 50 seeds"),
        (("--seeds", "1"), "seeds is 1"),
        (("--level", "1"), "the level is 1"),
        (("--seed", "-1"), "seed is -1"),
        (("--seed", str(2**63)), "seed is 9223372036854775808, expected 0 to"),
        (("--samples", str(10**12)), "samples is 1000000000000, expected 1 to 10000000"),
        (("--rows", str(10**12)), "rows is 1000000000000, expected 1 to 1024"),
        (("--threads", "9999"), "threads is 9999, expected 0 to 1024"),
        (("--backend", "ort-cqu"), "ort-cqu"),
    ],
)
def test_options_that_leave_nothing_to_test_are_refused(folders, wrong, told, capsys):
    code, _, error = call(capsys, "certify", str(folders[0]), *wrong)
    assert code == UsageError.exit_code
    assert told in error


def test_prompts_that_are_not_there_are_refused(folders, tmp_path, capsys):
    (tmp_path / "empty").write_text("\n \n")
    code, _, error = call(capsys, "certify", str(folders[0]), "--prompts", str(tmp_path / "empty"))
    assert code == UsageError.exit_code
    assert "no prompts" in error


def test_models_with_few_positions_get_shorter_texts_or_are_refused(tmp_path):
    short = write_folder(tmp_path / "short", Tiny(positions=24))
    options = CertifyOptions(samples=40, seeds=4, rows=2, threads=1)
    found = certify(short, None, options, ["the band"])
    assert {row for run in found.runs for row in map(len, run.outputs())} == {24 - len(found.runs[0].prompts[0]) - 1}
    with pytest.raises(ModelInvalid, match="9 positions leave no room"):
        certify(write_folder(tmp_path / "none", Tiny(positions=9)), None, options, ["the band and the ring"])


class Tie(Decoder):
    """Two tokens are equal but for the last bits, and wide calls see them the other way round."""

    gap = 1e-6

    def extend(self, ids, counts=None):
        logits = super().extend(ids, counts)
        best = logits.argmax(-1)
        rival = (best + 1) % logits.shape[-1]
        top = np.take_along_axis(logits, best[..., None], -1)
        wide = ids.shape[1] > 1
        np.put_along_axis(logits, rival[..., None], top + (self.gap if wide else -self.gap), -1)
        return logits


class WideTie(Tie):
    """The same with a distance that no rounding explains, but only in the loop."""

    gap = 1e-2


def test_greedy_output_that_differs_in_a_tie_is_told_and_passes():
    whole = subject(pair(50))
    tied = Subject(Tie(pair(50)[0], ONE), Tie(pair(50)[0], ONE), whole.draft, whole.draft_truth)
    found = greedy.compare(tied, prompts_of(50), 12, [Way(Sampling(), 3)])
    assert found.differences
    assert found.passed
    assert all(one.margin <= 2 * found.noise for one in found.differences)
    assert found.margin <= 2e-6


def test_greedy_output_that_differs_in_no_tie_fails():
    whole = subject(pair(50))
    wrong = Subject(WideTie(pair(50)[0], ONE), whole.truth, whole.draft, whole.draft_truth)
    found = greedy.compare(wrong, prompts_of(50), 12, [Way(Sampling(), 3)])
    assert not found.passed
    assert found.noise < 1e-4


def test_greedy_output_of_a_sound_pair_is_equal_and_the_smallest_margin_is_that_of_the_reference():
    files = pair(50)
    found = greedy.compare(subject(files), prompts_of(50), 10, [way for way in GREEDY if way.proposer != UNROLLED])
    assert (found.same, found.differences) == (found.rows, ())
    margins = []
    for prompt in prompts_of(50):
        ids = list(prompt)
        for _ in range(10):
            logits = np.sort(forward(files[2], ids)[-1])
            margins.append(logits[-1] - logits[-2])
            ids.append(int(forward(files[2], ids)[-1].argmax()))
    assert found.margin == pytest.approx(min(margins), rel=1e-3)


def test_rows_of_a_batch_have_prompts_in_turn_and_streams_of_their_own():
    rows = make_rows([[1], [2, 3]], 3)
    assert [(row.ids, row.prompt, row.stream) for row in rows] == [([1], 1, 0), ([2, 3], 2, 1), ([1], 1, 2)]
    assert subject(pair(50)).proposer(PLAIN, None) is None
    assert Grain().depth == 3
