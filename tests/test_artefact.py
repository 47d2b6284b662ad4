"""What is opened of a folder, and with what: digests, releases, GPUs, all of it before anything is loaded."""

from __future__ import annotations

import json
import os
import sys
import types

import numpy as np
import pytest
from cached_models import Tiny, portable, serialized

import qexport.runtime.backends.choose as choose
from qexport import runtime
from qexport.errors import EnvironmentMismatch, IntegrityError, QexportError, UnsafeInput, UsageError
from qexport.runtime.backends.artefact import load_plan, open_artefact, runs_on
from qexport.runtime.backends.choose import open_session
from qexport.runtime.backends.gpus import Gpu
from qexport.runtime.session import SessionOptions
from qexport.safe_io import digest_bytes

PLAN = b"native code"
MODEL = serialized(portable(Tiny(positions=64)))
BUILT = {"module": "tensorrt_rtx", "version": "1.7.1.116"}


def folder_of(path, manifest=None, **files):
    """A folder with files and a manifest that vouches for them."""
    path.mkdir(exist_ok=True)
    names = {name.replace("_", "."): content for name, content in files.items()}
    for name, content in names.items():
        (path / name).write_bytes(content)
    listed = {name: {"bytes": len(content), "digest": digest_bytes(content)} for name, content in names.items()}
    (path / "manifest.json").write_text(json.dumps({"files": listed, "engine": None, **(manifest or {})}))
    return path


@pytest.fixture
def module(monkeypatch):
    made = types.ModuleType("tensorrt_rtx")
    made.__version__ = "1.7.1.116"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", made)
    return made


@pytest.fixture
def artefact(tmp_path, module):
    """A folder as a build leaves it, and the module that built it."""
    return folder_of(tmp_path, {"engine": BUILT}, engine_plan=PLAN)


def gpu(monkeypatch, *capabilities):
    """Let the machine have such GPUs, or none."""

    def found():
        if not capabilities:
            raise EnvironmentMismatch("the driver finds no GPU")
        return tuple(Gpu("test", capability, 8 << 30) for capability in capabilities)

    monkeypatch.setattr("qexport.runtime.backends.artefact.find_gpus", found)


def edit(artefact, change):
    path = artefact / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def plan_of(folder, device=None):
    return load_plan(open_artefact(folder), device)


