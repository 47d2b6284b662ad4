"""Neurons that change places before zeros come: the same function, and less lost to 2:4."""

import numpy as np
import onnx_ir as ir
import pytest
from helpers import Samples, model_from, session

from qexport.calibration.sparsify import SPARSITY_KEY, Sparsify
from qexport.calibration.statistics.gram import by_tap
from qexport.calibration.zeros.orders import REORDERED, reorder_neurons
from qexport.errors import UsageError
from qexport.exporter.looking.sparsity import zeros_of
from qexport.passes.numbers.masks import Pattern
from qexport.passes.numbers.permute import retained
from qexport.passes.placement import plan
from qexport.passes.target import find_target

TWO = Pattern.parse("2:4")
MLP = "g (float[n, 32] x) => (float[n, 48] y) { a = MatMul(x, w)  s = Add(a, b)  h = Gelu(s)  y = MatMul(h, v) }"
GATED = "g (float[n, 32] x) => (float[n, 48] y) { a = MatMul(x, w)  k = MatMul(x, t)  h = Mul(k, a)  y = MatMul(h, v) }"
TWICE = """g (float[n, 32] x) => (float[n, 48] y) {
    a = MatMul(x, w)  h = Relu(a)  o = MatMul(h, v)  p = Gemm <transB = 1> (h, u)  y = Add(o, p) }"""


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def uneven(*shape, seed=0, axis=0):
    """Large and small inputs in runs of eight, which groups of four cannot mix."""
    size = np.where(np.arange(shape[axis]) // 8 % 2, 0.1, 1.0)
    return (normal(*shape, seed=seed) * size.reshape([-1 if i == axis else 1 for i in range(2)])).astype(np.float32)


def model_of(text):
    every = {"w": normal(32, 64), "t": normal(32, 64, seed=5), "b": normal(64, seed=1), "v": uneven(64, 48, seed=2)}
    every["u"] = uneven(48, 64, seed=3, axis=1)
    model = model_from(
        text, **{name: numbers for name, numbers in every.items() if f", {name})" in text or f", {name}," in text}
    )
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


def rows():
    return Samples({"x": normal(32, seed=seed)} for seed in range(80))


def layers_of(model, *names):
    sites = [site for site in plan(model, find_target("tensorrt-rtx")).roots if site.node.name in names]
    return by_tap(sites)[0]


def output(model):
    return session(model).run(None, {"x": normal(20, 32, seed=99)})[0]


def kept(model, name):
    return retained(np.abs(model.graph.initializers[name].const_value.numpy()), TWO)


@pytest.mark.parametrize("text", [MLP, GATED])
def test_the_model_computes_the_same_and_more_of_the_weight_would_stay(text):
    model = model_of(text)
    before, size = output(model), kept(model, "v")
    found = reorder_neurons(model, layers_of(model, "y"), TWO, lambda: iter(rows()))
    assert [(d.node, d.action, d.reason) for d in found] == [("y", "reordered", REORDERED)]
    np.testing.assert_allclose(output(model), before, rtol=1e-4, atol=1e-4)
    assert kept(model, "v") > 1.1 * size


def test_two_layers_that_read_the_same_neurons_share_an_order():
    model = model_of(TWICE)
    before = output(model)
    found = reorder_neurons(model, layers_of(model, "o", "p"), TWO, lambda: iter(rows()))
    assert {d.node for d in found} == {"o", "p"}
    np.testing.assert_allclose(output(model), before, rtol=1e-4, atol=1e-4)


def test_neurons_stay_in_their_order_where_a_layer_reads_them_that_is_not_asked_for():
    for text, names in ((TWICE, ("o",)), (MLP, ("a",)), (MLP, ())):
        model = model_of(text)
        weights = {name: value.const_value for name, value in model.graph.initializers.items()}
        assert reorder_neurons(model, layers_of(model, *names), TWO, lambda: iter(rows())) == []
        assert {name: value.const_value for name, value in model.graph.initializers.items()} == weights


def test_what_inputs_are_like_counts():
    """The first eight neurons are never active, so that their weights are worth nothing."""
    model = model_of(MLP)
    bias = normal(64, seed=1)
    bias[:8] = -100
    model.graph.initializers["b"].const_value = ir.tensor(bias)
    reorder_neurons(model, layers_of(model, "y"), TWO, lambda: iter(rows()))
    silent = (model.graph.initializers["b"].const_value.numpy() == -100).reshape(-1, 4).sum(axis=1)
    assert silent.max() <= 2


def test_without_samples_weights_alone_decide():
    model = model_of(MLP)
    size = kept(model, "v")
    assert Sparsify(criterion="magnitude", repair=False, min_dim=0, permute=True)(model).modified
    mass = np.abs(model.graph.initializers["v"].const_value.numpy()).sum()
    assert mass > 1.1 * size


@pytest.mark.parametrize("criterion", ["magnitude", "gradient", "wanda", "sparsegpt"])
def test_layers_lose_less_and_have_the_pattern_along_their_new_inputs(criterion):
    lost = {}
    for permute in (False, True):
        model = model_of(MLP)
        found = Sparsify(data=rows(), criterion=criterion, min_dim=0, permute=permute)(model)
        assert all(zeros.two_of_four for zeros in zeros_of(model))
        assert ("y" in {d.node for d in found.decisions if d.action == "reordered"}) is permute
        lost[permute] = model.graph[3].meta[SPARSITY_KEY].left
        again = Sparsify(data=rows(), criterion=criterion, min_dim=0, permute=permute)(model)
        assert not again.modified
    assert lost[True] < 0.8 * lost[False]


def test_a_share_of_zeros_has_nothing_to_order():
    with pytest.raises(UsageError, match="no groups") as caught:
        Sparsify(pattern=0.5, permute=True)
    assert caught.value.where == "sparsify.permute"
