"""The same decoders on a GPU that is there: onnxruntime's CUDA provider, engines of TensorRT-RTX and TensorRT."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from cached_models import VOCABULARY, Tiny, portable, serialized

from qexport.errors import EnvironmentMismatch
from qexport.exporter.engines.engine import EngineOptions, build_engine
from qexport.exporter.engines.profiles import derive_profile
from qexport.runtime.backends.cuda import open_cuda
from qexport.runtime.backends.gpus import find_gpus
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.backends.tensorrt import EngineSession
from qexport.runtime.decoder import Decoder
from qexport.runtime.session import SessionOptions

COLUMNS = 64
TINY = Tiny(positions=COLUMNS)
MODEL = portable(TINY)
BYTES = serialized(MODEL)
IDS = np.random.default_rng(7).integers(0, VOCABULARY, (3, COLUMNS))


def has_gpu():
    try:
        return bool(find_gpus())
    except EnvironmentMismatch:
        return False


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="there is no GPU")]
KINDS = [(name, graphs) for name in ("ort-cuda", "tensorrt_rtx", "tensorrt") for graphs in (False, True)]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}{'-graphs' if kind[1] else ''}")
def session(request):
    name, graphs = request.param
    options = SessionOptions(threads=1, graphs=graphs)
    if name == "ort-cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("onnxruntime has no CUDA provider")
        providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
        yield OrtSession(BYTES, SessionOptions(threads=1, graphs=graphs, providers=providers))
        return
    module = pytest.importorskip(name)
    pytest.importorskip("cuda.bindings.runtime")
    fixed = {"max_seq": COLUMNS}
    profiles = tuple(
        derive_profile(MODEL.graph.inputs, [{"input_ids": (1,)}], limit=limit, max_batch=3, fixed=fixed)
        for limit in (32, 8)
    )
    engine = build_engine(BYTES, module, EngineOptions(profiles=profiles, frozen=tuple(fixed.items())))
    made = EngineSession(engine.plan, module, open_cuda(), options, engine.info.metadata)
    yield made
    made.close()


def close(found, truth):
    np.testing.assert_allclose(found, truth, rtol=0, atol=2e-2 * np.abs(truth).max())


def test_a_prompt_steps_ways_back_pieces_and_rows_that_are_kept(session):
    with Decoder(session) as made, Decoder(BYTES, SessionOptions(threads=1)) as other:
        for decoder in (made, other):
            decoder.reset(3)
        calls = [(IDS[:, :40], [40, 9, 17]), *((IDS[:, [at]], None) for at in range(40, 46)), (IDS[:, 46:51], None)]
        for ids, counts in calls:
            found, truth = (decoder.extend(ids, counts) for decoder in (made, other))
            for row, count in enumerate(counts or [ids.shape[1]] * 3):
                close(found[row, :count], truth[row, :count])
        for decoder in (made, other):
            decoder.rollback([47, 12, 20])
            decoder.keep([2, 0])
        for at in range(5):
            close(*(decoder.extend(IDS[:2, at : at + 3]) for decoder in (made, other)))


def test_decoders_run_side_by_side(session):
    if session.backend == "ort-cuda":
        pytest.skip("onnxruntime runs one call at a time on a GPU")
    truth = [Decoder(BYTES, SessionOptions(threads=1)).extend(row[None, :40])[0] for row in IDS]

    def decode(row):
        with Decoder(session) as made:
            parts = [made.extend(IDS[row : row + 1, :12])]
            return np.concatenate([*parts, *(made.extend(IDS[row : row + 1, [at]]) for at in range(12, 40))], 1)[0]

    with ThreadPoolExecutor(3) as pool:
        for row, logits in enumerate(pool.map(decode, [0, 1, 2] * 2)):
            close(logits, truth[row % 3])


def test_a_tensor_of_torch_on_the_gpu_goes_in_and_out(session):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no GPU")
    feeds = {"input_ids": IDS[:1, :3], "position_ids": np.arange(3)[None], "write_indices": np.zeros(1, np.int64)}
    feeds |= {port.name: np.zeros((1, 2, COLUMNS, 8), np.float32) for port in session.ports if len(port.shape) == 4}
    truth = session.run(feeds, ["logits"])["logits"]
    on_gpu = {name: torch.from_numpy(array).cuda() for name, array in feeds.items()}
    found = session.run_dlpack(on_gpu, ["logits"])["logits"]
    close(torch.from_dlpack(found).cpu().numpy(), truth)


def test_caches_of_16_bits_stay_close():
    name = "tensorrt_rtx"
    module = pytest.importorskip(name)
    pytest.importorskip("cuda.bindings.runtime")
    model = portable(TINY, ir.DataType.FLOAT16)
    fixed = {"max_seq": COLUMNS}
    profile = derive_profile(model.graph.inputs, [{"input_ids": (1,)}], limit=16, max_batch=1, fixed=fixed)
    engine = build_engine(serialized(model), module, EngineOptions(profiles=(profile,), frozen=tuple(fixed.items())))
    made = Decoder(EngineSession(engine.plan, module, open_cuda()))
    close(made.extend(IDS[:1, :16]), Decoder(BYTES).extend(IDS[:1, :16]))
