from itertools import pairwise

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from helpers import model_from
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import UsageError
from qexport.passes.equalize import Equalize, factors
from qexport.passes.numbers.range import RANGE_KEY, Range
from qexport.passes.quantize import Quantize

RNG = np.random.default_rng(0)
CHAIN = """g (float[n, 16, 12, 12] x) => (float y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w, b)  r = Relu(a)  y = Conv <pads = [1, 1, 1, 1]> (r, v, c) }"""
MOBILE = """g (float[n, 16, 12, 12] x) => (float y) {
    a = Conv (x, w, b)  p = Relu(a)  d = Conv <group = 32, pads = [1, 1, 1, 1]> (p, u, e)
    q = LeakyRelu <alpha = 0.1> (d)  y = Conv (q, v, c) }"""


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def spread(count):
    """Factors over four decades, as folded batch normalizations leave them."""
    return (10.0 ** RNG.uniform(-2, 2, count)).astype(np.float32)


def chain(scale=None):
    scale = spread(32) if scale is None else scale
    w, b = normal(32, 16, 3, 3) * scale[:, None, None, None], 0.3 * normal(32) * scale
    return model_from(CHAIN, w=w, b=b, v=normal(8, 32, 3, 3) / scale[:, None, None], c=normal(8))


def mobile():
    s, t = spread(32), spread(32)
    return model_from(
        MOBILE,
        w=normal(32, 16, 1, 1) * s[:, None, None, None],
        b=normal(32) * s,
        u=normal(32, 1, 3, 3) * (t / s)[:, None, None, None],
        e=normal(32) * t,
        v=normal(8, 32, 1, 1) / t[:, None, None],
        c=normal(8),
    )


def run(model, x, *taps):
    proto = ir.to_proto(model)
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in taps)
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})


def weights(model, node):
    return [value.const_value.numpy().astype(np.float64) for value in model.graph[node].inputs[1:]]


def decibel(y, z):
    return 10 * np.log10(np.square(y).sum() / np.square(y - z).sum())


@pytest.mark.parametrize("build", [chain, mobile])
def test_the_function_stays_and_the_channels_of_both_weights_get_equal_ranges(build):
    model = build()
    x = normal(2, 16, 12, 12)
    (before,) = run(model, x)
    result = Equalize()(model)
    assert result.modified
    assert {d.reason for d in result.decisions} == {"scaled against Conv before it"}
    np.testing.assert_allclose(run(model, x)[0], before, rtol=1e-4, atol=1e-5 * np.abs(before).max())
    convs = [index for index, node in enumerate(model.graph) if node.op_type == "Conv"]
    for one, other in pairwise(convs):
        (w, b), (v, _) = weights(model, one), weights(model, other)
        outputs = np.maximum(np.abs(w).max((1, 2, 3)), np.abs(b))
        inputs = np.abs(v).max((1, 2, 3)) if v.shape[1] == 1 else np.abs(v).max((0, 2, 3))
        np.testing.assert_allclose(outputs, inputs, rtol=2e-3)


def test_the_factors_of_one_pair_are_those_of_the_paper():
    model = chain()
    (w, b), (v, c) = weights(model, 0), weights(model, 2)
    r1, r2 = np.maximum(np.abs(w).max((1, 2, 3)), np.abs(b)), np.abs(v).max((0, 2, 3))
    s = np.sqrt(r1 * r2) / r2
    Equalize()(model)
    for found, expected in zip(weights(model, 0), (w / s[:, None, None, None], b / s), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    for found, expected in zip(weights(model, 2), (v * s[:, None, None], c), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)), min_size=1, max_size=8))
def test_after_scaling_both_ranges_are_the_geometric_mean(pairs):
    first, second = np.array(pairs).T
    s = factors(first, second)
    np.testing.assert_allclose(first / s, np.sqrt(first * second))
    np.testing.assert_allclose(second * s, np.sqrt(first * second))


def quantized(model, x):
    """Int8 with min-max ranges from ``x``."""
    seen = run(model, x, "r")
    values = {value.name: value for node in model.graph for value in node.inputs}
    for name, numbers in (("x", x), ("r", seen[1])):
        values[name].meta[RANGE_KEY] = Range(min(float(numbers.min()), 0), max(float(numbers.max()), 0))
    assert Quantize(min_sqnr=-100)(model).modified
    return model


def test_a_network_on_which_int8_collapses_is_recovered():
    x, fresh = normal(8, 16, 12, 12), normal(8, 16, 12, 12)
    model = chain()
    truth = run(model, fresh)[0] - weights(model, 2)[1].reshape(-1, 1, 1)
    plain = quantized(model.clone(), x)
    Equalize()(model)
    balanced = quantized(model, x)
    bias = weights(model, 2)[1].reshape(-1, 1, 1)
    assert decibel(truth, run(plain, fresh)[0] - bias) < 15
    assert decibel(truth, run(balanced, fresh)[0] - bias) > 28


@pytest.mark.parametrize("build", [chain, mobile])
def test_a_second_run_changes_nothing(build):
    model = build()
    Equalize()(model)
    before = ir.to_proto(model).SerializeToString()
    result = Equalize()(model)
    assert not result.modified
    assert {d.reason for d in result.decisions} == {"its channels are balanced already"}
    assert ir.to_proto(model).SerializeToString() == before


