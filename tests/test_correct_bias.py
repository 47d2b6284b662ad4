import numpy as np
import onnx_ir as ir
import pytest
from helpers import Samples, model_from
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.calibration.calibrate import Calibrate
from qexport.calibration.correct import CorrectBias, correction
from qexport.calibration.running.execute import open_model
from qexport.calibration.running.literal import dequantized
from qexport.errors import UsageError
from qexport.passes.numbers.range import RANGE_KEY, Range
from qexport.passes.quantize import Quantize
from qexport.passes.writing.bias import NO_BIAS
from qexport.runtime.session import SessionOptions

RNG = np.random.default_rng(0)
PLAIN = "g (float[n, s, 32] x) => (float[n, s, 24] y) { h = MatMul(x, w)  y = Add(h, b) }"


def normal(*shape, rng=RNG):
    return rng.standard_normal(shape).astype(np.float32)


def skewed(*shape, rng=RNG):
    """Values that rounding shifts: most lie between two steps of a coarse range, on the same side of the middle."""
    return (0.3 + 0.03 * rng.standard_normal(shape)).astype(np.float32)


def samples(count=40, shape=(32,), make=skewed, rng=RNG):
    return Samples({"x": make(int(rng.integers(1, 12)), *shape, rng=rng)} for _ in range(count))


def quantized(model, data, span=None, target="tensorrt-rtx"):
    """Calibrate and quantize; ``span`` stands in for the range of every value that was measured."""
    work = model.clone()
    Calibrate(data=data, target=target)(work)
    for node in work.graph:
        for value in node.inputs:
            if span and RANGE_KEY in value.meta:
                value.meta[RANGE_KEY] = Range(*span)
    assert Quantize(target=target, min_sqnr=-100)(work).modified
    return work


def run(model, data):
    session = open_model(model, SessionOptions(literal=True))
    return np.concatenate([session.run({"x": s["x"][None]})["y"].reshape(-1, 24) for s in data]).astype(np.float64)


def bias_of(model, name="b"):
    return model.graph.initializers[name].const_value.numpy()


def test_the_mean_error_of_every_channel_goes_into_the_bias():
    model, data = model_from(PLAIN, w=normal(32, 24), b=normal(24)), samples()
    work = quantized(model, data, (-10.0, 30.0))
    gap = (run(work, data) - run(model, data)).mean(axis=0)
    result = CorrectBias(data=data)(work)
    assert result.modified
    assert [(d.op, d.action) for d in result.decisions] == [("MatMul", "folded")]
    left = (run(work, data) - run(model, data)).mean(axis=0)
    assert np.abs(gap).max() > 0.2
    assert np.abs(left).max() < 0.05 * np.abs(gap).max()


def test_a_second_run_changes_nothing():
    model, data = model_from(PLAIN, w=normal(32, 24), b=normal(24)), samples()
    work = quantized(model, data, (-10.0, 30.0))
    CorrectBias(data=data)(work)
    before = ir.to_proto(work).SerializeToString()
    result = CorrectBias(data=data)(work)
    assert not result.modified
    assert [d.reason for d in result.decisions] == ["corrected already"]
    assert ir.to_proto(work).SerializeToString() == before


def decibel(truth, found):
    return 10 * np.log10(np.square(truth).sum() / np.square(truth - found).sum())


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    reach=st.floats(0.5, 40.0),
    make=st.sampled_from([normal, skewed]),
    target=st.sampled_from(["tensorrt-rtx", "ort-cpu"]),
)
def test_the_signal_to_noise_ratio_on_fresh_data_does_not_fall(seed, reach, make, target):
    rng = np.random.default_rng(seed)
    model = model_from(PLAIN, w=normal(32, 24, rng=rng), b=normal(24, rng=rng))
    data, fresh = samples(60, make=make, rng=rng), samples(60, make=make, rng=rng)
    work = quantized(model, data, (-reach / 3, reach), target)
    truth = run(model, fresh)
    before = decibel(truth, run(work, fresh))
    CorrectBias(data=data)(work)
    assert decibel(truth, run(work, fresh)) > before - 0.05


