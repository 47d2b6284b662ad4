"""What calibration noted and passes left behind after they changed a weight or a value is still true."""

import numpy as np
import pytest
from channel_models import build
from helpers import Samples

from qexport.calibration.awq import Awq
from qexport.calibration.calibrate import Calibrate
from qexport.calibration.correct import CorrectBias
from qexport.calibration.extremes import Extremes
from qexport.calibration.observe import Observe
from qexport.calibration.running.execute import open_model
from qexport.passes.equalize import Equalize
from qexport.passes.numbers.extreme import EXTREME_KEY
from qexport.passes.numbers.notes import KERNEL_KEY
from qexport.passes.numbers.range import RANGE_KEY, SQNR_KEY
from qexport.passes.quantize import Quantize
from qexport.passes.shift import Shift
from qexport.passes.smooth import Smooth

RNG = np.random.default_rng(0)
SPREAD = 10.0 ** np.linspace(-1.5, 1.5, 32)
TOKENS = {"inputs": "float[n, s, 32] x", "outputs": "float[n, s, 32] y", "w": "32x32", "b": "32"}
IMAGES = {"inputs": "float[n, 32, 7, 7] x", "outputs": "float[n, 32, p, q] y", "w": "32x32x1x1", "b": "32"}
WIDE = (RNG.standard_normal((32, 32)) * SPREAD).astype(np.float32)
RESIDUAL = "h = LayerNormalization(x, g, c) m = MatMul(h, w) a = Add(m, b) s = Add(h, a) t = Tanh(s) y = MatMul(t, v)"
TWO = "u = MatMul(x, w) a = Add(u, b) r = Relu(a) m = MatMul(r, v) e = Add(m, b) t = Tanh(e) y = MatMul(t, w)"
GELU = "u = MatMul(x, w) k = Add(u, b) h = Gelu(k) m = MatMul(h, v) a = Add(m, b) t = Tanh(a) y = MatMul(t, w)"
CONVS = "a = Conv(x, w, b) r = Relu(a) t = Conv(r, v, b) e = Tanh(t) y = Conv(e, w, b)"
NORM = {"g": SPREAD.astype(np.float32), "c": (9 * RNG.standard_normal(32)).astype(np.float32)}
CASES = {
    "shift, through a sum": (Shift(), RESIDUAL, TOKENS | NORM | {"v": "32x32"}),
    "shift, a Sub left": (Shift(), GELU, TOKENS | {"v": "32x32"}),
    "smooth": (Smooth(alpha=0.5), TWO, TOKENS | {"w": WIDE, "v": "32x32"}),
    "smooth, a copy of the norm": (Smooth(alpha=0.5), RESIDUAL, TOKENS | NORM | {"v": "32x32"}),
    "smooth, a Mul left": (Smooth(alpha=0.5, mul=True), GELU, TOKENS | {"v": "32x32"}),
    "awq": (Awq, TWO, TOKENS | {"w": WIDE, "v": "32x32"}),
    "equalize": (Equalize(), CONVS, IMAGES | {"w": WIDE.T[:, :, None, None].copy(), "v": "32x32x1x1"}),
}


@pytest.fixture(params=CASES)
def case(request):
    """The pass, the model and its samples."""
    step, body, constants = CASES[request.param]
    model = build(body, **constants)
    shape = (32, 7, 7) if "Conv" in body else (6, 32)
    data = Samples({"x": RNG.standard_normal(shape).astype(np.float32) + 2} for _ in range(16))
    return Awq(data=data, group=16, gain=0.0) if step is Awq else step, model, data


def calibrated(model, data):
    for step in (Observe(data=data), Extremes(data=data), Calibrate(data=data, method="minmax")):
        step(model)


def answers(model, data):
    session = open_model(model)
    return np.concatenate([session.run({"x": sample["x"][None]})["y"] for sample in data])


def test_notes_that_are_left_are_what_would_be_noted_now(case):
    step, model, data = case
    calibrated(model, data)
    assert step(model).modified
    fresh = model.clone()
    calibrated(fresh, data)
    kept = 0
    for node, again in zip(model.graph, fresh.graph, strict=True):
        if KERNEL_KEY in node.meta:
            assert np.array_equal(node.meta[KERNEL_KEY].numpy(), node.inputs[1].const_value.numpy())
        if SQNR_KEY in node.meta:
            assert node.meta[SQNR_KEY] == pytest.approx(again.meta[SQNR_KEY], abs=0.05)
        (value,), (now,) = node.outputs, again.outputs
        if EXTREME_KEY in value.meta:
            assert value.meta[EXTREME_KEY] == pytest.approx(now.meta[EXTREME_KEY], rel=1e-4)
        if RANGE_KEY in value.meta:
            old, new = value.meta[RANGE_KEY], now.meta[RANGE_KEY]
            assert (old.low, old.high) == pytest.approx((new.low, new.high), rel=1e-4, abs=1e-4)
        kept += sum(key in (*node.meta, *value.meta) for key in (KERNEL_KEY, SQNR_KEY, EXTREME_KEY, RANGE_KEY))
    assert kept > 3  # what did not change is not forgotten


def test_no_bias_is_corrected_by_the_difference_to_a_weight_of_another_scale(case):
    step, model, data = case
    truth = answers(model, data)
    calibrated(model, data)
    step(model)
    Quantize(min_sqnr=-100.0)(model)
    before = np.linalg.norm(answers(model, data) - truth)
    assert before > 0  # something was quantized
    CorrectBias(data=data)(model)
    assert np.linalg.norm(answers(model, data) - truth) < 1.2 * before
