"""Weights that read units, and their repair: against least squares on the rows that they read."""

import numpy as np
import onnx_ir as ir
import pytest
from channel_models import build
from cut_models import MODELS, copy_of, cuts, silence
from cut_samples import data, run, same_numbers, tapped
from helpers import Samples
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.calibration.cutting.readers import readers_of, repair, taps_of
from qexport.calibration.statistics.halves import measure_halves
from qexport.passes.match import array
from qexport.passes.pruning.cut import find_cut
from qexport.passes.pruning.spaces import Space

PADDED = """y = Conv<kernel_shape=[3,3], pads=[1,0,2,1], strides=[2,2]>(a, w1) x = Relu(y)
out = Conv<kernel_shape=[2,2], pads=[0,1,1,0], strides=[1,2]>(x, w2, b2)"""
READERS = {
    "mlp": (MODELS["mlp"][0], *MODELS["mlp"][2:]),
    "no_bias": ("neurons", "y = MatMul(a, w1) x = Gelu(y) out = MatMul(x, w2)", {"w1": "8x6", "w2": "6x4"}),
    "gemm": (
        "neurons",
        "y = MatMul(a, w1) x = Relu(y) out = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w2, b2)",
        {"w1": "8x6", "w2": "4x6", "b2": "4", "inputs": "float[b, 8] a", "outputs": "float[b, n] out"},
    ),
    "conv": (
        "channels",
        PADDED,
        {"w1": "6x3x3x3", "w2": "4x6x2x2", "b2": "4", "inputs": "float[b, 3, 7, 7] a", "outputs": "float[b,c,h,w] out"},
    ),
    "heads": ("heads", *MODELS["mha_with_biases"][2:]),
    "groups_of_heads": ("heads", *MODELS["grouped_queries"][2:]),
}


def small(kind, body, constants):
    same_numbers()
    model = build(body, **constants)
    for value in model.graph.initializers.values():
        if len(value.shape) > 1 and value.dtype.is_floating_point():
            value.const_value = ir.tensor(array(value) * np.float32(0.3), name=value.name)
    return model, cuts(model, kind)[0]


def patches(array, kernel, pads, strides):
    """Rows of a convolution by loops, ``[positions, channels * kernel]``."""
    wide = np.pad(array, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])])
    rows = [
        wide[b, :, i : i + kernel[0], j : j + kernel[1]].reshape(-1)
        for b in range(len(wide))
        for i in range(0, wide.shape[2] - kernel[0] + 1, strides[0])
        for j in range(0, wide.shape[3] - kernel[1] + 1, strides[1])
    ]
    return np.array(rows, np.float64)


def rows_of(model, samples, name):
    """What the reader of the units reads, and what it makes with its bias, as rows."""
    read, made = ("cm", "r" if name == "heads" else "out") if "heads" in name else ("x", "out")
    inputs, outputs = [], []
    for sample in samples:
        value, truth = tapped(model, sample, read, made)
        if name == "conv":
            inputs.append(patches(value, (2, 2), (0, 1, 1, 0), (1, 2)))
            outputs.append(np.moveaxis(truth, 1, -1).reshape(-1, truth.shape[1]))
        else:
            inputs.append(value.reshape(-1, value.shape[-1]))
            outputs.append(truth.reshape(-1, truth.shape[-1]))
    return np.concatenate(inputs).astype(np.float64), np.concatenate(outputs).astype(np.float64)


def repairs_of(model, space, keep, samples, ridge=None):
    readers = readers_of(space.cut)
    grams = measure_halves(model, taps_of(readers), samples)
    return [repair(reader, grams[reader.tap], keep, ridge) for reader in readers]


def cut_and_repair(space, keep, repairs):
    space.cut.apply(keep)
    for done in repairs:
        done.write()


UNITS = {"conv": np.repeat(np.arange(6), 4), "heads": np.repeat(np.arange(4), 2)}
UNITS["groups_of_heads"] = np.repeat(np.arange(2), 4)
BARE = ("no_bias", "groups_of_heads")


@pytest.mark.parametrize("name", READERS)
def test_repaired_outputs_are_those_of_least_squares_on_the_rows(name):
    model, space = small(*READERS[name])
    samples, silent = data(model, 60), copy_of(model)
    keep = np.arange(space.count) != 1
    silence(cuts(silent, space.kind)[0].cut, keep)
    x, y = rows_of(model, samples, name)
    _, without = rows_of(silent, samples, name)
    left = x[:, keep[UNITS.get(name, np.arange(6))]]
    left = left if name in BARE else np.hstack([left, np.ones((len(left), 1))])
    fitted = left @ np.linalg.lstsq(left, y, rcond=None)[0]
    (done,) = repairs_of(model, space, keep, samples, ridge=0.0)
    cut_and_repair(space, keep, [done])
    _, found = rows_of(model, samples, name)
    scale = np.abs(y - y.mean(axis=0)).max()
    assert np.abs(found - fitted).max() < 2e-3 * scale
    assert np.abs(without - fitted).max() > 0.02 * scale
    worse, better = np.square(y - without).sum(), np.square(y - fitted).sum()
    assert done.left / done.masked == pytest.approx(better / worse, rel=1e-2)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(READERS)), st.integers(0, 10**6), st.sampled_from([None, 0.0, 1e-3, 0.1, 10.0]))
