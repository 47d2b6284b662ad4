"""Engines built in a child process: the same engine, the same errors, and a parent that outlives every death."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto as T
from onnx import helper

import qexport.cli
from qexport.errors import BuildFailed, EnvironmentMismatch, NativeCrash, QexportError, ResourceExhausted, UsageError
from qexport.exporter.engines.child import build_in_child
from qexport.exporter.engines.engine import EngineOptions, build_engine, run_support
from qexport.exporter.options import BuildOptions
from qexport.runtime.backends.artefact import load_module
from qexport.safe_io import digest_bytes, digest_file, publish

PROFILE = {"x": ([1, 64], [8, 64], [32, 64])}
LIMIT = 4  # seconds, for a child that hangs; starting Python and onnx takes one


def product(op="MatMul"):
    """A product with weights, or another operator in its place."""
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    values = [helper.make_tensor_value_info(name, T.FLOAT16, ["n", 64]) for name in ("x", "y")]
    node = helper.make_node(op, ["x", "w"], ["y"], name="product")
    graph = helper.make_graph([node], "g", values[:1], values[1:], [onnx.numpy_helper.from_array(weights, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)


def deadly():
    """A model that kills TensorRT-RTX 1.7: query and key are one tensor, behind an Identity."""
    nodes = [
        helper.make_node("Identity", ["q"], ["k"], name="same"),
        helper.make_node("Attention", ["q", "k", "v"], ["y"], name="att", q_num_heads=2, kv_num_heads=2),
    ]
    q, v, y = (helper.make_tensor_value_info(name, T.FLOAT16, [1, 8, 64]) for name in "qvy")
    graph = helper.make_graph(nodes, "g", [q, v], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def save(folder, model):
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def model(tmp_path):
    return save(tmp_path, product())


@pytest.fixture
def plan(tmp_path):
    return tmp_path / "engine.plan"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Put a ``tensorrt`` into the module path whose import runs some code after it has noted its process."""
    package = tmp_path / "modules/tensorrt"
    package.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(package.parent))
    here = "import os, signal, subprocess, sys, time\nfrom pathlib import Path\nHERE = Path(__file__).parent\n"
    noted = "(HERE / 'pid.tmp').write_text(str(os.getpid()))\nos.rename(HERE / 'pid.tmp', HERE / 'pid')\n"

    def write(code):
        (package / "__init__.py").write_text(f"{here}{noted}{code}\n")
        return package

    return write


def builders():
    """Children that build engines; whoever else runs tests may have others."""
    return [child for child in psutil.Process().children() if "qexport.exporter.engines.child" in child.cmdline()]


def gone(*pids):
    """Whether processes are gone, or become so: a process whose parent died is reaped by another."""
    end = time.monotonic() + 5
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def wait_for(path):
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)
    return int(path.read_text())


# ------------------------------------------------------------ TensorRT-RTX, for real


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx")


@pytest.mark.rtx
def test_the_engine_is_the_one_that_is_built_in_process(rtx, model, plan):
    options = EngineOptions(profiles=(PROFILE,), compute_capabilities=("8.6",), workspace=1 << 28)
    here = build_engine(model, rtx, options).info
    there = build_in_child(model, "tensorrt_rtx", options, plan)
    assert there.model_copy(update={"seconds": 0}) == here.model_copy(update={"seconds": 0})
    assert plan.stat().st_size == here.bytes
    assert sorted(path.name for path in plan.parent.iterdir()) == ["engine.plan", "model.onnx"]
    assert builders() == []


@pytest.mark.rtx
def test_progress_comes_to_the_calling_thread_and_only_grows(rtx, model, plan):
    seen, threads = [], set()

    def hear(phase, fraction):
        threads.add(threading.current_thread())
        seen.append((phase, fraction))

    build_in_child(model, "tensorrt_rtx", EngineOptions(profiles=(PROFILE,), progress=hear), plan)
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] < 0.1
    assert 0.5 < fractions[-1] <= 1
    assert len({phase for phase, _ in seen}) > 3
    assert threads == {threading.current_thread()}


