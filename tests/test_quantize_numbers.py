"""Scales that do not fit: types, operator sets, float16 limits."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qexport.passes.half import Half
from qexport.passes.numbers.range import LARGEST_SCALE, RANGE_KEY, Range, integers_for
from qexport.passes.numbers.weights import misfit, quantize_weight
from qexport.passes.quantize import Quantize
from qexport.passes.target import TARGETS, find_target

RNG = np.random.default_rng(0)
F16 = np.finfo(np.float16)
PRODUCT = "g ({0}[n, 32] x) => ({0}[n, 24] y) {{ y = MatMul(x, w) }}"


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def product(w, span=(-4.0, 4.0), opset=20, kind="float"):
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{PRODUCT.format(kind)}')
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    model.graph.inputs[0].meta[RANGE_KEY] = Range(*span)
    model.graph[0].name = "product"
    return model


def run(model, **feeds):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def reasons(result):
    return {decision.node: decision.reason for decision in result.decisions}


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("small", [1.0, 1e-3])
def test_a_half_precision_model_is_quantized_with_half_precision_scales(target, small):
    w, x = normal(32, 24).astype(np.float16), normal(9, 32).clip(-4, 4).astype(np.float16)
    model = product(w, (-4.0 * small, 4.0 * small), kind="float16")
    assert Quantize(target=target)(model).modified
    scales = [v.const_value.numpy() for name, v in model.graph.initializers.items() if name.endswith("/scale")]
    assert {scale.dtype for scale in scales} == {np.dtype(np.float16)}
    found = run(model, x=x * np.float16(small))
    assert found.dtype == np.float16
    integers, scale = quantize_weight(w, 1, half=True)
    span = Range(-4.0 * small, 4.0 * small)
    read = integers_for(span, find_target(target).activation, half=True).apply(x * np.float16(small))
    np.testing.assert_allclose(found, read @ (integers * scale.astype(float)), atol=0.05 * small)


def test_a_half_precision_model_of_an_opset_without_such_quantizers_is_left_alone():
    model = product(normal(32, 24).astype(np.float16), opset=17, kind="float16")
    result = Quantize()(model)
    assert not result.modified
    assert reasons(result) == {"product": "float16 Q/DQ needs opset 19"}


@pytest.mark.parametrize(("opset", "modified"), [(11, False), (12, False), (13, True)])
def test_an_opset_without_scales_for_channels_is_left_alone(opset, modified):
    model = product(normal(32, 24), opset=opset)
    result = Quantize()(model)
    assert result.modified == modified
    run(model, x=normal(2, 32))
    if not modified:
        assert reasons(result) == {"": f"needs opset 13, model has {opset}"}


@pytest.mark.parametrize(("high", "word"), [(1.1 * LARGEST_SCALE * 127, "large"), (1e-4, "small")])
def test_a_range_beyond_float16_scales_is_refused_where_the_target_computes_in_half_precision(high, word):
    result = Quantize()(product(normal(32, 24), (-high, high)))
    assert reasons(result) == {"product": f"its range is too {word} for a float16 scale"}
    model = product(normal(32, 24), (-high, high))
    assert Quantize(target="ort-cpu")(model).modified
    x = normal(40, 32) * np.float32(high / 4)
    exact = x @ product_weight(model)
    assert np.square(run(model, x=x) - exact).sum() < 1e-3 * np.square(exact).sum()


def product_weight(model):
    integers, scale, _ = next(n for n in model.graph if n.op_type == "DequantizeLinear").inputs
    return integers.const_value.numpy() * scale.const_value.numpy()


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("channels", [slice(None), slice(0, 12)])
def test_small_weights_keep_their_digits_or_stay_in_float(target, channels):
    w = normal(32, 24)
    w[:, channels] *= 1e-4
    model, x = product(w), normal(50, 32).clip(-4, 4)
    result = Quantize(target=target)(model)
    half = find_target(target).rest == "float16"
    assert result.modified != half
    if half:
        assert reasons(result) == {"product": "weights too small for float16 scales"}
    noise = np.square(run(model, x=x) - x @ w).sum(axis=0) / np.square(x @ w).sum(axis=0)
    assert noise.max() < 1e-2


def test_channels_that_are_zero_in_float16_too_do_not_keep_a_weight_in_float():
    w = normal(32, 24)
    w[:, 3], w[:, 5] = 0.0, 1e-10
    model = product(w)
    assert Quantize()(model).modified
    Half()(model)
    assert np.isfinite(run(model, x=normal(5, 32))).all()


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "weights are not finite"), (1e9, "weights too large for float16 scales")]
)
def test_weights_without_a_scale_stay_in_float(value, reason):
    w = normal(32, 24)
    w[2, 7] = value
    model = product(w)
    assert reasons(Quantize()(model)) == {"product": reason}


@pytest.mark.parametrize("axis", [0, 1])
def test_only_channels_that_lose_by_the_floor_are_misfits(axis):
    scales = np.array([1.0, 3e-3, 0.0])
    w = normal(3, 500) * scales[:, None]
    w = w if axis == 0 else w.T
    assert misfit(w, axis, half=True) is None
    assert misfit(w / 20, axis, half=True) == "weights too small for float16 scales"
    assert misfit(w / 20, axis, half=False) is None


@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e-30])
def test_float32_scales_follow_the_weights_down(factor):
    w = normal(6, 8) * factor
    integers, scale = quantize_weight(w, 0)
    assert np.all(np.abs(integers * scale[:, None].astype(float) - w) <= 0.501 * scale[:, None])
    assert np.all(np.abs(integers).max(axis=1) == 127)


def test_a_channel_that_a_folded_normalization_has_switched_off_does_not_keep_the_others_in_float():
    w = normal(32, 24)
    w[:, 3] *= 1e-6
    model, x = product(w), normal(50, 32).clip(-4, 4)
    assert Quantize()(model).modified
    found = run(model, x=x)
    np.testing.assert_allclose(found, x @ w, atol=0.4)
    assert np.abs(found[:, 3]).max() < 2e-3
