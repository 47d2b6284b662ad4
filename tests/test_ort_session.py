"""Sessions over onnxruntime: arrays and tensors of other libraries in, on the processor and on a fake GPU."""

from __future__ import annotations

import gc
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import fake_ort
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from cached_models import VOCABULARY, Tiny, portable, serialized
from helpers import model_from

from qexport.errors import BuildFailed, DataInvalid, EnvironmentMismatch, UsageError
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.decoder import Decoder
from qexport.runtime.session import SessionOptions

ONE = SessionOptions(threads=1)
GPU = SessionOptions(threads=1, providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
GRAPHS = SessionOptions(threads=1, providers=GPU.providers, graphs=True, device=1)
SUM = ir.to_proto(model_from("g (float[n] a, float[n] b) => (float[n] c) { c = Add(a, b) }")).SerializeToString()
A, B = np.arange(3, dtype=np.float32), np.full(3, 10, np.float32)
TINY = serialized(portable(Tiny(positions=300)))
IDS = np.random.default_rng(7).integers(0, VOCABULARY, (3, 60))


class Tensor:
    """A tensor of another library, which gives nothing but DLPack."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.device = array, device

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.device


def on_gpu(model=SUM, options=GPU):
    return OrtSession(model, options, module=fake_ort.module())


@pytest.fixture(params=["cpu", "gpu"])
def session(request):
    return OrtSession(SUM, ONE) if request.param == "cpu" else on_gpu()


def test_arrays_and_tensors_of_the_processor_may_be_fed(session):
    for value in (A, Tensor(A), onnxruntime.OrtValue.ortvalue_from_numpy(A)):
        np.testing.assert_array_equal(session.run({"a": value, "b": B})["c"], A + B)
    np.testing.assert_array_equal(session.run({"a": A[::-1], "b": B})["c"], A[::-1] + B)


def test_a_tensor_on_the_gpu_is_read_where_it_lies():
    found = on_gpu().run_dlpack({"a": Tensor(A, (2, 0)), "b": B})["c"]
    assert found.__dlpack_device__() == (2, 0)
    np.testing.assert_array_equal(found.array, A + B)


def test_a_tensor_that_lies_elsewhere_is_refused():
    with pytest.raises(DataInvalid, match="input 'a' lies on GPU 0, the session runs on the CPU"):
        OrtSession(SUM, ONE).run({"a": Tensor(A, (2, 0)), "b": B})
    with pytest.raises(DataInvalid, match="input 'a' lies on GPU 1, the session runs on GPU 0"):
        on_gpu().run({"a": Tensor(A, (2, 1)), "b": B})
    with pytest.raises(DataInvalid, match="device of kind 8"):
        on_gpu().run({"a": Tensor(A, (8, 0)), "b": B})


def test_what_comes_out_can_go_to_other_libraries(session):
    found = session.run_dlpack({"a": A, "b": B})["c"]
    assert found.__dlpack_device__()[0] == (2 if session.backend == "ort-cuda" else 1)
    np.testing.assert_array_equal(np.from_dlpack(Tensor(getattr(found, "array", found))), A + B)


@pytest.mark.torch
def test_tensors_of_torch_go_in_and_out():
    torch = pytest.importorskip("torch")
    found = OrtSession(SUM, ONE).run_dlpack({"a": torch.arange(3.0), "b": torch.full((3,), 10.0)})["c"]
    assert torch.from_dlpack(found).tolist() == [10, 11, 12]


HOLDING = """
import sys
from pathlib import Path
import numpy as np, onnx_ir as ir
from qexport.calibration.running.execute import open_model

def held():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

model = ir.from_onnx_text(sys.argv[1])
table = np.random.default_rng(0).random((1 << 18, 64), np.float32)  # 67 MB
w = next(iter(model.graph)).inputs[0]
w.const_value = ir.Tensor(table, name="w")
w.shape, w.type = ir.Shape(table.shape), ir.TensorType(ir.DataType.FLOAT)
model.graph.register_initializer(w)
sessions = [open_model(model)]  # what the library takes for itself
before = held()
sessions += [open_model(model) for _ in range(3)]
rows = np.array([0, 7, (1 << 18) - 1])
assert all((session.run({"x": rows})["y"] == table[rows]).all() for session in sessions)
print(held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory")
def test_sessions_read_the_weights_where_they_lie():
    text = '<ir_version: 10, opset_import: ["" : 18]> g (int64[n] x) => (float[n, 64] y) { y = Gather(w, x) }'
    ended = subprocess.run([sys.executable, "-c", HOLDING, text], check=True, capture_output=True, text=True)
    assert int(ended.stdout) < 40e6  # of the 201 MB of three copies


def test_no_outputs_are_none(session):
    assert session.run({"a": A, "b": B}, []) == {}


def test_an_input_that_is_missing_or_wrong_is_told(session):
    with pytest.raises(DataInvalid, match="input 'b' is missing"):
        session.run({"a": A})
    with pytest.raises(DataInvalid, match="input 'b' is missing"):
        session.run_dlpack({"a": A})
    with pytest.raises(BuildFailed, match="onnxruntime failed"):
        session.run({"a": A, "b": B.astype(np.float64)})


def test_a_session_that_cannot_be_made_is_no_other_one_and_stdout_stays_empty(monkeypatch, capfd):
    tries = []

    def create(self, providers, *_):
        tries.append(providers)
        raise RuntimeError("no threads")

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", create)
    with pytest.raises(BuildFailed, match="cannot load the model: no threads"):
        OrtSession(SUM, ONE)
    assert len(tries) == 1
    assert capfd.readouterr().out == ""


def test_a_session_runs_in_several_threads_at_once():
    session = OrtSession(SUM, ONE)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(session.run, {"a": A + place, "b": B}) for place in range(40)]
    for place, job in enumerate(jobs):
        np.testing.assert_array_equal(job.result()["c"], A + B + place)


def test_without_the_provider_a_gpu_is_not_taken(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EnvironmentMismatch, match=r"no CUDAExecutionProvider .*qexport\[gpu\]"):
        OrtSession(SUM, GPU)


@pytest.mark.parametrize(("options", "graph"), [(GPU, "0"), (GRAPHS, "1")])
def test_the_provider_is_told_of_gpu_and_graphs(options, graph):
    on_gpu(options=options)
    (name, settings), other = fake_ort.InferenceSession.made.providers
    assert (name, other) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert settings == {"device_id": str(options.device), "enable_cuda_graph": graph}


# ------------------------------------------------------------ decoders


@pytest.mark.parametrize("options", [GPU, GRAPHS], ids=["eager", "graphs"])
def test_a_decoder_on_the_gpu_is_one_on_the_processor(options):
    pair = Decoder(on_gpu(TINY, options), capacity=16), Decoder(TINY, ONE, capacity=16)

    def both(ids, counts=None):
        found, truth = (decoder.extend(ids, counts) for decoder in pair)
        for row, count in enumerate(counts or [ids.shape[1]] * len(ids)):
            np.testing.assert_array_equal(found[row, :count], truth[row, :count])

    for decoder in pair:
        decoder.reset(3)
    both(IDS[:, :9], [9, 4, 0])
    for at in range(9, 13):
        both(IDS[:, [at]])
    for decoder in pair:
        decoder.rollback([11, 8, 2])
    both(IDS[:, 20:25])
    both(IDS[:, 25:45])
    for decoder in pair:
        decoder.keep([2, 1])
    both(IDS[:2, 45:46])
    both(IDS[:2, 46:47], [1, 0])
    for decoder in pair:
        decoder.reset(2)
    both(IDS[:2, :9])
    assert pair[0].capacity == pair[1].capacity


def test_a_context_is_put_on_the_gpu_once():
    model = serialized(portable(Tiny(positions=300), extra=True))
    pair = Decoder(on_gpu(model)), Decoder(model, ONE)
    bias = np.random.default_rng(0).standard_normal((3, VOCABULARY)).astype(np.float32)
    for decoder in pair:
        decoder.reset(3, {"bias": bias})
        decoder.extend(IDS[:, :5])
        decoder.keep([2, 0])
    found, truth = (decoder.extend(IDS[:2, 5:7]) for decoder in pair)
    np.testing.assert_array_equal(found, truth)


def test_what_was_recorded_is_given_back_and_memory_too():
    gc.collect()
    before = fake_ort.OrtValue.alive
    with Decoder(on_gpu(TINY, GRAPHS)) as made:
        session = fake_ort.InferenceSession.made
        made.extend(IDS[:1, :40])
        for at in range(40, 45):
            made.extend(IDS[:1, [at]])
        assert session.runs[:2] == [-1, -1]
        assert len(session.recorded) == 1
        made.keep([0])
        made.extend(IDS[:1, [45]])
        assert fake_ort.OrtValue.alive > before
    assert set(session.recorded) <= set(session.released)
    made.close()
    gc.collect()
    assert fake_ort.OrtValue.alive == before


def test_single_runs_are_never_recorded():
    session = on_gpu(options=GRAPHS)
    session.run({"a": A, "b": B})
    assert fake_ort.InferenceSession.made.runs == [-1]


@pytest.mark.parametrize("asked", [{"providers": ()}, {"providers": None}, {"providers": "CPU"}, {"disabled": [1]}])
def test_names_that_are_none_are_refused_by_name(asked):
    with pytest.raises(UsageError, match=f"{next(iter(asked))} is .*, expected a tuple of names"):
        SessionOptions(**asked)
    assert SessionOptions(disabled=()).disabled == ()