def test_the_public_names_are_there():
    assert {"Decoder", "Session", "SessionOptions", "open_session"} <= set(runtime.__all__)
    for name in runtime.__all__:
        assert getattr(runtime, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'decoder_of'"):
        runtime.decoder_of  # noqa: B018 the point is a name that does not exist


# ------------------------------------------------------------ engines


def test_a_plan_that_its_manifest_vouches_for_is_read(artefact):
    assert plan_of(artefact) == PLAN


@pytest.mark.parametrize("plan", [b"nativE code", b"native cod", b"native code and more", b""])
def test_a_plan_that_was_changed_is_refused(artefact, plan):
    (artefact / "engine.plan").write_bytes(plan)
    with pytest.raises(IntegrityError):
        plan_of(artefact)


def test_g02_an_engine_behind_json_is_told_whoever_vouches_for_it(artefact):
    meta = json.dumps({"task": "detect"}).encode()
    content = len(meta).to_bytes(4, "little") + meta + PLAN
    (artefact / "engine.plan").write_bytes(content)
    for listed in (PLAN, content):
        record = {"bytes": len(listed), "digest": digest_bytes(listed)}
        edit(artefact, lambda manifest, record=record: manifest["files"].update({"engine.plan": record}))
        with pytest.raises(EnvironmentMismatch, match="18 bytes of JSON in front"):
            plan_of(artefact)
    os.rename(artefact / "engine.plan", artefact / "yolo.engine")
    with pytest.raises(EnvironmentMismatch, match="JSON in front"):
        open_session(artefact / "yolo.engine")


@pytest.mark.parametrize(
    "change",
    [lambda m: m["engine"].update(version="1.7.0.1"), lambda m: m["engine"].update(module="os", version="1")],
    ids=["release", "module"],
)
def test_a_plan_of_another_builder_is_an_environment_mismatch(artefact, change):
    edit(artefact, change)
    with pytest.raises(EnvironmentMismatch, match="was built by"):
        plan_of(artefact)


def test_a_plan_nobody_vouches_for_is_unsafe(artefact):
    edit(artefact, lambda manifest: manifest["files"].clear())
    with pytest.raises(UnsafeInput, match="lists no engine"):
        plan_of(artefact)
    (artefact / "manifest.json").unlink()
    with pytest.raises(UnsafeInput, match="no manifest"):
        plan_of(artefact)


@pytest.mark.parametrize(
    "text", ["{", "[]", "[" * 100_000, '{"files": 1}', '{"files": {"engine.plan": {}}, "engine": {}}']
)
def test_a_manifest_that_is_not_ours_is_refused(artefact, text):
    (artefact / "manifest.json").write_text(text)
    with pytest.raises(IntegrityError):
        plan_of(artefact)


def test_a_plan_that_is_a_link_is_unsafe(artefact):
    os.rename(artefact / "engine.plan", artefact / "elsewhere")
    (artefact / "engine.plan").symlink_to("elsewhere")
    with pytest.raises(UnsafeInput):
        plan_of(artefact)


@pytest.mark.parametrize(
    ("module", "built_for", "capability", "runs"),
    [
        ("tensorrt_rtx", (), "8.0", True),
        ("tensorrt_rtx", (), "12.0", True),
        ("tensorrt_rtx", (), "7.5", False),
        ("tensorrt_rtx", ("7.5",), "7.5", True),
        ("tensorrt_rtx", ("8.6", "8.9"), "8.9", True),
        ("tensorrt_rtx", ("8.6", "8.9"), "12.0", False),
        ("tensorrt", ("9.0",), "9.0", True),
        ("tensorrt", ("9.0",), "8.9", False),
        ("tensorrt", (), "8.9", True),
    ],
)
def test_an_engine_runs_on_the_gpus_that_it_was_built_for(module, built_for, capability, runs):
    assert runs_on(module, built_for, capability) == runs


def test_a_plan_for_another_gpu_is_not_read_by_anyone(artefact, monkeypatch):
    edit(artefact, lambda manifest: manifest["engine"].update(compute_capabilities=["8.6", "8.9"]))
    gpu(monkeypatch, "8.9", "12.0")
    assert plan_of(artefact, 0) == PLAN
    with pytest.raises(EnvironmentMismatch, match=r"compute capability 8\.6, 8\.9, this one has 12\.0"):
        plan_of(artefact, 1)
    with pytest.raises(EnvironmentMismatch, match="there is no GPU 2"):
        plan_of(artefact, 2)


def test_a_changed_plan_is_found_before_the_gpu_is_looked_at(artefact, monkeypatch):
    (artefact / "engine.plan").write_bytes(b"nativE code")
    gpu(monkeypatch)
    for path in (artefact, artefact / "engine.plan"):
        with pytest.raises(IntegrityError):
            open_session(path)


# ------------------------------------------------------------ graphs


def test_a_folder_with_a_graph_runs_on_the_processor(tmp_path):
    session = open_session(folder_of(tmp_path, model_onnx=MODEL))
    assert session.backend == "ort-cpu"
    assert "write_indices" in session.inputs
    assert open_session(tmp_path / "model.onnx").backend == "ort-cpu"
    assert open_session(MODEL).backend == "ort-cpu"


def test_a_graph_that_was_changed_is_refused_also_by_its_own_name(tmp_path):
    folder_of(tmp_path, model_onnx=MODEL)
    (tmp_path / "model.onnx").write_bytes(MODEL + b" ")
    for path in (tmp_path, tmp_path / "model.onnx"):
        with pytest.raises(IntegrityError, match=r"model\.onnx: the file is not the one that was written"):
            open_session(path)


def test_weights_that_were_changed_are_refused(tmp_path):
    folder = folder_of(tmp_path, model_onnx=MODEL)
    (folder / "model.onnx.data").write_bytes(b"weights")
    edit(folder, lambda m: m["files"].update({"model.onnx.data": {"bytes": 7, "digest": digest_bytes(b"weighs")}}))
    with pytest.raises(IntegrityError, match=r"model\.onnx\.data"):
        open_session(folder)


def test_a_graph_that_no_manifest_lists_is_opened_by_its_name_alone(tmp_path):
    (tmp_path / "mine.onnx").write_bytes(MODEL)
    assert open_session(str(tmp_path / "mine.onnx")).outputs[0] == "logits"
    with pytest.raises(UnsafeInput, match="there is no manifest"):
        open_session(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        open_session(tmp_path / "other.onnx")


def test_what_a_backend_cannot_run_is_refused_with_what_to_do(tmp_path):
    folder = folder_of(tmp_path, model_onnx=MODEL)
    for path, backend, words in (
        (folder, "tensorrt-rtx", "the folder has no engine of tensorrt-rtx"),
        (MODEL, "tensorrt", "tensorrt runs engines, not graphs"),
        (folder, "gpu", "no backend called 'gpu'"),
    ):
        with pytest.raises(UsageError, match=words):
            open_session(path, SessionOptions(backend=backend))


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.onnx")
    with pytest.raises(UnsafeInput, match="not a regular file"):
        open_session(tmp_path / "model.onnx")
    with pytest.raises(UnsafeInput, match="not a regular file"):
        open_session("/dev/zero")


@pytest.mark.parametrize("options", [{"threads": -1}, {"threads": 1025}, {"threads": 1.5}, {"device": -1}], ids=str)
def test_numbers_out_of_their_range_are_refused_by_name(options):
    ((name, value),) = options.items()
    with pytest.raises(UsageError, match=f"{name} is {value}, expected 0"):
        SessionOptions(**options)


# ------------------------------------------------------------ choosing


class Opened(Exception):
    """What would have been opened."""


@pytest.fixture
def spy(monkeypatch):
    """Sessions that say what they are asked to open instead of opening it."""

    def engine(plan, module, cuda, options, metadata):
        raise Opened(f"engine of {module.__name__} on GPU {cuda}: {plan!r} {metadata}")

    def graph(model, options):
        raise Opened(f"graph {options.providers[0]}")

    monkeypatch.setattr(choose, "EngineSession", engine)
    monkeypatch.setattr(choose, "OrtSession", graph)
    monkeypatch.setattr(choose, "open_cuda", lambda device: device)

    def opened(path, **options):
        try:
            open_session(path, SessionOptions(**options))
        except (Opened, QexportError) as what:
            return str(what)
        return "nothing"

    return opened


@pytest.fixture
def both(tmp_path, module):
    """A build: an engine, and the graph that it was made of."""
    manifest = {"target": "tensorrt-rtx", "engine": {**BUILT, "metadata": {"qexport.max_positions": "64"}}}
    return folder_of(tmp_path, manifest, model_onnx=MODEL, engine_plan=PLAN)


def test_the_engine_is_taken_where_it_runs_and_else_the_graph(both, spy, monkeypatch):
    gpu(monkeypatch, "8.9")
    assert spy(both) == "engine of tensorrt_rtx on GPU 0: b'native code' {'qexport.max_positions': '64'}"
    assert spy(both / "engine.plan").startswith("engine")
    assert spy(both / "model.onnx") == "graph CPUExecutionProvider"
    gpu(monkeypatch, "7.5")
    assert spy(both) == "graph CPUExecutionProvider"
    assert "this one has 7.5" in spy(both, backend="tensorrt-rtx")
    assert "this one has 7.5" in spy(both / "engine.plan")
    gpu(monkeypatch)
    assert spy(both) == "graph CPUExecutionProvider"
    assert spy(both, backend="tensorrt-rtx") == "the driver finds no GPU"


def test_the_engine_of_another_release_gives_way_to_the_graph(both, spy, module, monkeypatch):
    gpu(monkeypatch, "8.9")
    module.__version__ = "1.8.0"
    assert spy(both) == "graph CPUExecutionProvider"
    assert "was built by tensorrt_rtx 1.7.1.116, installed is 1.8.0" in spy(both / "engine.plan")
    (both / "model.onnx").unlink()
    edit(both, lambda manifest: manifest["files"].pop("model.onnx"))
    assert "was built by" in spy(both)


def test_another_backend_than_the_engine_s_is_refused(both, spy, monkeypatch):
    gpu(monkeypatch, "8.9")
    assert "no engine of tensorrt (it has one of tensorrt_rtx)" in spy(both, backend="tensorrt")
    assert spy(both, backend="ort-cpu") == "graph CPUExecutionProvider"
    assert spy(both, backend="ort-cuda") == "graph CUDAExecutionProvider"


@pytest.mark.parametrize(
    ("target", "providers", "gpus", "chosen"),
    [
        (None, ("CUDAExecutionProvider", "CPUExecutionProvider"), ["8.9"], "CUDA"),
        ("ort-cuda", ("CUDAExecutionProvider", "CPUExecutionProvider"), ["8.9"], "CUDA"),
        ("ort-cpu", ("CUDAExecutionProvider", "CPUExecutionProvider"), ["8.9"], "CPU"),
        (None, ("CUDAExecutionProvider", "CPUExecutionProvider"), [], "CPU"),
        ("ort-cuda", ("CPUExecutionProvider",), ["8.9"], "CPU"),
    ],
)
def test_a_graph_goes_to_the_gpu_where_provider_and_gpu_are_there(
    tmp_path, spy, monkeypatch, target, providers, gpus, chosen
):
    folder = folder_of(tmp_path, {"target": target}, model_onnx=MODEL)
    gpu(monkeypatch, *gpus)
    monkeypatch.setattr(choose, "available_providers", lambda: providers)
    assert spy(folder) == f"graph {chosen}ExecutionProvider"
    assert spy(folder, backend="ort-cpu") == "graph CPUExecutionProvider"


def test_a_closed_session_says_so(tmp_path):
    session = open_session(folder_of(tmp_path, model_onnx=MODEL))
    session.close()
    session.close()
    with pytest.raises(UsageError, match="the session is closed"):
        session.run({name: np.zeros(1) for name in session.inputs})