@pytest.mark.rtx
def test_a_callback_that_says_no_or_raises_ends_the_child(rtx, model, plan):
    for progress, kind in ((lambda *_: False, BuildFailed), (lambda *_: 1 / 0, ZeroDivisionError)):
        with pytest.raises(kind):
            build_in_child(model, "tensorrt_rtx", EngineOptions(profiles=(PROFILE,), progress=progress), plan)
        assert builders() == []
        assert not plan.exists()


@pytest.mark.rtx
def test_a_refusal_arrives_with_its_class_its_nodes_and_its_hint(rtx, tmp_path, plan):
    path, options = save(tmp_path, product("Foo")), EngineOptions(profiles=(PROFILE,))
    with pytest.raises(BuildFailed) as here:
        build_engine(path, load_module("tensorrt_rtx"), options)
    with pytest.raises(BuildFailed, match=r"product \(Foo\): there is no such operator") as there:
        build_in_child(path, "tensorrt_rtx", options, plan)
    assert vars(there.value) == vars(here.value)
    assert there.value.hint
    with pytest.raises(UsageError, match="'antigravity'"):
        build_in_child(path, "antigravity", options, plan)


@pytest.mark.rtx
def test_weights_may_lie_beside_a_model_in_a_folder_whose_name_is_no_text(rtx, tmp_path, monkeypatch):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    onnx.save(product(), tmp_path / "model.onnx", save_as_external_data=True, location="weights", size_threshold=64)
    for name in ("model.onnx", "weights"):
        os.rename(tmp_path / name, folder / name)
    monkeypatch.chdir(tmp_path)
    options = EngineOptions(profiles=(PROFILE,))
    info = build_in_child(folder.relative_to(tmp_path) / "model.onnx", "tensorrt_rtx", options, Path("engine.plan"))
    assert info.bytes == Path("engine.plan").stat().st_size > 64 * 64


@pytest.mark.rtx
def test_a_model_that_kills_the_builder_is_a_native_crash_and_the_parent_lives(rtx, tmp_path, plan):
    path = save(tmp_path, deadly())
    with pytest.raises(NativeCrash, match="tensorrt_rtx died by SIGSEGV") as caught:
        build_in_child(path, "tensorrt_rtx", EngineOptions(), plan)
    assert caught.value.exit_code == 12
    assert caught.value.where == f"model {digest_file(path)}"
    assert "export.engine=false" in caught.value.hint
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.onnx"]
    assert build_in_child(save(tmp_path, product()), "tensorrt_rtx", EngineOptions(profiles=(PROFILE,)), plan)


@pytest.mark.rtx
def test_a_build_whose_builder_dies_exits_with_12_and_leaves_what_was_there(rtx, tmp_path, capsys):
    recipe = tmp_path / "plain.toml"
    recipe.write_text('name = "plain"\n[export]\ntarget = "tensorrt-rtx"\n')
    out = tmp_path / "out"
    for model, code in ((deadly(), 12), (product(), 0), (deadly(), 12)):
        before = sorted(path.name for path in tmp_path.iterdir())
        kept = digest_file(out / "manifest.json") if out.exists() else None
        path = save(tmp_path, model)
        profile = [] if code else ["--set", "export.profiles={x=[[1,64],[8,64],[32,64]]}"]
        assert qexport.cli.run(["build", str(path), "--recipe", str(recipe), "-o", str(out), *profile]) == code
        if code:
            assert "SIGSEGV" in capsys.readouterr().err
            assert sorted({*before, "model.onnx"}) == sorted(path.name for path in tmp_path.iterdir())
            assert kept is None or digest_file(out / "manifest.json") == kept
    assert (out / "engine.plan").stat().st_size > 0


class Stages:
    """Notes how far each stage came."""

    def __init__(self):
        self.totals, self.done = {}, defaultdict(list)

    @contextmanager
    def stage(self, name, total=None):
        self.totals[name] = total
        yield lambda n=1: self.done[name].append(n)