def test_a_repair_is_never_worse_on_the_samples_than_none(name, seed, ridge):
    model, space = small(*READERS[name])
    samples, silent = data(model, 5, seed), copy_of(model)
    keep = np.random.default_rng(seed).permutation(space.count) >= space.count // 2
    silence(cuts(silent, space.kind)[0].cut, keep)
    _, y = rows_of(model, samples, name)
    _, without = rows_of(silent, samples, name)
    repairs = repairs_of(model, space, keep, samples, ridge)
    cut_and_repair(space, keep, repairs)
    _, found = rows_of(model, samples, name)
    assert np.square(y - found).sum() <= np.square(y - without).sum() * (1 + 1e-4)
    assert all(done.left <= done.masked * (1 + 1e-9) for done in repairs)


def test_inputs_that_belong_to_no_unit_stay_and_are_fitted():
    body = "h = MatMul(a, wh) y = MatMul(a, w1) z = Relu(y) x = Concat<axis=-1>(h, z) out = MatMul(x, w2)"
    model = build(body, wh="8x3", w1="8x6", w2="9x4")
    z = next(value for node in model.graph for value in node.outputs if value.name == "z")
    ids = np.arange(6).reshape(1, 1, 6)
    space = Space("z", "neurons", z, ids, find_cut(z, ids, 6))
    (reader,) = readers_of(space.cut)
    assert reader.units.tolist() == [-1, -1, -1, 0, 1, 2, 3, 4, 5]
    samples, keep = data(model, 40), np.arange(6) >= 2
    x, y = rows_of(model, samples, "mlp")
    left = x[:, np.append([True] * 3, keep)]
    cut_and_repair(space, keep, repairs_of(model, space, keep, samples, ridge=0.0))
    assert array(model.graph[-1].inputs[1]).shape == (7, 4)
    fitted = left @ np.linalg.lstsq(left, y, rcond=None)[0]
    assert np.abs(rows_of(model, samples, "mlp")[1] - fitted).max() < 2e-3 * np.abs(y).max()


def test_a_reader_that_also_makes_the_units_is_fitted_to_those_of_its_outputs_that_stay():
    _, _, body, constants = MODELS["residual_group"]
    model, space = small("channels", body, constants)
    samples, keep = data(model, 30), np.array([True, False, True, True, True, False])
    x = [tapped(model, sample, "x", "z") for sample in samples]
    rows = np.concatenate([patches(one, (3, 3), (1, 1, 1, 1), (1, 1)) for one, _ in x])
    made = np.concatenate([np.moveaxis(other, 1, -1).reshape(-1, 6) for _, other in x])
    left = np.hstack([rows[:, np.repeat(keep, 9)], np.ones((len(rows), 1))])
    fitted = left @ np.linalg.lstsq(left, made, rcond=None)[0]
    repairs = repairs_of(model, space, keep, samples, ridge=0.0)
    assert [done.weight.shape for done in repairs] == [(36, 4), (4, 4)]
    cut_and_repair(space, keep, repairs)
    found = np.concatenate([np.moveaxis(tapped(model, s, "z")[0], 1, -1).reshape(-1, 4) for s in samples])
    assert np.abs(found - fitted[:, keep]).max() < 2e-3 * np.abs(made).max()


def test_nothing_is_fitted_where_no_sample_came():
    model, space = small(*READERS["mlp"])
    assert repairs_of(model, space, np.arange(6) > 0, Samples()) == [None]


def test_readers_with_one_weight_for_both_get_a_weight_each():
    same_numbers()
    body = "y = MatMul(a, w1) x = Relu(y) u = MatMul(x, w2) t = Sin(y) v = MatMul(t, w2) out = Add(u, v)"
    model = build(body, w1="8x6", w2="6x4")
    (space,) = cuts(model, "neurons")
    keep, samples = np.arange(6) > 1, data(model, 20)
    old = array(model.graph.initializers["w2"]).astype(np.float64)
    rows = [np.concatenate([tapped(model, s, name)[0].reshape(-1, 6) for s in samples]) for name in "xt"]
    cut_and_repair(space, keep, repairs_of(model, space, keep, samples, ridge=0.0))
    found = [array(node.inputs[1]) for node in model.graph if node.outputs[0].name in ("u", "v")]
    for x, weight in zip(rows, found, strict=True):
        wanted = np.linalg.lstsq(x[:, keep].astype(np.float64), x @ old, rcond=None)[0]
        assert weight == pytest.approx(wanted, rel=1e-2, abs=1e-2)
    assert not np.allclose(*found, atol=0.05)


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_what_never_varies_goes_into_the_bias_and_nothing_is_fitted_to_noise(noise):
    model, space = small(*READERS["mlp"])
    (sample,) = data(model, 1)
    row = sample["a"][:1]
    samples = Samples({"a": row.repeat(3, axis=0) * np.float32(1 + noise * n)} for n in range(4))
    before, weight = run(model, samples[0])[0], array(model.graph.initializers["w2"])
    keep = np.arange(6) > 2
    cut_and_repair(space, keep, repairs_of(model, space, keep, samples))
    assert run(model, samples[0])[0] == pytest.approx(before, abs=1e-4)
    assert array(model.graph.initializers["w2"]) == pytest.approx(weight[keep], rel=1e-6)
