"""Sessions over engines: what is loaded, single runs, tensors in and out, and the names of the real libraries."""

from __future__ import annotations

import ast
import gc
import importlib
from pathlib import Path
from types import ModuleType

import fake_cuda
import fake_tensorrt
import numpy as np
import onnxruntime
import pytest
from cached_models import VOCABULARY, Tiny, portable, serialized
from fake_cuda import FakeCuda
from fake_tensorrt import EngineValidity, Library, plan_of

import qexport
from qexport.errors import BuildFailed, DataInvalid, EnvironmentMismatch, UsageError
from qexport.exporter.engines import engine
from qexport.exporter.engines.engine import EngineOptions, build_engine
from qexport.runtime.backends import dlpack
from qexport.runtime.backends.cuda import Cuda, CudaMemory, open_cuda
from qexport.runtime.backends.gpus import Gpu
from qexport.runtime.backends.tensorrt import EngineSession
from qexport.runtime.session import SessionOptions

MODEL = serialized(portable(Tiny(positions=300)))
SIZES = ({"batch": (1, 2, 4), "sequence": (1, 4, 8)}, {"batch": (1, 1, 1), "sequence": (1, 1, 2)})
PLAN = plan_of(MODEL, 16, SIZES)
CALL = {
    "input_ids": np.array([[3, 1, 4], [1, 5, 9]]),
    "position_ids": np.tile(np.arange(3), (2, 1)),
    "write_indices": np.zeros(2, np.int64),
    **{
        f"past_key_values.{i}.{kind}": np.zeros((2, 2, 16, 8), np.float32)
        for i in range(2)
        for kind in ("key", "value")
    },
}
TRUTH = onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])


@pytest.fixture
def gpu():
    return FakeCuda()


@pytest.fixture
def library(gpu):
    return Library(gpu)


@pytest.fixture
def session(gpu, library):
    return EngineSession(PLAN, library.module(), Cuda(gpu.module(), 1), SessionOptions(device=1))


def test_ports_profiles_and_the_gpu_are_those_of_the_engine(session, gpu):
    assert session.inputs[:3] == ("input_ids", "position_ids", "write_indices")
    assert session.outputs[0] == "logits"
    ports = {port.name: port for port in (*session.ports, *session.results)}
    assert ports["past_key_values.0.key"].shape == (None, 2, 16, 8)
    assert (ports["logits"].kind, ports["logits"].shape) == ("tensor(float)", (None, None, VOCABULARY))
    assert session.profiles[0]["input_ids"] == ((1, 1), (2, 4), (4, 8))
    assert set(gpu.devices) == {1}


def test_a_single_run_gives_what_onnxruntime_gives(session):
    truth = dict(zip([port.name for port in TRUTH.get_outputs()], TRUTH.run(None, CALL), strict=True))
    found = session.run(CALL)
    assert found.keys() == truth.keys()
    for name, array in truth.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5)
    (name,) = session.run(CALL, ["present.1.key"])
    assert name == "present.1.key"