LAYERS = {
    "a Gemm": ("y = Gemm <transB = 1, alpha = 2.0, beta = 0.5> (x, w, b)", (24, 32), (1, 24)),
    "a Gemm without a bias": ("y = Gemm (x, w)", (32, 24), None),
    "a bias of all ranks": ("h = MatMul(x, w)  y = Add(b, h)", (32, 24), (1, 24)),
    "a bias of one number": ("h = MatMul(x, w)  y = Add(h, b)", (32, 24), (1,)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_every_spelling_of_a_bias_is_corrected(case):
    body, shape, bias = LAYERS[case]
    model = model_from(f"g (float[n, 32] x) => (float[n, 24] y) {{ {body} }}", w=normal(*shape), **given_bias(bias))
    data = Samples({"x": skewed(32)} for _ in range(100))
    work = quantized(model, data, (-10.0, 30.0))
    gap = (run(work, data) - run(model, data)).mean(axis=0)
    assert CorrectBias(data=data)(work).modified
    left = (run(work, data) - run(model, data)).mean(axis=0)
    assert np.abs(left).max() < 0.05 * np.abs(gap).max()


def given_bias(shape):
    return {} if shape is None else {"b": normal(*shape)}


CONVS = {
    "plain": ("pads = [1, 1, 1, 1]", (24, 16, 3, 3)),
    "strided and dilated": ("pads = [2, 0, 1, 3], strides = [2, 1], dilations = [1, 2]", (24, 16, 3, 2)),
    "in groups": ("group = 4, pads = [1, 1, 1, 1]", (24, 4, 3, 3)),
    "padded by itself": ('auto_pad = "SAME_UPPER", strides = [2, 2]', (24, 16, 3, 3)),
}


@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("biased", [True, False])
def test_convolutions_are_corrected_padding_and_all(case, biased):
    attributes, shape = CONVS[case]
    inputs = "x, w, b" if biased else "x, w"
    weights = {"w": normal(*shape), **given_bias((24,) if biased else None)}
    model = model_from(f"g (float[n, 16, h, k] x) => (float y) {{ y = Conv <{attributes}> ({inputs}) }}", **weights)
    data = Samples({"x": skewed(16, int(RNG.integers(6, 12)), 9)} for _ in range(30))
    work = quantized(model, data, (-10.0, 30.0))

    def mean(found):
        session = open_model(found, SessionOptions(literal=True))
        outputs = [session.run({"x": sample["x"][None]})["y"].reshape(24, -1) for sample in data]
        return np.concatenate(outputs, axis=1).mean(axis=1)

    gap = mean(work) - mean(model)
    assert CorrectBias(data=data)(work).modified
    assert np.abs(mean(work) - mean(model)).max() < 0.05 * np.abs(gap).max()


def test_errors_are_those_at_the_activations_of_the_quantized_network():
    """The second layer's input is what the first, quantized and not yet corrected, makes of the samples."""
    text = """g (float[n, s, 32] x) => (float[n, s, 24] y) {
        h = MatMul(x, w)  i = Add(h, b)  r = Relu(i)  k = MatMul(r, v)  y = Add(k, c) }"""
    model = model_from(text, w=normal(32, 32), b=normal(32), v=normal(32, 24), c=normal(24))
    data = samples()
    work = quantized(model, data, (-10.0, 30.0))
    second = next(node for node in work.graph if node.outputs[0].name == "k")
    seen, value = second.inputs[0].name, second.inputs[0].producer().inputs[0].producer().inputs[0].name
    taps = open_model(work, SessionOptions(literal=True), [seen, value])
    found = [taps.run({"x": s["x"][None]}, [seen, value]) for s in data]
    before, after = (np.concatenate([f[n].reshape(-1, 32) for f in found]).astype(np.float64) for n in (value, seen))
    stored = dequantized(second.inputs[1].producer())
    expected = (after @ stored - before @ bias_of(model, "v")).mean(axis=0)
    CorrectBias(data=data)(work)
    moved = bias_of(model, "c") - work.graph[-1].inputs[1].const_value.numpy()
    np.testing.assert_allclose(moved, expected, atol=0.12 * np.abs(expected).max())


def test_a_product_without_a_bias_gets_one_on_request_only():
    text = "g (float[n, s, 32] x) => (float[n, s, 24] y) { y = MatMul(x, w) }"
    model, data = model_from(text, w=normal(32, 24)), samples()
    work = quantized(model, data, (-10.0, 30.0))
    result = CorrectBias(data=data)(work)
    assert not result.modified
    assert [(d.action, d.reason) for d in result.decisions] == [("skipped", NO_BIAS)]
    gap = (run(work, data) - run(model, data)).mean(axis=0)
    assert CorrectBias(data=data, insert=True)(work).modified
    assert [value.name for value in work.graph.outputs] == ["y"]
    assert np.abs((run(work, data) - run(model, data)).mean(axis=0)).max() < 0.05 * np.abs(gap).max()
    assert not CorrectBias(data=data, insert=True)(work).modified


def test_a_bias_that_others_share_is_copied():
    text = """g (float[n, s, 32] x, float[n, s, 24] z) => (float[n, s, 24] y, float[n, s, 24] t) {
        h = MatMul(x, w)  y = Add(h, b)  t = Add(z, b) }"""
    model = model_from(text, w=normal(32, 24), b=normal(24))
    data = Samples({"x": skewed(5, 32), "z": normal(5, 24)} for _ in range(30))
    work = quantized(model, data, (-10.0, 30.0))
    kept = bias_of(model).copy()
    assert CorrectBias(data=data)(work).modified
    assert np.array_equal(bias_of(work), kept)


REFUSED = {
    "y = Gemm (x, w, c)": "its bias is computed, switched off or different from row to row",
    "c = Neg(b)  y = Gemm (x, w, c)": "its bias is computed, switched off or different from row to row",
    "h = MatMul(x, w)  c = Neg(b)  y = Add(h, c)": NO_BIAS,
    "h = MatMul(x, w)  t = Relu(h)  i = Add(h, b)  y = Add(t, i)": NO_BIAS,
}


@pytest.mark.parametrize("body", REFUSED)
def test_layers_that_cannot_take_it_are_left_alone_with_a_reason(body):
    weights = {"w": normal(32, 24)} | ({"b": normal(24)} if "b)" in body else {"c": normal(5, 24)})
    model = model_from(f"g (float[5, 32] x) => (float y) {{ {body} }}", **weights)
    data = Samples({"x": skewed(32)} for _ in range(20))
    work = quantized(model, data)
    before = ir.to_proto(work).SerializeToString()
    result = CorrectBias(data=data)(work)
    assert not result.modified
    assert [d.reason for d in result.decisions] == [REFUSED[body]]
    assert ir.to_proto(work).SerializeToString() == before


def test_a_float_model_and_one_without_known_weights_are_left_alone():
    model, data = model_from(PLAIN, w=normal(32, 24), b=normal(24)), samples()
    assert CorrectBias(data=data)(model.clone()).decisions == ()
    read = ir.from_proto(ir.to_proto(quantized(model, data)))
    result = CorrectBias(data=data)(read)
    assert not result.modified
    assert [d.reason for d in result.decisions] == ["its weight before rounding is not known"]


def test_errors_within_chance_are_no_reason_to_move_a_bias():
    errors = RNG.standard_normal((16, 4000))
    shift = correction(errors, np.ones(16))
    assert np.square(shift).mean() < np.square(errors.mean(axis=0)).mean() / 2
    np.testing.assert_allclose(correction(errors + 100, np.ones(16)), 100 + errors.mean(axis=0), rtol=0.001)
    assert not correction(errors[:1], np.ones(1)).any()


@pytest.mark.parametrize("block", [0, 4])
def test_weights_are_read_as_the_runtime_reads_them(block):
    codes = RNG.integers(-8, 8, (8, 6)).astype(np.int8)
    scale, zero = np.abs(normal(2, 6)) if block else np.abs(normal(6)), None
    zero = RNG.integers(-3, 3, scale.shape).astype(np.int8)
    extra = f"axis = 0, block_size = {block}" if block else "axis = 1"
    text = f"g (float[1] x) => (float[8, 6] y) {{ y = DequantizeLinear <{extra}> (q, s, z) }}"
    model = model_from(text, 21, q=codes, s=scale, z=zero)
    expected = open_model(model).run({"x": normal(1)})["y"]
    np.testing.assert_allclose(dequantized(model.graph[0]), expected, rtol=1e-6)


def test_no_data_is_a_usage_error():
    with pytest.raises(UsageError, match="calibration data"):
        CorrectBias()(model_from(PLAIN, w=normal(32, 24), b=normal(24)))


def test_a_vector_in_blocks_has_a_scale_for_each_block():
    text = "g (float[n] x) => (float[n] y) { w = DequantizeLinear <axis = 0, block_size = 4> (q, s)  y = Add(x, w) }"
    q, s = np.arange(8, dtype=np.int8), np.float32([0.5, 2])
    model = model_from(text, opset=21, q=q, s=s)
    expected = q * np.repeat(s, 4)
    np.testing.assert_array_equal(dequantized(model.graph[0]), expected)
    found = open_model(model, SessionOptions(threads=1, literal=True)).run({"x": np.zeros(8, np.float32)})["y"]
    np.testing.assert_array_equal(found, expected)
