"""How many units stay: shares of units and of work, multiples, ties, and budgets that cannot be."""

import math

import numpy as np
import pytest
from channel_models import build
from cut_models import MODELS, cuts
from cut_samples import made, same_numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.calibration.cutting.budget import Budget, Work
from qexport.errors import UsageError
from qexport.exporter.load import load_model
from qexport.passes.cleanup import Cleanup
from qexport.passes.match import array

NET = """y = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(a, w1) x = Relu(y)
z = Conv<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x, w2) t = Relu(z)
u = ConvTranspose<kernel_shape=[2,2], strides=[2,2]>(t, w3) v = Relu(u) p = ReduceMean<keepdims=0>(v, places)
q = Gemm<transB=1>(p, w4) r = Relu(q) out = Gemm(r, w5)"""
SIZES = {"w1": "6x3x3x3", "w2": "12x6x3x3", "w3": "12x10x2x2", "w4": "8x10", "w5": "8x5", "places": [2, 3]}


def net():
    same_numbers()
    return build(NET, "float[b, 3, 8, 8] a", "float[b, n] out", **SIZES)


def two_mlps(first=12, second=20):
    same_numbers()
    body = "y = MatMul(a, w1) x = Relu(y) o = MatMul(x, w2) h = Add(o, a) z = MatMul(h, w3) t = Tanh(z) "
    return build(body + "out = MatMul(t, w4)", w1=f"8x{first}", w2=f"{first}x8", w3=f"8x{second}", w4=f"{second}x4")


def multiplications(model, pixels):
    """By the weights that are there; ``pixels`` of each convolution."""
    nodes = [n for n in model.graph if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    weights = [(n.outputs[0].name, array(n.inputs[1])) for n in nodes]
    return sum(weight.size * pixels.get(name, 1) for name, weight in weights if weight is not None)


PIXELS = {"y": 64, "z": 16, "u": 16}


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 0.95), st.sampled_from(["layer", "model"]), st.integers(0, 1000), st.sampled_from([1, 2, 4]))
def test_the_share_of_work_is_that_of_the_model_that_is_really_cut(keep, per, seed, multiple):
    model = net()
    spaces, rng = cuts(model, "channels"), np.random.default_rng(seed)
    assert [space.count for space in spaces] == [6, 12, 10]
    before = multiplications(model, PIXELS)
    assert before == 64 * 162 + 16 * 648 + 16 * 480 + 80 + 40
    scores = [rng.random(space.count) for space in spaces]
    least = Work(model, spaces).share([np.argsort(-row) < multiple for row in scores])
    if keep < least:
        with pytest.raises(UsageError, match="would leave nothing"):
            Budget(keep, per, "work", multiple).choose(model, spaces, scores)
        return
    keeps = Budget(keep, per, "work", multiple).choose(model, spaces, scores)
    told = Work(model, spaces).share(keeps)
    for space, row in zip(spaces, keeps, strict=True):
        space.cut.apply(row)
        assert row.any()
        assert row.all() or row.sum() % multiple == 0
    assert multiplications(model, PIXELS) / before == pytest.approx(told)
    assert told <= keep + 1e-9


def test_a_little_more_would_be_too_much():
    model = net()
    spaces = cuts(model, "channels")
    scores = [np.arange(space.count) * (place + 1.0) for place, space in enumerate(spaces)]
    keeps = Budget(0.6, "model", "work").choose(model, spaces, scores)
    shares = []
    for place, keep in enumerate(keeps):
        for unit in np.flatnonzero(~keep):
            more = [row.copy() for row in keeps]
            more[place][unit] = True
            shares.append(Work(model, spaces).share(more))
    assert max(shares) > 0.6


def test_work_of_a_unit_is_what_the_model_has_less_without_it():
    model = net()
    spaces = cuts(model, "channels")
    work = Work(model, spaces)
    before = multiplications(model, PIXELS)
    for place, space in enumerate(spaces):
        keeps = [np.arange(other.count) != (0 if other is space else -1) for other in spaces]
        assert (1 - work.share(keeps)) * before == pytest.approx(work.of_units(place)[0])


def test_rows_of_products_count_where_they_are_known_and_weights_on_the_left_too():
    body = "t = Transpose<perm=[0,2,1]>(a) y = MatMul(w1, t) x = Relu(y) c = Transpose<perm=[0,2,1]>(x) "
    same_numbers()
    model = build(body + "out = MatMul(c, w2)", "float[b, 7, 8] a", "float[b, 7, 4] out", w1="6x8", w2="6x4")
    (space,) = cuts(model, "neurons")
    work = Work(model, [space])
    assert work.of_units(0).tolist() == [7 * (8 + 4)] * 6
    assert work.share([np.arange(6) < 3]) == pytest.approx(0.5)


