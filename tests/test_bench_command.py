"""``qexport bench`` over the whole road: folders and prompts in, a table, numbers and pictures out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import call, exported

from qexport.errors import UsageError
from qexport.runtime.benchmarking.bench import BenchOptions, run_bench
from qexport.runtime.session import SessionOptions

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT / "samples/decoder/stories260k"
ONE = SessionOptions(threads=1)
PROMPTS = ("Once upon a time", "Lily and Tom went to the park")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("bench")
    exported(STORIES, made / "stories")
    (made / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")
    return made


def run(capsys, folder, *more):
    return call(
        capsys, "bench", str(folder / "stories"), "--prompts", str(folder / "prompts.txt"), "--threads", "1", *more
    )


def test_a_draft_that_is_the_target_is_always_right(folder):
    options = BenchOptions(max_tokens=25, ahead=(2, 3), auto=False, session=ONE)
    told = []
    found = run_bench((folder / "stories", folder / "stories"), PROMPTS, options, lambda: told.append(1))
    assert [entry.name for entry in found.entries] == ["plain", "K = 2", "K = 3", "lookup"]
    assert len(told) == len(PROMPTS)
    assert all(entry.same == len(PROMPTS) for entry in found.entries)
    plain, two, three = found.entries[:3]
    assert plain.stats.tokens == two.stats.tokens == 25 * len(PROMPTS)
    # 24 tokens behind the first: 8 rounds of 3, 6 of 4
    assert (two.stats.tokens_per_call, three.stats.tokens_per_call) == (3, 4)
    assert (two.stats.target_calls, three.stats.target_calls) == (8 * 2, 6 * 2)
    assert found.acceptance.rate == 1
    assert found.acceptance.conditional == (1, 1, 1)
    assert plain.stats.hardware.predicted_speedup == pytest.approx(1)
    assert two.predicted < 3  # every token costs a call of a model as large as the target
    assert two.stats.hardware.draft.calls == 2 * 8 * 2
    assert 0 < plain.stats.overhead < 1
    assert 0 < plain.stats.hardware.target.mbu < 3
    assert plain.stats.hardware.target.bytes > 24 * 2 * found.known.target.costs.weights


def test_the_command_writes_numbers_and_pictures(capsys, folder, tmp_path):
    out = tmp_path / "out"
    options = ["--draft", str(folder / "stories"), "--max-tokens", "8", "--speculate", "1,auto", "-o", str(out)]
    code, told, err = run(capsys, folder, *options)
    assert code == 0, err
    assert {path.name for path in out.iterdir()} == {
        "bench.json", "manifest.json", "roofline.svg", "speedup.svg", "acceptance.svg",
    }  # fmt: skip
    numbers = json.loads((out / "bench.json").read_text())
    assert [entry["name"] for entry in numbers["entries"]] == ["plain", "K = 1", "auto", "lookup"]
    assert numbers["best"] == "K = 1"
    for name in ("plain", "K = 1", "auto", "lookup", "MBU", "TTFT"):
        assert name in told
    assert "best fixed number" in told
    assert set(json.loads((out / "manifest.json").read_text())["files"]) == {
        "bench.json", "roofline.svg", "speedup.svg", "acceptance.svg",
    }  # fmt: skip
    code, _, err = run(capsys, folder, *options)
    assert code == 0, err  # its own folder is replaced


def test_prompts_may_have_references_to_copy_from(capsys, folder, tmp_path):
    text = "Once upon a time there was a little girl named Lily. She loved to play outside in the park."
    prompt = {"prompt": "Once upon a time", "references": [text]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompt) + "\n")
    options = ["--prompts", str(tmp_path / "prompts.jsonl"), "--max-tokens", "20", "--threads", "1", "--json"]
    code, told, err = call(capsys, "bench", str(folder / "stories"), *options)
    assert code == 0, err
    plain, lookup = json.loads(told)["entries"]
    assert lookup["same"] == 1
    assert lookup["stats"]["tokens"] == plain["stats"]["tokens"]
    assert lookup["stats"]["target_calls"] < plain["stats"]["target_calls"]
    assert lookup["stats"]["proposers"][0]["proposer"] == "reference"


def test_json_is_one_object_on_stdout(capsys, folder):
    code, told, err = run(capsys, folder, "--max-tokens", "4", "--limit", "1", "--speculate", "off", "--json")
    assert code == 0, err
    found = json.loads(told)
    assert (found["schema"], found["prompts"], found["draft"]) == ("qexport.bench/1", 1, None)
    assert [entry["name"] for entry in found["entries"]] == ["plain"]
    assert found["best"] is None


def test_without_a_draft_it_is_plain_decoding_and_copies(folder):
    found = run_bench((folder / "stories", None), PROMPTS[:1], BenchOptions(max_tokens=5, session=ONE))
    assert [entry.name for entry in found.entries] == ["plain", "lookup"]
    assert found.known.draft is None
    assert found.entries[1].stats.hardware.draft is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--speculate", "2,fast"], "--speculate"),
        (["--speculate", "9" * 5000], "--speculate"),
        (["--speculate", "0"], "tokens ahead are"),
        (["--rounds", "0"], "0 rounds"),
        (["--max-tokens", "1"], "of 1 tokens"),
        (["--temperature", "-1"], "temperature"),
        (["--threads", "-1"], "--threads"),
        (["--backend", "ort-gpu"], "ort-gpu"),
    ],
)
def test_bad_options_are_refused(capsys, folder, options, told):
    code, _, err = run(capsys, folder, *options)
    assert code == 2
    assert told in err


def test_a_file_without_prompts_is_refused(capsys, folder, tmp_path):
    (tmp_path / "empty.txt").write_text("\n  \n")
    code, _, err = call(capsys, "bench", str(folder / "stories"), "--prompts", str(tmp_path / "empty.txt"))
    assert code == 5
    assert "no prompts" in err
    with pytest.raises(UsageError, match="no prompts"):
        run_bench((folder / "stories", None), [])


def test_missing_plots_are_told_before_the_work(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("qexport.runtime.benchmarking.bench.open_generator", None)  # nothing is loaded
    code, _, err = run(capsys, folder, "-o", str(tmp_path / "out"))
    assert code == 8
    assert "qexport[report]" in err
    assert not (tmp_path / "out").exists()