@pytest.mark.rtx
def test_a_build_hears_how_far_the_engine_is_in_hundredths(rtx, tmp_path):
    stages, profile = Stages(), "export.profiles={x=[[1,64],[8,64],[32,64]]}"
    options = BuildOptions(target="tensorrt-rtx", set=(profile,), output=tmp_path / "out", progress=stages)
    result = qexport.build(save(tmp_path, product()), recipe="float16", options=options)
    assert stages.totals["engine"] == 100
    assert 50 < sum(stages.done["engine"]) <= 100
    assert {type(n) for n in stages.done["engine"]} == {int}
    assert max(stages.done["engine"]) > 1  # some steps are larger than a hundredth
    assert result.files["engine.plan"].bytes == result.engine.bytes
    assert result.files["engine.plan"].digest == digest_file(tmp_path / "out/engine.plan")
    assert result.engine.note == (run_support(rtx) or "")


@pytest.mark.rtx
def test_only_the_child_loads_the_library(rtx, model, plan):
    code = (
        "import sys; from pathlib import Path; from qexport.exporter.engines.engine import EngineOptions\n"
        "from qexport.exporter.engines.child import build_in_child\n"
        f"options = EngineOptions(profiles=({PROFILE!r},))\n"
        f"build_in_child(Path({str(model)!r}), 'tensorrt_rtx', options, Path({str(plan)!r}))\n"
        "assert 'tensorrt_rtx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert plan.exists()


# ------------------------------------------------------------ stand-ins for what native code can do


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", ResourceExhausted, "memory ran out"),
        ("print('std::bad_alloc', file=sys.stderr, flush=True); os.abort()", ResourceExhausted, "memory ran out"),
        ("raise MemoryError", ResourceExhausted, "out of memory"),
        ("os.kill(os.getpid(), signal.SIGBUS)", NativeCrash, "tensorrt died by SIGBUS"),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 5)", NativeCrash, "died by signal"),
        ("print('one\\ntwo', file=sys.stderr, flush=True); os.abort()", NativeCrash, r"SIGABRT[^$]*\n- one\n- two"),
        ("os.write(1, b'careful\\n'); os.abort()", NativeCrash, "careful"),
        ("os._exit(3)", QexportError, "ended with status 3 and no answer"),
        ("raise AttributeError('tools')", QexportError, "AttributeError: tools"),
        ("raise ImportError('libcudart')", EnvironmentMismatch, "tensorrt cannot be imported: libcudart"),
    ],
)
def test_what_a_child_dies_of_is_told(stand_in, model, plan, code, kind, words):
    stand_in(code)
    with pytest.raises(kind, match=words) as caught:
        build_in_child(model, "tensorrt", EngineOptions(), plan)
    assert type(caught.value) is kind
    assert not plan.exists()
    assert builders() == []


def test_only_the_last_words_of_a_talkative_child_are_kept(stand_in, model, plan):
    talk = "b'bad_alloc ' + b'x' * 10**6 + b'\\n' + b'word\\n' * 10**5 + b'the end\\n'"
    stand_in(f"sys.stderr.buffer.write({talk}); sys.stderr.flush(); os.abort()")
    with pytest.raises(NativeCrash, match="the end") as caught:
        build_in_child(model, "tensorrt", EngineOptions(), plan)
    assert len(caught.value.what) < 1000


@pytest.mark.parametrize(
    "code", ["time.sleep(600)", "os.closerange(0, 99); time.sleep(600)"], ids=["asleep", "with everything closed"]
)
def test_a_child_that_hangs_is_ended_in_time_with_all_it_started(stand_in, model, plan, code):
    start = "child = subprocess.Popen(['sleep', '600'])\n(HERE / 'other').write_text(str(child.pid))\n"
    package = stand_in(start + code)
    began = time.monotonic()
    with pytest.raises(ResourceExhausted, match=f"tensorrt did not end within {LIMIT} s"):
        build_in_child(model, "tensorrt", EngineOptions(timeout=LIMIT), plan)
    assert LIMIT <= time.monotonic() - began < LIMIT + 3
    assert gone(int((package / "pid").read_text()), int((package / "other").read_text()))


