"""How much outputs owe to weights, summed over samples, and the zeros that sparsify makes by it."""

import numpy as np
import onnx_ir as ir
import pytest
from helpers import Samples, model_from

from qexport.calibration.gradients.saliency import gradients, weight_saliency
from qexport.calibration.sparsify import Sparsify
from qexport.errors import DataInvalid, ModelInvalid, UsageError

TWO = """g (float[n, 6] x) => (float[n, 3] y, float[n, 2] z) {
    h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v)  z = MatMul(r, q) }"""


def two(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"w": (6, 5), "v": (5, 3), "q": (5, 2)}
    return model_from(TWO, **{name: rng.standard_normal(shape).astype("f") for name, shape in shapes.items()})


def rows(count=40):
    return Samples({"x": row} for row in np.random.default_rng(7).standard_normal((count, 6)).astype("f"))


def weight(model, name):
    return model.graph.initializers[name].const_value.numpy()


def test_squares_of_gradients_are_the_diagonal_of_gauss_newton_on_average():
    model, data = two(), rows(3)
    (w, v, q), x = (weight(model, name).astype(np.float64) for name in "wvq"), np.stack([s["x"] for s in data])
    wanted = np.zeros(w.shape)
    for row in x:  # the outputs' Jacobian by each number of w, squared and summed over all outputs
        on = (row @ w > 0) * np.square(np.hstack([v, q])).sum(axis=1)
        wanted += np.outer(row**2, on)
    draws = [sum(g["w"] ** 2 for g in gradients(model, ["w"], data, seed=seed)) for seed in range(80)]
    found = np.mean(draws, axis=0)
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.96
    assert found.sum() == pytest.approx(wanted.sum(), rel=0.1)


def test_saliency_is_the_sum_of_what_every_sample_gives_however_weights_are_grouped():
    model, data = two(), rows()
    wanted = dict.fromkeys("wvq", 0.0)
    for grads in gradients(model, "wvq", data):
        for name in wanted:
            wanted[name] = wanted[name] + np.abs(weight(model, name) * grads[name].astype(np.float64))
    for budget in (1, 90, 1 << 20):
        found = weight_saliency(model, "wvq", data, budget=budget)
        for name in "wvq":
            assert found[name].dtype == np.float64
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6)


def test_order_and_repetition_of_samples_do_not_matter_and_the_seed_does():
    model, data = two(), rows()
    one = weight_saliency(model, ["w"], data)["w"]
    np.testing.assert_allclose(weight_saliency(model, ["w"], [*data[::-1], *data[:5]])["w"], one, rtol=1e-6)
    other = weight_saliency(model, ["w"], data, seed=1)["w"]
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.8
    assert not np.allclose(one, other, rtol=0.01)


def test_a_gradient_times_its_value_is_that_of_a_gate():
    model, data = two(), rows(4)
    plain = list(gradients(model, ["r", "x"], data))
    for sample, grads, gated in zip(data, plain, gradients(model, ["r", "x"], data, times_value=True), strict=True):
        x = sample["x"][None]
        assert gated["r"].shape == (1, 5)
        np.testing.assert_allclose(gated["x"], x * grads["x"], rtol=1e-6)
        np.testing.assert_allclose(gated["r"], np.maximum(x @ weight(model, "w"), 0) * grads["r"], rtol=1e-4, atol=1e-6)


def test_only_the_outputs_asked_for_are_owed_anything():
    found = weight_saliency(two(), "vq", rows(), outputs=["z"])
    assert not found["v"].any()
    assert found["q"].all()


def test_no_samples_owe_nothing():
    assert not weight_saliency(two(), ["w"], Samples())["w"].any()
    assert list(gradients(two(), ["w"], Samples())) == []


def test_outputs_whose_sizes_have_no_names_are_run_first():
    text = "g (float[n, 6] x) => (float[?, m] y) { h = MatMul(x, w)  y = Tanh(h) }"
    model = model_from(text, w=np.ones((6, 5), "f"))
    model.graph.outputs[0].shape = None
    assert weight_saliency(model, ["w"], rows(3))["w"].all()


def test_sizes_that_are_not_as_the_model_says_are_told():
    model = model_from("g (float[n, 6] x) => (float[n, 5] y) { y = Exp(x) }".replace("5] y", "6] y"))
    model.graph.outputs[0].shape = ir.Shape(["n", 1])
    with pytest.raises(ModelInvalid, match="output 'y' has the sizes"):
        list(gradients(model, ["x"], rows(2)))