def test_the_tightest_profile_is_taken(session, library):
    for batch, width, profile in ((1, 1, 1), (1, 2, 1), (1, 3, 0), (2, 1, 0), (4, 8, 0)):
        shapes = {name: (batch, *array.shape[1:]) for name, array in CALL.items()}
        shapes |= dict.fromkeys(("input_ids", "position_ids"), (batch, width))
        assert session.find_profile(shapes) == profile
    with pytest.raises(DataInvalid, match=r"no profile for input_ids \[2, 9\]"):
        session.run({**CALL, "input_ids": np.zeros((2, 9), np.int64), "position_ids": np.zeros((2, 9), np.int64)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": None}, "input 'input_ids' is missing"),
        ({"input_ids": CALL["input_ids"].astype(np.int32)}, r"'input_ids' is int32, the engine reads tensor\(int64\)"),
        ({"past_key_values.0.key": np.zeros((2, 2, 17, 8), np.float32)}, "the engine has no profile"),
        ({"write_indices": np.zeros((2, 1), np.int64)}, "the engine has no profile"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_runs(session, library, change, words):
    feeds = {name: array for name, array in {**CALL, **change}.items() if array is not None}
    for run in (session.run, session.run_dlpack):
        with pytest.raises(DataInvalid, match=words):
            run(feeds)
    assert not any(context.runs for context in library.contexts)


def test_outputs_must_have_room_for_what_is_written(session):
    names = [name for name in CALL if name.startswith("past")]
    for logits, words in (
        (np.zeros((2, 3, VOCABULARY - 1), np.float32), r"output 'logits' is float32 \[2, 3, 50\], the array for it is"),
        (np.zeros((2, 3, VOCABULARY), np.float16), "the array for it is float16"),
        (np.zeros((2, 3, 2 * VOCABULARY), np.float32)[:, :, ::2], "does not lie in one piece"),
    ):
        with pytest.raises(DataInvalid, match=words):
            session.bind(CALL, {"logits": logits})
    buffers = {name: session.memory.put(CALL[name]) for name in names}
    with pytest.raises(DataInvalid, match=r"output 'present.0.key' is written over input 'past_key_values.0.key'"):
        session.bind({**CALL, **buffers}, {"present.0.key": buffers["past_key_values.0.value"]})
    with pytest.raises(DataInvalid, match="no output called 'y'"):
        session.run(CALL, ["y"])


def test_a_binding_reads_what_its_arrays_hold_at_each_run(session):
    feeds = {name: array.copy() for name, array in CALL.items()}
    logits = np.zeros((2, 3, VOCABULARY), np.float32)
    binding = session.bind(feeds, {"logits": logits})
    for shift in range(3):
        feeds["input_ids"][...] = (CALL["input_ids"] + shift) % VOCABULARY
        binding.run()
        (truth,) = TRUTH.run(["logits"], feeds)
        np.testing.assert_allclose(logits, truth, rtol=0, atol=1e-5)
    binding.close()
    binding.close()
    with pytest.raises(UsageError, match="the binding is closed"):
        binding.run()


# ------------------------------------------------------------ loading


def test_what_the_library_cannot_load_is_told_with_its_words(gpu, library):
    with pytest.raises(BuildFailed, match="tensorrt-rtx cannot load the engine: magic tag does not match"):
        EngineSession(b"junk", library.module(), Cuda(gpu.module()))


@pytest.mark.parametrize(("flags", "words"), [(3, "version mismatch, unsupported cc"), (0, "no GPU that it knows")])
def test_what_the_library_finds_invalid_is_not_loaded(gpu, library, flags, words):
    library.validity = EngineValidity.INVALID, flags
    with pytest.raises(EnvironmentMismatch, match=words):
        EngineSession(b"junk", library.module(), Cuda(gpu.module()))


def test_without_the_cuda_runtime_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(EnvironmentMismatch, match=r"qexport\[cuda\]"):
        open_cuda()


def test_a_session_that_is_closed_runs_nothing(session):
    binding = session.bind(CALL, {})
    session.close()
    for use in (binding.run, lambda: session.run(CALL), lambda: session.bind(CALL, {})):
        with pytest.raises(UsageError, match="the session is closed"):
            use()


# ------------------------------------------------------------ buffers and tensors


def test_rows_move_on_the_gpu_as_on_the_processor(gpu):
    memory = CudaMemory(Cuda(gpu.module()))
    array = np.random.default_rng(0).standard_normal((3, 2, 5, 4)).astype(np.float16)
    buffer = memory.put(array)
    moved = memory.put(np.full((2, 2, 9, 4), np.nan, np.float16))
    memory.copy(buffer, moved, [2, 0], [5, 3])
    memory.free(buffer)
    found = np.frombuffer(gpu.view(moved.address, moved.nbytes), np.float16).reshape(moved.shape)
    expected = np.zeros((2, 2, 9, 4), np.float16)
    expected[0, :, :5], expected[1, :, :3] = array[2], array[0, :, :3]
    np.testing.assert_array_equal(found, expected)
    assert gpu.used == moved.nbytes
    memory.clear(moved, 5)
    assert not np.frombuffer(gpu.view(moved.address, moved.nbytes), np.float16).any()
    memory.free(moved)
    memory.free(moved)
    assert gpu.used == 0


def test_a_tensor_on_the_gpu_goes_through_without_a_copy(session, gpu):
    first = session.run_dlpack(CALL, ["logits", "present.0.key"])
    assert first["logits"].__dlpack_device__() == (2, 1)
    again = session.run_dlpack({**CALL, "past_key_values.0.key": first["present.0.key"]}, ["present.0.key"])
    assert again["present.0.key"]._buffer.address == first["present.0.key"]._buffer.address
    other = dlpack.DeviceTensor(first["logits"]._buffer, 0)
    with pytest.raises(DataInvalid, match="lies on another device than the session, which runs on GPU 1"):
        session.run({**CALL, "past_key_values.0.key": other})


def test_what_is_on_the_gpu_lives_as_long_as_somebody_has_it(session, gpu):
    before = gpu.used
    found = session.run_dlpack(CALL, ["logits"])["logits"]
    capsule = found.__dlpack__()
    del found
    gc.collect()
    assert gpu.used > before
    del capsule
    gc.collect()
    assert gpu.used == before


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.uint8, np.bool_])
def test_numpy_reads_the_capsules_and_we_read_numpy_s(monkeypatch, gpu, dtype):
    """On the memory of the processor, which is the fake GPU's as well; numpy stands for all other libraries."""
    monkeypatch.setattr(dlpack, "_CUDA", 1)
    array = np.random.default_rng(0).integers(0, 2, (2, 3, 4)).astype(dtype)
    buffer = CudaMemory(Cuda(gpu.module())).put(array)
    theirs = np.from_dlpack(dlpack.DeviceTensor(buffer, 0))
    np.testing.assert_array_equal(theirs, array)
    del buffer
    gc.collect()
    np.testing.assert_array_equal(theirs, array)
    del theirs
    gc.collect()
    assert gpu.used == 0

    class Tensor:
        def __dlpack_device__(self):
            return 1, 0

        def __dlpack__(self, *, stream):
            return given.__dlpack__()

    given = array[1:]
    ours = dlpack.read_tensor("x", Tensor(), 0, 5)
    assert (ours.address, ours.shape, ours.dtype) == (given.ctypes.data, (1, 3, 4), array.dtype)
    given = array[:, ::2]
    with pytest.raises(DataInvalid, match="does not lie in one piece"):
        dlpack.read_tensor("x", Tensor(), 0, 5)


# ------------------------------------------------------------ the names of the real libraries

SOURCES = Path(qexport.__file__).parent / "runtime/backends"
OBJECTS = {
    "module": "",
    "_module": "",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "context": "IExecutionContext",
    "runtime": "Runtime",
    "_runtime": "Runtime",
    "config": "IRuntimeConfig",
}


def used_names():
    """(Class, attribute) of all that our code asks of TensorRT."""
    for name in ("tensorrt", "lanes", "engine_binding"):
        for node in ast.walk(ast.parse((SOURCES / f"{name}.py").read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                if owner in OBJECTS and not node.attr.startswith("__"):
                    yield OBJECTS[owner], node.attr


@pytest.mark.rtx
def test_all_that_is_asked_of_tensorrt_exists_there():
    real = pytest.importorskip("tensorrt_rtx")
    names = set(used_names())
    assert {("ICudaEngine", "get_tensor_profile_shape"), ("IExecutionContext", "execute_async_v3")} <= names
    missing = [(owner, name) for owner, name in names if not hasattr(getattr(real, owner) if owner else real, name)]
    assert missing == []


@pytest.mark.rtx
def test_the_fake_has_no_more_than_the_real_library():
    real, fake = pytest.importorskip("tensorrt_rtx"), Library(FakeCuda()).module()
    for name in dir(fake):
        if name.startswith("__"):
            continue
        kind = getattr(real, name)
        members = [member for member in vars(getattr(fake, name)) if not member.startswith("_")]
        assert [member for member in members if not hasattr(kind, member)] == []
        for member in members if hasattr(kind, "__members__") else ():
            assert int(getattr(kind, member)) == int(getattr(getattr(fake, name), member))
    for kind in (fake_tensorrt.ICudaEngine, fake_tensorrt.IExecutionContext, fake_tensorrt.IRuntimeConfig):
        members = [name for name in vars(kind) if not name.startswith("_")]
        assert [name for name in members if not hasattr(getattr(real, kind.__name__), name)] == []


def test_all_that_is_asked_of_the_cuda_runtime_exists_there():
    tree = ast.parse((SOURCES / "cuda.py").read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    names = {text for text in texts if text.startswith("cuda") and text.isalnum()}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("cuda")}
    asked = {name for name in names if name not in {"cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"}}
    fake = FakeCuda().module()
    kinds = {name for kind in (fake_cuda.Kind, fake_cuda.Mode) for name in kind.__members__}
    assert [name for name in asked - kinds if not hasattr(fake, name)] == []
    assert len(asked) > 15
    real = pytest.importorskip("cuda.bindings.runtime")
    assert [name for name in asked - kinds if not hasattr(real, name)] == []
    assert all(hasattr(real.cudaMemcpyKind, name) for name in fake_cuda.Kind.__members__)
    assert all(hasattr(real.cudaStreamCaptureMode, name) for name in fake_cuda.Mode.__members__)
    codes = {int(getattr(real.cudaError_t, name)): name for name in fake_cuda.Error.__members__}
    assert codes == {int(error): name for name, error in fake_cuda.Error.__members__.items()}


def test_no_backend_is_imported_with_the_package():
    for name in (
        "choose",
        "tensorrt",
        "cuda",
        "dlpack",
        "lanes",
        "engine_binding",
        "ort",
        "ort_cuda",
        "artefact",
        "gpus",
    ):
        source = (SOURCES / f"{name}.py").read_text()
        imported = {
            line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))
        }
        assert imported.isdisjoint({"onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "torch"})
        importlib.import_module(f"qexport.runtime.backends.{name}")


@pytest.mark.rtx
def test_an_engine_that_is_built_says_what_a_decoder_has_to_know():
    real = pytest.importorskip("tensorrt_rtx")
    sizes = {"batch": (1, 1, 1), "sequence": (1, 4, 8), "max_seq": (16, 16, 16)}
    model = portable(Tiny(positions=300))
    profile = {
        value.name: tuple(
            [size if isinstance(size, int) else sizes[str(size)][end] for size in value.shape] for end in range(3)
        )
        for value in model.graph.inputs
    }
    options = EngineOptions(profiles=(profile,), frozen=(("max_seq", 16),), compute_capabilities=("8.6",))
    info = build_engine(MODEL, real, options).info
    assert info.metadata == {"qexport.max_positions": "300"}
    assert info.compute_capabilities == ("8.6",)


def test_the_gpu_that_an_engine_was_built_on_is_noted_where_it_runs_on_no_other(monkeypatch):
    monkeypatch.setattr(engine, "find_gpus", lambda: (Gpu("test", "9.0", 1 << 30),))
    standard, rtx = ModuleType("tensorrt"), ModuleType("tensorrt_rtx")
    rtx.ComputeCapability = object
    assert engine._built_for(standard, ()) == ("9.0",)
    assert engine._built_for(rtx, ("current",)) == ("9.0",)
    assert engine._built_for(rtx, ()) == ()
    assert engine._built_for(rtx, ("8.6", "8.9")) == ("8.6", "8.9")