def test_gemms_are_balanced_whichever_way_their_weights_lie():
    text = """g (float[n, 16] x) => (float y) {
        a = Gemm <alpha = 2.0, beta = 0.5> (x, w, b)  r = Relu(a)  y = Gemm <transB = 1> (r, v) }"""
    s = spread(24)
    model = model_from(text, w=normal(16, 24) * s, b=normal(1, 24) * s, v=normal(8, 24) / s)
    x = normal(5, 16)
    (before,) = run(model, x)
    assert Equalize()(model).modified
    np.testing.assert_allclose(run(model, x)[0], before, rtol=1e-4, atol=1e-5 * np.abs(before).max())
    assert np.ptp(np.log(np.abs(weights(model, 2)[0]).max(0))) < np.ptp(np.log(s)) - 3


def test_grouped_convolutions_are_balanced():
    text = """g (float[n, 16, 6, 6] x) => (float y) {
        a = Conv <group = 4> (x, w)  r = PRelu(a, k)  m = MaxPool <kernel_shape = [2, 2]> (r)
        y = Conv <group = 2> (m, v) }"""
    s = spread(32)
    model = model_from(
        text,
        w=normal(32, 4, 1, 1) * s[:, None, None, None],
        k=normal(32, 1, 1),
        v=normal(6, 16, 1, 1) / np.repeat(s.reshape(2, 16), 3, axis=0)[..., None, None],
    )
    x = normal(2, 16, 6, 6)
    (before,) = run(model, x)
    assert Equalize()(model).modified
    np.testing.assert_allclose(run(model, x)[0], before, rtol=1e-4, atol=1e-5 * np.abs(before).max())


def test_a_channel_that_is_switched_off_is_left_as_it_is():
    scale = spread(32)
    model = chain(scale)
    (w, b), (v, _) = weights(model, 0), weights(model, 2)
    dead = model_from(
        CHAIN,
        w=(w * (np.arange(32) != 3)[:, None, None, None]).astype(np.float32),
        b=(b * (np.arange(32) != 3)).astype(np.float32),
        v=(v * (np.arange(32) != 5)[:, None, None]).astype(np.float32),
        c=normal(8),
    )
    Equalize()(dead)
    np.testing.assert_allclose(weights(dead, 0)[0][5], w[5], rtol=1e-6)
    np.testing.assert_allclose(weights(dead, 2)[0][:, 3], v[:, 3], rtol=1e-6)


def test_a_channel_that_is_all_bias_is_not_blown_up():
    model = chain(np.ones(32, np.float32))
    weight, bias = (model.graph[0].inputs[index].const_value.numpy() for index in (1, 2))
    small, large = weight.copy(), bias.copy()
    small[7] *= 1e-6
    large[7] = 2.0
    Equalize(tolerance=0.001)(odd := model_from(CHAIN, w=small, b=large, v=normal(8, 32, 3, 3), c=bias[:8]))
    assert abs(weights(odd, 0)[1][7]) < 5


def test_weights_that_others_share_are_copied():
    text = """g (float[n, 32, 6, 6] x) => (float y, float z) {
        a = Conv (x, w)  r = Relu(a)  y = Conv (r, v)  z = Conv (x, w) }"""
    s = spread(32)
    model = model_from(text, w=normal(32, 32, 1, 1) * s[:, None, None, None], v=normal(8, 32, 1, 1))
    x = normal(1, 32, 6, 6)
    before = run(model, x)
    assert Equalize()(model).modified
    for found, expected in zip(run(model, x), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_what_was_measured_between_the_layers_is_forgotten():
    model = chain()
    model.graph[1].outputs[0].meta[RANGE_KEY] = Range(0, 1)
    Equalize()(model)
    assert RANGE_KEY not in model.graph[1].outputs[0].meta


CURVED = "which is not homogeneous in one channel"
REFUSED = {
    "a = Conv (x, w)  r = Sigmoid(a)  y = Conv (r, v)": f"behind Sigmoid, {CURVED}",
    "a = Conv (x, w)  r = Clip (a, lo, hi)  y = Conv (r, v)": f"behind Clip, {CURVED}",
    "a = Conv (x, w)  r = Add (a, x)  y = Conv (r, v)": f"behind Add, {CURVED}",
    "a = Conv (x, w)  r = Relu(a)  c = Conv (r, v)  y = Add(c, r)": "an intermediate is used elsewhere",
    "a = Conv (x, w)  r = Softmax <axis = 1> (a)  y = Conv (r, v)": f"behind Softmax, {CURVED}",
    "a = Conv (x, w)  k = Neg(v)  y = Conv (a, k)": "weights are not constant",
    "k = Neg(b)  a = Conv (x, w, k)  y = Conv (a, v)": "the bias before it is not one constant number for each channel",
    "a = Conv (x, nan)  y = Conv (a, v)": "the shapes do not fit, or a weight is not finite",
}


@pytest.mark.parametrize("body", REFUSED)
def test_layers_that_cannot_be_balanced_are_refused_with_a_reason(body):
    s = spread(16)[:, None, None, None]
    model = model_from(
        f"g (float[n, 16, 6, 6] x) => (float[n, 16, 6, 6] y) {{ {body} }}",
        w=normal(16, 16, 1, 1) * s,
        v=normal(16, 16, 1, 1),
        nan=np.full((16, 16, 1, 1), np.nan, np.float32),
        b=normal(16),
        lo=np.float32(0),
        hi=np.float32(6),
    )
    before = ir.to_proto(model).SerializeToString()
    result = Equalize()(model)
    assert not result.modified
    assert REFUSED[body] in [d.reason for d in result.decisions if d.action == "skipped"]
    assert ir.to_proto(model).SerializeToString() == before


def test_a_model_without_pairs_is_left_alone():
    model = model_from("g (float[n, 16, 6, 6] x) => (float y) { y = Conv (x, w) }", w=normal(8, 16, 1, 1))
    result = Equalize()(model)
    assert not result.modified
    assert result.decisions == ()


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan")])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(UsageError, match="tolerance"):
        Equalize(tolerance=tolerance)(chain())
