"""What is around the folder of an export: tokenizers, inputs, options, outputs, full disks, signals, terminals."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import call
from test_export import tokenizer
from test_export_faults import HOSTILE, refused, snapshot, tiny

from qexport.errors import UsageError
from qexport.exporter.evaluate import EvalOptions, find_model

ROOT = Path(__file__).resolve().parents[1]
PAST = ROOT / "tests/models/llama_past_optimum.onnx"
NO_UNKNOWN = '{"version":"1.0","model":{"type":"WordLevel","vocab":{"7":7},"unk_token":"[UNK]"}}'


# ---------------------------------------------------------------- D11: tokenizers


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"model":{"type":"BPE"}}', NO_UNKNOWN])
def test_d11_a_tokenizer_that_is_none_is_refused(capsys, tmp_path, text):
    folder = tiny(tmp_path / "in")
    (folder / "tokenizer.json").write_text(text)
    code, err = refused(capsys, tmp_path, str(folder))
    assert (code, "tokenizer" in err) == (5, True), err


def test_d11_a_tokenizer_with_more_words_than_the_model_is_refused_by_every_door_before_work(capsys, tmp_path):
    folder, model = tiny(tmp_path / "in"), tmp_path / "onnx"
    tokenizer(folder, 51)
    model.mkdir()
    shutil.copy(PAST, model / "model.onnx")
    tokenizer(model, 100_000)
    (tmp_path / "text.txt").write_text("1 2 3 4 " * 100)
    for source in (folder, model):
        code, err = refused(capsys, tmp_path, str(source))
        assert (code, "the tokenizer gives numbers up to" in err, "verify" in err) == (5, True, False), err
    given = ["--recipe", "int8", "--calib", str(tmp_path / "text.txt"), "-o", str(tmp_path / "out")]
    code, _, err = call(capsys, "build", str(folder), *given)
    assert (code, "the tokenizer gives numbers up to" in err, "recipe (" in err) == (5, True, False), err


def test_labels_of_tokens_are_no_words(capsys, tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (int64[n, t] input_ids) => (float[n, t, 3] logits) { logits = Gather(table, input_ids) }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(50, 3, dtype=np.float32), "table"))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    tokenizer(folder, 50)
    code, _, err = call(capsys, "export", str(folder), "-o", str(tmp_path / "out"))
    assert code == 0, err
    tokenizer(folder, 51)
    shutil.rmtree(tmp_path / "out")
    assert refused(capsys, tmp_path, str(folder))[0] == 5


# ---------------------------------------------------------------- inputs to verify on


@pytest.mark.parametrize("number", [-1, 50, 1 << 62])
def test_token_numbers_that_the_model_has_no_words_for_are_refused(capsys, tmp_path, number):
    np.savez(tmp_path / "ids.npz", input_ids=np.full((4, 30), number))
    code, err = refused(capsys, tmp_path, str(tiny(tmp_path / "in")), "--data", str(tmp_path / "ids.npz"))
    assert (code, f"from {number} to {number}, the model has words 0 to 49" in err) == (5, True), err


@pytest.mark.parametrize("option", ["--text", "--data"])
def test_inputs_that_are_not_there_are_missed_before_the_work(capsys, tmp_path, option):
    folder = tiny(tmp_path / "in")
    os.mkfifo(tmp_path / "fifo")
    for place, expected in (("nowhere", 2), ("fifo", 4)):
        code, err = refused(capsys, tmp_path, str(folder), option, str(tmp_path / place))
        assert (code, "] open" in err) == (expected, False), err


# ---------------------------------------------------------------- options and sources


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["", "--dtype", "float32"], "no such file or folder"),
        (["x" * 5000], "no such file or folder"),
        ([f"{HOSTILE}:make"], "no module"),
        (["net:make", "--via", "optimum"], "is for folders"),
        (["net:make", "--via", "qexport"], "is for folders"),
        (["{in}", "--python", "python"], "--python is for --via optimum"),
        (["{in}", "--text", "{in}/config.json", "--data", "{in}/config.json"], "exclude each other"),
    ],
)
def test_options_that_contradict_each_other_are_refused(capsys, tmp_path, arguments, words):
    folder = str(tiny(tmp_path / "in"))
    code, err = refused(capsys, tmp_path, *(argument.replace("{in}", folder) for argument in arguments))
    assert (code, words in err) == (2, True), err


def test_m11_a_source_that_is_no_file_is_not_waited_for(capsys, tmp_path):
    os.mkfifo(tmp_path / "model.onnx")
    for place in (tmp_path / "model.onnx", "/dev/zero"):
        code, err = refused(capsys, tmp_path, str(place))
        assert (code, "not a regular file" in err) == (4, True), err


@pytest.mark.torch
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("return torch.nn.Identity(), 3", "the examples are of type 'int'"),
        (f"raise ValueError({HOSTILE!r})", "its code failed: ValueError"),
        ("return 3", "not a torch.nn.Module"),
    ],
)
def test_callables_that_fail_end_with_our_exit_code(capsys, tmp_path, body, words):
    pytest.importorskip("torch")
    (tmp_path / "net.py").write_text(f"import torch\ndef make():\n    print('noise')\n    {body}\n")
    before = set(os.listdir(tmp_path))
    code, out, err = call(capsys, "export", f"{tmp_path / 'net.py'}:make", "-o", str(tmp_path / "out"))
    assert (code, out, words in err) == (2, "", True), err
    assert set(os.listdir(tmp_path)) - {"__pycache__"} == before


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize(
    "asked", [{"threads": 1025}, {"threads": 1 << 70}, {"window": 1}, {"stride": 0}, {"chunk": -1}]
)
def test_numbers_of_an_evaluation_that_mean_nothing_are_refused(asked):
    with pytest.raises(UsageError, match=f"{next(iter(asked))} is"):
        EvalOptions(**asked)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "nowhere"])
def test_names_that_no_model_has_are_refused(name):
    with pytest.raises(UsageError, match="no such file"):
        find_model(Path(name))


def test_text_that_the_tokenizer_cannot_read_is_told(capsys, tmp_path):
    folder = tiny(tmp_path / "in")
    assert call(capsys, "export", str(folder), "-o", str(tmp_path / "out"))[0] == 0
    (tmp_path / "out/tokenizer.json").write_text(NO_UNKNOWN)
    (tmp_path / "text.txt").write_text("7 8")
    code, _, err = call(capsys, "eval", str(tmp_path / "out"), "--text", str(tmp_path / "text.txt"))
    assert (code, "the tokenizer cannot read the text" in err) == (5, True), err


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    ("name", "code"), [("in", 2), ("", 2), ("file", 2), ("file/out", 2), ("x" * 256, 2), ("loop", 2)]
)
def test_f02_an_output_that_cannot_be_is_refused_before_the_work(capsys, tmp_path, name, code):
    folder = tiny(tmp_path / "in")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    before = snapshot(tmp_path)
    found, _, err = call(capsys, "export", str(folder), "-o", str(tmp_path / name))
    assert (found, "] open" in err) == (code, False), err
    assert snapshot(tmp_path) == before


def test_files_of_a_person_are_never_replaced(capsys, tmp_path):
    folder, out = tiny(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    (out / "work").write_text("mine")
    (out / "manifest.json").write_text('{"name": "an app", "files": ["work"]}')
    code, _, err = call(capsys, "export", str(folder), "-o", str(out))
    assert (code, "no build wrote" in err) == (2, True), err
    assert (out / "work").read_text() == "mine"


# ---------------------------------------------------------------- processes


def command(*arguments: str | bytes | Path) -> list[str | bytes | Path]:
    return [sys.executable, "-m", "qexport", *arguments]


def ended(*arguments: str | bytes | Path, **more) -> subprocess.CompletedProcess[bytes]:
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | more
    return subprocess.run(command(*arguments), timeout=60, check=False, **given)


@pytest.mark.parametrize("limit", [0, 3000, 112_000])
def test_f01_a_full_disk_keeps_the_old_export(tmp_path, limit):
    folder, out = tiny(tmp_path / "in"), tmp_path / "out"
    assert ended("export", folder, "-o", out).returncode == 0
    before = snapshot(tmp_path)
    full = ended(
        "export", folder, "-o", out, preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit,) * 2)
    )
    assert (full.returncode, b"too large" in full.stderr) == (9, True), full.stderr
    assert snapshot(tmp_path) == before
    assert set(os.listdir(tmp_path)) == {"in", "out"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_f03_f04_a_process_that_is_stopped_leaves_nothing_that_the_next_does_not_find(tmp_path, number, code):
    folder, out, scratch = tiny(tmp_path / "in"), tmp_path / "out", tmp_path / "tmp"
    before = snapshot(folder)
    scratch.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command("export", folder, "-o", out), env=environment, **pipes) as process:
        deadline = time.monotonic() + 60
        while not any(name.startswith(".out.stage-") for name in os.listdir(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(number)
        _, err = process.communicate(timeout=10)
    assert process.returncode == code, err
    assert b"Traceback" not in err
    if number != signal.SIGKILL:
        assert set(os.listdir(tmp_path)) == {"in", "tmp"}
    assert ended("export", folder, "-o", out, env=environment).returncode == 0
    assert set(os.listdir(tmp_path)) == {"in", "tmp", "out"}
    assert not [name for name in os.listdir(scratch) if "qexport" in name or "scratch" in name]
    assert snapshot(folder) == before


def test_x03_names_that_are_no_text_go_in_and_out_on_any_terminal(tmp_path):
    folder, out = os.fsencode(tmp_path) + b"/in \xe9\xff", os.fsencode(tmp_path) + b"/out \xe9"
    shutil.copytree(os.fsencode(tiny(tmp_path / "in")), folder)
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb", "HOME": "/nonexistent"}
    done = ended("export", folder, "-o", out, "--json", env=os.environ | plain)
    assert done.returncode == 0, done.stderr
    assert os.fsencode(json.loads(done.stdout)["directory"]) == out
    assert b"model.onnx" in os.listdir(out)


def test_a_full_stdout_is_no_bug(tmp_path):
    with open("/dev/full", "wb") as full:
        done = ended("export", tiny(tmp_path / "in"), "-o", tmp_path / "out", stdout=full)
    assert (done.returncode, b"stdout: cannot be written" in done.stderr) == (9, True), done.stderr
