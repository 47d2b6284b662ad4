"""Optimum's exporters: a stand-in says what the child is given and how it may end; the real one where there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qexport.errors import BuildFailed, EnvironmentMismatch, NativeCrash, ResourceExhausted, UnsafeInput, UsageError
from qexport.exporter.doors.optimum_process import TASKS, OptimumOptions, command, export_optimum, infer_task
from qexport.exporter.onnx_file import load_onnx

WRITES = "pathlib.Path(sys.argv[-1], 'model.onnx').write_bytes(b'onnx')"


@pytest.fixture
def folder(tmp_path):
    """A folder that looks like a decoder."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    save_file({"w": np.zeros(2, np.float32)}, place / "model.safetensors")
    return place


@pytest.fixture
def into(tmp_path):
    place = tmp_path / "into"
    place.mkdir()
    return place


@pytest.fixture
def stand_in(tmp_path):
    """An interpreter that notes its arguments and environment, and then does what it is told instead."""

    def make(code):
        python = tmp_path / "python"
        noted = f"json.dump([sys.argv[1:], dict(os.environ), os.getcwd()], open({str(tmp_path / 'noted.json')!r}, 'w'))"
        lines = [f"#!{sys.executable} -S", "import json, os, pathlib, sys, time", noted, code]
        python.write_text("\n".join(lines))
        python.chmod(0o755)
        return OptimumOptions(python=python)

    return make


def noted(tmp_path):
    return json.loads((tmp_path / "noted.json").read_text())


def test_the_child_is_told_what_to_export_and_to_stay_offline(folder, into, stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hush")
    monkeypatch.setenv("MY_API_KEY", "hush")
    assert export_optimum(folder, into, stand_in(WRITES)) == (into / "model.onnx",)
    arguments, environment, place = noted(tmp_path)
    assert arguments[:3] == ["-P", "-m", "optimum.exporters.onnx"]
    assert arguments[-1] == str(into)
    assert {f"--model={folder}", "--task=text-generation-with-past", "--dtype=fp32"} <= set(arguments)
    assert not [argument for argument in arguments if "trust" in argument or "opset" in argument]
    assert environment["HF_HUB_OFFLINE"] == environment["TRANSFORMERS_OFFLINE"] == "1"
    assert environment["HF_HOME"].startswith(str(into))
    assert "hush" not in environment.values()
    assert place == str(into)
    assert "HF_HOME" not in os.environ


def test_every_file_is_returned_the_model_first(folder, into, stand_in):
    names = ("decoder_model.onnx", "model.onnx", "encoder_model.onnx", "model.onnx_data")
    code = f"for name in {names!r}: pathlib.Path(sys.argv[-1], name).touch()"
    found = export_optimum(folder, into, stand_in(code))
    assert [path.name for path in found] == ["model.onnx", "decoder_model.onnx", "encoder_model.onnx"]


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        ("sys.exit(\"No module named 'optimum'\")", EnvironmentMismatch, r"'qexport\[optimum\]' in an environment of"),
        ('sys.exit("python: No module named optimum.exporters")', EnvironmentMismatch, "pins transformers below"),
        ("raise ValueError('a custom or unsupported architecture')", BuildFailed, "ValueError: a custom or unsup"),
        ("print('last words'); sys.exit(3)", BuildFailed, "cannot export it: last words"),
        ("sys.exit(3)", BuildFailed, "cannot export it: status 3"),
        ("raise MemoryError", ResourceExhausted, "memory ran out"),
        ("os.kill(os.getpid(), 9)", ResourceExhausted, "memory ran out"),
        ("os.kill(os.getpid(), 11)", NativeCrash, "SIGSEGV"),
        ("pass", BuildFailed, "wrote no ONNX file"),
    ],
)
def test_how_the_child_ends_is_told(folder, into, stand_in, code, error, said):
    with pytest.raises(error, match=said):
        export_optimum(folder, into, stand_in(code))


def test_a_child_that_hangs_is_stopped_with_all_it_started(folder, into, stand_in, tmp_path):
    code = (
        f"child = os.fork()\nif child: open({str(tmp_path / 'pid')!r}, 'w').write(str(child))\n"
        "sys.stdout.flush(); time.sleep(60)"
    )
    options = OptimumOptions(python=stand_in(code).python, timeout=1.5)
    start = time.monotonic()
    with pytest.raises(ResourceExhausted, match=r"did not end within 1\.5 s"):
        export_optimum(folder, into, options)
    assert time.monotonic() - start < 20
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    for _ in range(50):
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("a grandchild is left")


def test_a_folder_with_code_or_pickles_never_reaches_the_child(folder, into, stand_in, tmp_path):
    config = folder / "config.json"
    plain = config.read_text()
    config.write_text(json.dumps({"auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(UnsafeInput, match="asks to run code"):
        export_optimum(folder, into, stand_in(WRITES))
    config.write_text(plain)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsafeInput, match="pickle"):
        export_optimum(folder, into, stand_in(WRITES))
    assert not (tmp_path / "noted.json").exists()


def test_links_that_lead_outside_never_reach_the_child(folder, into, stand_in, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeInput, match="leads out of its folder"):
        export_optimum(folder, into, stand_in(WRITES))
    assert not (tmp_path / "noted.json").exists()


def test_an_interpreter_that_is_not_there_is_told(folder, into, tmp_path):
    with pytest.raises(UsageError, match="no interpreter"):
        export_optimum(folder, into, OptimumOptions(python=tmp_path / "none"))


@pytest.mark.parametrize("task", ["--trust-remote-code", "a b", "", "Text", "a;b"])
def test_a_task_cannot_be_an_option(folder, into, task):
    with pytest.raises(UsageError, match="is no task"):
        command(folder, into, task, OptimumOptions())


@pytest.mark.parametrize(
    ("architectures", "task"),
    [
        (["LlamaForCausalLM"], "text-generation-with-past"),
        (["T5ForConditionalGeneration"], "text2text-generation-with-past"),
        (["BertForSequenceClassification"], "text-classification"),
        (["BertModel"], "feature-extraction"),
        ([], "feature-extraction"),
        (None, "feature-extraction"),
    ],
)
def test_the_task_is_what_the_folder_was_saved_for(architectures, task):
    assert infer_task({"architectures": architectures}) == task
    assert list(TASKS)[-1] == ""


def optimum_python():
    """An interpreter that has optimum: the one that is named in the environment, or this one."""
    named = os.environ.get("QEXPORT_OPTIMUM_PYTHON")
    if named:
        return Path(named)
    try:
        found = importlib.util.find_spec("optimum.exporters.onnx")
    except ModuleNotFoundError:
        found = None
    return Path(sys.executable) if found else None


@pytest.mark.optimum
@pytest.mark.skipif(optimum_python() is None, reason="needs optimum-onnx; QEXPORT_OPTIMUM_PYTHON may name who has it")
def test_a_real_decoder_comes_with_its_cache(samples, into):
    (file,) = export_optimum(samples / "decoder/stories260k", into, OptimumOptions(python=optimum_python()))
    graph = load_onnx(file).graph
    names = [value.name for value in (*graph.inputs, *graph.outputs)]
    assert {"input_ids", "attention_mask", "past_key_values.0.key", "logits", "present.4.value"} <= set(names)
