from functools import partial

import helpers
import numpy as np
import onnx_ir as ir
import pytest
from helpers import Samples

from qexport.calibration.awq import ALPHAS, SCALED_KEY, Awq, rounding_error, strength
from qexport.calibration.few_bits import UNSEEN
from qexport.calibration.statistics.gram import Gram
from qexport.errors import UsageError
from qexport.passes.folding.channels import Fold
from qexport.passes.numbers.groups import Grid
from qexport.passes.weight_only import WeightOnly
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.session import SessionOptions

model_from = partial(helpers.model_from, opset=21)
RNG = np.random.default_rng(0)
NORM = """g (float[n, s, 64] x) => (float[n, s, 48] y, float[n, s, 32] z) {
    h = LayerNormalization <axis = -1> (x, gain, beta)  y = MatMul(h, w)  z = MatMul(h, v) }"""
GELU = "g (float[n, s, 64] x) => (float[n, s, 32] y) { h = MatMul(x, w)  r = Gelu(h)  y = MatMul(r, v) }"


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def dataset(count=40):
    return Samples({"x": normal(12, 64)} for _ in range(count))


def normed():
    """Two products behind a norm with a few large channels."""
    gain = np.ones(64, np.float32)
    gain[[3, 17, 40]] = 30
    return model_from(NORM, gain=gain, beta=normal(64), w=normal(64, 48), v=normal(64, 32))


def outputs(model, x):
    found = OrtSession(ir.to_proto(model).SerializeToString(), SessionOptions(optimize=False)).run({"x": x[None]})
    return np.concatenate([found[name].ravel() for name in sorted(found)])


def kernels(model):
    return [node.inputs[1].const_value.numpy() for node in model.graph if node.op_type in ("MatMul", "Gemm")]


def test_scaling_leaves_the_function_and_the_nodes_as_they_were():
    model, data = normed(), dataset()
    before, ops = outputs(model, data[0]["x"]), [node.op_type for node in model.graph]
    result = Awq(data=data, group=32, target="ort-cpu")(model)
    assert result.modified
    assert {d.action for d in result.decisions} == {"folded"}
    assert [node.op_type for node in model.graph] == ops
    np.testing.assert_allclose(outputs(model, data[0]["x"]), before, rtol=1e-4, atol=1e-4)


def test_both_products_are_scaled_by_a_power_of_the_mean_magnitude_of_each_input():
    model, data = normed(), dataset()
    old = kernels(model)
    h = np.concatenate([sample["x"] for sample in data]).astype(np.float64)
    h = (h - h.mean(axis=1, keepdims=True)) / np.sqrt(h.var(axis=1, keepdims=True) + 1e-5)
    h = h * model.graph.initializers["gain"].const_value.numpy() + model.graph.initializers["beta"].const_value.numpy()
    reason = Awq(data=data, group=32, target="ort-cpu")(model).decisions[0].reason
    size = np.abs(h).mean(axis=0) ** float(reason.split()[1].strip(","))
    for before, after in zip(old, kernels(model), strict=True):
        scale = np.broadcast_to(size[:, None] / np.sqrt(size.min() * size.max()), before.shape)
        np.testing.assert_allclose(after / before, scale, rtol=1e-3)


def test_the_error_after_rounding_falls():
    data = dataset()
    x = np.concatenate([sample["x"] for sample in data[:10]])
    plain, errors = normed(), []
    truth = outputs(plain, x)
    for scaled in (False, True):
        model = plain.clone()
        if scaled:
            Awq(data=data, group=32, bits=3, target="ort-cpu")(model)
        WeightOnly(target="ort-cpu", format="dequantize", bits=3, group=32)(model)
        errors.append(np.square(outputs(model, x) - truth).sum())
    assert errors[1] < 0.7 * errors[0]


def test_the_error_of_every_strength_is_that_of_the_outputs_themselves():
    x, weight = normal(400, 64), normal(64, 24)
    x[:, [5, 9]] *= 20
    gram = Gram(64)
    gram.add(x)
    gram.settle()
    fold = Fold((), np.arange(64), {})
    for alpha in ALPHAS[::5]:
        scale = strength(gram, fold, alpha)
        wide = weight * scale[:, None].astype(np.float32)
        steps = np.abs(wide.reshape(4, 16, 24)).max(axis=1, keepdims=True) / 7.5
        rounded = np.clip(np.rint(wide.reshape(4, 16, 24) / steps), -8, 7) * steps
        gap = x @ (weight - rounded.reshape(64, 24) / scale[:, None])
        told = rounding_error(weight, scale, gram, Grid(4, 16), half=False)
        assert told == pytest.approx(np.square(gap).sum(), rel=2e-2)


def test_tied_channels_get_one_scale():
    gram = Gram(4)
    gram.add(np.array([[1, 2, 3, 0]], np.float32))
    gram.settle()
    scale = strength(gram, Fold((), np.array([0, 0, 2, 3]), {}), 0.5)
    assert scale[0] == scale[1]
    assert np.isfinite(scale).all()
    assert scale.min() * scale.max() == pytest.approx(1)


def test_where_nothing_takes_the_scale_in_the_product_is_left_with_the_reason():
    model, data = model_from(GELU, w=normal(64, 48), v=normal(48, 32)), dataset()
    before = kernels(model)
    result = Awq(data=data, group=16)(model)
    assert not result.modified
    assert {d.action for d in result.decisions} == {"skipped"}
    assert all(np.array_equal(a, b) for a, b in zip(before, kernels(model), strict=True))


def test_even_channels_are_left_alone():
    gain, beta = np.ones(64, np.float32), np.zeros(64, np.float32)
    model = model_from(NORM, gain=gain, beta=beta, w=normal(64, 48), v=normal(64, 32))
    result = Awq(data=dataset(), group=16)(model)
    assert not result.modified
    assert {d.reason for d in result.decisions} == {"scaling would not lower its error"}


def test_a_second_run_changes_nothing():
    model, data = normed(), dataset()
    assert Awq(data=data, group=32)(model).modified
    assert all(SCALED_KEY in node.meta for node in model.graph if node.op_type == "MatMul")
    assert not Awq(data=data, group=32)(model).modified


def test_samples_that_reach_no_product_leave_it_alone():
    text = """g (float[n, 64] x, bool[n] keep) => (float y) {
        k = Compress <axis = 0> (x, keep)  h = LayerNormalization <axis = -1> (k, gain, beta)  y = MatMul(h, v) }"""
    model = model_from(text, gain=normal(64), beta=normal(64), v=normal(64, 32))
    data = Samples({"x": normal(64), "keep": np.array(False)} for _ in range(3))
    assert [d.reason for d in Awq(data=data, group=16)(model).decisions] == [UNSEEN]


def test_no_data_a_group_that_does_not_divide_and_bad_options_are_usage_errors():
    with pytest.raises(UsageError, match="awq needs calibration data"):
        Awq()(normed())
    with pytest.raises(UsageError, match="does not divide the 64 inputs of node"):
        Awq(data=dataset(), group=48)(normed())
    for wrong in ({"gain": 1.0}, {"gain": float("nan")}, {"samples": 0}, {"group": -1}):
        with pytest.raises((UsageError, ValueError), match=next(iter(wrong))):
            Awq(**wrong)