def test_what_a_dead_child_started_is_ended_too(stand_in, model, plan):
    start = "child = subprocess.Popen(['sleep', '600'])\n"
    package = stand_in(f"{start}(HERE / 'other').write_text(str(child.pid))\nos.abort()")
    with pytest.raises(NativeCrash):
        build_in_child(model, "tensorrt", EngineOptions(), plan)
    assert gone(int((package / "other").read_text()))


def test_ctrl_c_ends_the_child_and_is_raised(stand_in, model, plan):
    package = stand_in("signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)")

    def press():
        wait_for(package / "pid")
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build_in_child(model, "tensorrt", EngineOptions(), plan)
    thread.join()
    assert time.monotonic() - began < 20
    assert gone(int((package / "pid").read_text()))


def test_a_child_ends_with_its_parent(stand_in, model, plan):
    package = stand_in("time.sleep(600)")
    code = (
        "from pathlib import Path; from qexport.exporter.engines.engine import EngineOptions\n"
        "from qexport.exporter.engines.child import build_in_child\n"
        f"build_in_child(Path({str(model)!r}), 'tensorrt', EngineOptions(), Path({str(plan)!r}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as parent:
        child = wait_for(package / "pid")
        parent.kill()
    assert gone(child)


def test_a_missing_module_says_what_to_install(model, plan):
    if "tensorrt" in sys.modules or not missing("tensorrt"):
        pytest.skip("tensorrt is installed")
    with pytest.raises(EnvironmentMismatch, match="tensorrt is not installed") as caught:
        build_in_child(model, "tensorrt", EngineOptions(), plan)
    assert "qexport[tensorrt]" in caught.value.hint


def missing(name):
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False).returncode != 0


def test_the_child_has_the_environment_without_its_secrets_and_no_core_dump(stand_in, model, plan, monkeypatch):
    for name in ("SERVICE_TOKEN", "aws_secret_access_key", "HTTPS_PROXY", "DB_PASSWORD", "LD_NOTHING"):
        monkeypatch.setenv(name, "1")
    stand_in("import resource; raise ImportError(f'{resource.getrlimit(resource.RLIMIT_CORE)} {sorted(os.environ)}')")
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        with pytest.raises(EnvironmentMismatch) as caught:
            build_in_child(model, "tensorrt", EngineOptions(), plan)
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    seen = caught.value.what
    assert "(0, 0)" in seen
    assert "'LD_NOTHING'" in seen
    assert "'PATH'" in seen
    for name in ("SERVICE_TOKEN", "aws_secret_access_key", "HTTPS_PROXY", "DB_PASSWORD"):
        assert name not in seen


def test_modules_beside_the_model_are_not_imported(stand_in, model, plan):
    stand_in("raise ImportError('it came to the right one')")
    (model.parent / "onnx.py").write_text("raise SystemExit('the wrong one')")
    (model.parent / "tensorrt.py").write_text("raise SystemExit('the wrong one')")
    with pytest.raises(EnvironmentMismatch, match="the right one"):
        build_in_child(model, "tensorrt", EngineOptions(), plan)


def test_a_stage_adopts_what_another_process_wrote(tmp_path):
    with publish(tmp_path / "out") as stage:
        (stage.path / "engine.plan").write_bytes(b"native code")
        stage.adopt("engine.plan")
        assert stage.files == {"engine.plan": (11, digest_bytes(b"native code"))}
        with pytest.raises(UsageError, match="not a new file name"):
            stage.adopt("engine.plan")
        with pytest.raises(UsageError, match="not a new file name"):
            stage.adopt("../engine.plan")
        stage.write_text("manifest.json", "{}")
    assert (tmp_path / "out/engine.plan").read_bytes() == b"native code"