def test_every_layer_keeps_the_share_of_its_best_units():
    model = two_mlps()
    spaces = cuts(model, "neurons")
    scores = [np.random.default_rng(place).permutation(space.count) for place, space in enumerate(spaces)]
    keeps = Budget(0.5, "layer").choose(model, spaces, scores)
    assert [sorted(row[keep]) for row, keep in zip(scores, keeps, strict=True)] == [[*range(6, 12)], [*range(10, 20)]]


def test_all_layers_together_lose_the_worst_units_but_never_all_of_one():
    model = two_mlps()
    spaces = cuts(model, "neurons")
    keeps = Budget(0.5, "model").choose(model, spaces, [np.arange(12.0), 1 + np.arange(20.0)])
    assert [keep.sum() for keep in keeps] == [3, 13]
    keeps = Budget(0.5, "model").choose(model, spaces, [np.arange(12.0) / 100, 1 + np.arange(20.0)])
    assert [keep.sum() for keep in keeps] == [1, 15]
    assert keeps[0].tolist() == [False] * 11 + [True]


@pytest.mark.parametrize(("multiple", "layer", "together"), [(4, [8, 12], 20), (8, [8, 16], 16)])
def test_what_stays_is_a_multiple(multiple, layer, together):
    model = two_mlps()
    spaces = cuts(model, "neurons")
    scores = [np.arange(12.0), np.arange(20.0)]
    found = Budget(0.6, "layer", multiple=multiple).choose(model, spaces, scores)
    assert [int(keep.sum()) for keep in found] == layer
    found = Budget(0.63, "model", multiple=multiple).choose(model, spaces, scores)
    assert sum(int(keep.sum()) for keep in found) <= together
    assert all(keep.sum() % multiple == 0 for keep in found)


def test_of_equal_scores_the_first_stay():
    model = two_mlps()
    spaces = cuts(model, "neurons")
    for per in ("layer", "model"):
        keeps = Budget(0.5, per).choose(model, spaces, [np.zeros(12), np.zeros(20)])
        for keep in keeps:
            assert keep.tolist() == sorted(keep, reverse=True)


def test_units_go_by_what_they_cost_for_their_work():
    model = net()
    spaces = cuts(model, "channels")
    work = Work(model, spaces)
    fair = [work.of_units(place) * (1 + np.arange(space.count)) for place, space in enumerate(spaces)]
    keeps = Budget(0.5, "model", "work").choose(model, spaces, fair)
    gone = [int((~keep).sum()) for keep in keeps]
    assert max(gone) - min(gone) <= 1  # the first of each are the cheapest for their work


@pytest.mark.parametrize("keep", [0.0, 1.0, -0.5, 1.5, math.nan, math.inf])
def test_a_share_outside_zero_and_one_is_an_error(keep):
    with pytest.raises(UsageError, match="above 0 and below 1") as caught:
        Budget(keep, "layer", where="heads.keep")
    assert caught.value.where == "heads.keep"


@pytest.mark.parametrize("options", [{"per": "layer"}, {"per": "model"}, {"per": "layer", "of": "work"}])
def test_a_budget_that_empties_a_layer_is_an_error(options):
    model = two_mlps(4, 4)
    spaces = cuts(model, "neurons")
    with pytest.raises(UsageError, match="would leave nothing of") as caught:
        Budget(0.1, **options, where="neurons.keep").choose(model, spaces, [np.arange(4.0)] * 2)
    assert caught.value.where == "neurons.keep"
    assert "keep more" in caught.value.hint


@pytest.mark.parametrize("name", [name for name, row in MODELS.items() if row[0] == "channels"])
def test_work_of_small_models_follows_every_cut(name):
    model = made(name)
    (space,) = cuts(model, "channels")
    pixels = {n.outputs[0].name: int(np.prod(n.inputs[0].shape[2:])) for n in model.graph if "Conv" in n.op_type}
    before, keep = multiplications(model, pixels), np.arange(space.count) != 0
    told = Work(model, [space]).share([keep])
    space.cut.apply(keep)
    assert multiplications(model, pixels) / before == pytest.approx(told)


def test_work_of_a_residual_network_is_that_of_what_is_left_of_it(samples):
    model = Cleanup(slim=True)(load_model(samples / "resnet20/resnet20.onnx")).model
    spaces = cuts(model, "channels")
    pixels = {n.outputs[0].name: int(np.prod(n.outputs[0].shape[2:])) for n in model.graph if n.op_type == "Conv"}
    before, rng = multiplications(model, pixels), np.random.default_rng(0)
    assert before == pytest.approx(40.8e6, rel=0.02)
    keeps = Budget(0.7, "model", "work", 4).choose(model, spaces, [rng.random(space.count) for space in spaces])
    for space, keep in zip(spaces, keeps, strict=True):
        assert space.cut.refusal(keep) is None
        space.cut.apply(keep)
    assert 0.65 < multiplications(model, pixels) / before <= 0.7