def test_a_model_of_a_fixed_batch_is_filled_with_one_sample():
    text = "g (float[4, 6] x) => (float[4, 5] y) { y = MatMul(x, w) }"
    (found,) = gradients(model_from(text, w=np.ones((6, 5), "f")), ["w", "x"], rows(1))
    assert found["x"].shape == (4, 6)


def test_bad_gradients_are_told_with_sample_and_value():
    model = model_from("g (float[n, 6] x) => (float[n, 6] y) { h = Mul(x, w)  y = Sqrt(h) }", w=np.ones(6, "f"))
    data = Samples([{"x": np.ones(6, "f")}, {"x": np.zeros(6, "f")}])
    with pytest.raises(DataInvalid, match="gradient is NaN or infinite at 'w'") as error:
        weight_saliency(model, ["w"], data)
    assert error.value.where == "sample 1"
    with pytest.raises(UsageError, match="no constant is called 'h'"):
        weight_saliency(model, ["h"], data)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("f")


def numbers(count, *shape):
    return Samples({"x": array} for array in normal(count, *shape, seed=5))


def chain():
    text = "g (float[n, 64] x) => (float[n, 32] y) { h = MatMul(x, w)  r = Relu(h)  y = Gemm <transB = 1> (r, v) }"
    return model_from(text, w=normal(64, 48), v=normal(32, 48, seed=1))


def convs():
    text = """g (float[n, 16, 6, 6] x) => (float[n, 24, 3, 3] y) {
        h = Conv <pads = [1, 1, 1, 1]> (x, w)  y = Conv <strides = [2, 2]> (h, v) }"""
    return model_from(text, w=normal(20, 16, 3, 3), v=normal(24, 20, 2, 2, seed=1))


@pytest.mark.parametrize("repair", [True, False])
def test_what_the_outputs_owe_least_to_goes_whatever_the_layout_of_the_weight(repair):
    for model, data in ((chain(), numbers(60, 64)), (convs(), numbers(12, 16, 6, 6))):
        owed = weight_saliency(model, "wv", data)
        assert Sparsify(data=data, pattern=0.5, criterion="gradient", repair=repair)(model).modified
        for name in "wv":
            stays = weight(model, name) != 0
            assert stays.mean() == 0.5
            assert owed[name][stays].min() > owed[name][~stays].max()


def test_gradients_compare_layers_of_a_model():
    model = chain()
    model.graph.initializers["v"].const_value = ir.tensor(0.1 * weight(model, "v"))  # so are gradients of the first
    asked = Sparsify(data=numbers(60, 64), pattern=0.4, per="model", criterion="gradient", repair=False)
    before = model.clone()
    assert asked(model).modified
    zeros = [(weight(model, name) == 0).sum() for name in "wv"]
    assert sum(zeros) == round(0.4 * (64 * 48 + 48 * 32))
    Sparsify(pattern=0.4, per="model", criterion="magnitude", repair=False)(before)
    assert zeros[1] < 0.5 * (weight(before, "v") == 0).sum()
    assert not asked(model).modified


def test_gradients_need_data_and_outputs_alone_do_not_compare_layers():
    with pytest.raises(UsageError, match="needs calibration data"):
        Sparsify(criterion="gradient", repair=False, pattern=0.5)(chain())
    with pytest.raises(UsageError, match="scores of wanda cannot be compared"):
        Sparsify(criterion="wanda", pattern=0.5, per="model")


@pytest.mark.parametrize("per", ["output", "layer"])
def test_a_share_of_zeros_by_gradients_is_kept_to_the_number(per):
    model = chain()
    Sparsify(data=numbers(40, 64), pattern=0.3, per=per, criterion="gradient")(model)
    for name, inputs in (("w", 64), ("v", 48)):
        zero = weight(model, name) == 0
        assert zero.sum() == (zero.size // inputs * round(0.3 * inputs) if per == "output" else round(0.3 * zero.size))


@pytest.mark.parametrize(
    ("target", "pattern", "told"), [("ort-cpu", "2:4", 1), ("ort-cpu", 0.5, 0), ("tensorrt", "2:4", 0)]
)
def test_a_target_without_sparse_kernels_is_told_of(target, pattern, told):
    model = model_from("g (float[b, 64] x) => (float[b, 48] y) { y = MatMul(x, w) }", w=normal(64, 48))
    step = Sparsify(pattern=pattern, criterion="magnitude", repair=False, target=target, min_dim=0)
    notes = [d.reason for d in step(model).decisions if d.action == "noted"]
    assert notes == [f"{target} has no sparse kernels: zeros save no time"] * told
    assert not [d for d in step(model).decisions if d.action == "noted"]
