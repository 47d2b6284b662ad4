from functools import partial
from itertools import product

import helpers
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import Samples
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.calibration.adaround import CHOSEN, TIED, AdaRound
from qexport.calibration.calibrate import Calibrate
from qexport.calibration.correct import CorrectBias
from qexport.calibration.rounding import Steps, learn
from qexport.calibration.running.execute import open_model
from qexport.calibration.statistics.excerpts import LIMIT
from qexport.calibration.statistics.patches import Patch
from qexport.errors import UsageError
from qexport.passes.numbers.groups import Grid, codes_of, quantize_groups
from qexport.passes.numbers.range import RANGE_KEY, SQNR_KEY, Range
from qexport.passes.numbers.weights import quantize_weight, stored_numbers
from qexport.passes.quantize import Quantize
from qexport.passes.weight_only import WeightOnly
from qexport.runtime.session import SessionOptions

model_from = partial(helpers.model_from, opset=21)
RNG = np.random.default_rng(0)
PLAIN = "g (float[n, s, 48] x) => (float[n, s, 40] y) { y = MatMul(x, w) }"
ROUNDS = 100  # enough for small layers


def normal(*shape, rng=RNG):
    return rng.standard_normal(shape).astype(np.float32)


MIXING = normal(48, 48) * (np.arange(48)[:, None] < 8) + 0.3 * np.eye(48, dtype=np.float32)


def samples(count=60):
    """Rows that vary in a few directions, as activations do."""
    return Samples({"x": normal(int(RNG.integers(5, 20)), 48) @ MIXING} for _ in range(count))


def rows(data):
    return np.concatenate([sample["x"] for sample in data]).astype(np.float64)


def steps_for(weight, bits=4):
    top = np.float32(2 ** (bits - 1) - 1)
    scale = np.abs(weight).max(axis=0, keepdims=True) / top
    ends = np.full((1, weight.shape[1]), top)
    return Steps(weight, scale, -ends, ends)


def test_learned_rounding_finds_nearly_the_best_of_all_choices():
    ratios = []
    for _ in range(6):
        x = normal(200, 8) @ (normal(8, 8) * (np.arange(8)[:, None] < 3) + 0.2 * np.eye(8))
        hessian, steps = (x.T @ x).astype(np.float64), steps_for(normal(8, 5))
        floor = np.floor(steps.weight / steps.scale)
        every = [np.clip(floor + np.array(ups)[:, None], steps.low, steps.high) for ups in product((0, 1), repeat=8)]
        best = np.min([steps.errors(codes, hessian) for codes in every], axis=0)
        found, nearest = (steps.errors(c, hessian) for c in (learn(steps, hessian, 300), steps.nearest))
        assert (found >= best * (1 - 1e-9)).all()
        ratios += list(zip(found / best, nearest / best, strict=True))
    learned, plain = np.median(ratios, axis=0)
    assert 2 * learned < plain


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 4, 8]), st.integers(1, 30))
def test_no_output_channel_is_worse_than_with_nearest_rounding(seed, bits, iterations):
    rng = np.random.default_rng(seed)
    x = normal(40, 12, rng=rng) * np.exp(2 * normal(12, rng=rng))
    hessian, steps = (x.T @ x).astype(np.float64), steps_for(normal(12, 7, rng=rng), bits)
    codes = learn(steps, hessian, iterations)
    assert (steps.errors(codes, hessian) <= steps.errors(steps.nearest, hessian)).all()
    assert (np.abs(codes) <= steps.high).all()
    assert (np.abs(codes - steps.weight / steps.scale) <= 1).all()


def test_the_same_data_gives_the_same_codes():
    x = normal(200, 16)
    hessian, steps = (x.T @ x).astype(np.float64), steps_for(normal(16, 9))
    assert np.array_equal(learn(steps, hessian, 50), learn(steps, hessian, 50))


def quantized(model, data, target="tensorrt-rtx"):
    """The model in int8, and what it stored."""
    found = rows(data) if data[0]["x"].ndim == 2 else np.stack([sample["x"] for sample in data])
    model.graph.inputs[0].meta[RANGE_KEY] = Range(min(found.min(), 0), max(found.max(), 0))
    assert Quantize(target=target, min_sqnr=-100)(model).modified
    (codes,) = (v.const_value.numpy() for n, v in model.graph.initializers.items() if n.endswith("/int8"))
    (scale,) = (
        v.const_value.numpy() for n, v in model.graph.initializers.items() if n.startswith("w") and "scale" in n
    )
    return codes, scale


@pytest.mark.parametrize("target", ["tensorrt-rtx", "ort-cpu"])
def test_the_integers_that_are_stored_are_those_that_were_learned(target):
    w = normal(48, 40)
    data = Samples({"x": np.rint(2 * sample["x"]) / 2} for sample in samples())  # sums that are exact in any order
    model = model_from(PLAIN, w=w)
    result = AdaRound(data=data, target=target, iterations=ROUNDS)(model)
    assert result.modified
    assert [(d.action, d.reason) for d in result.decisions] == [("folded", "rounding learned")]
    nearest, scale = quantize_weight(w, 1, half=target == "tensorrt-rtx")
    ends = np.full((1, 40), 127, np.float32)
    steps = Steps(w, scale[None], -ends, ends)
    x = rows(data).astype(np.float32)
    expected = learn(steps, (x.T @ x).astype(np.float64) / len(x), ROUNDS)
    stored, kept = quantized(model, data, target)
    assert np.array_equal(kept, scale)
    assert (stored != nearest).mean() > 0.05
    assert np.array_equal(stored, expected)


def test_the_output_error_on_fresh_data_falls():
    w, data, fresh = normal(48, 40), samples(200), rows(samples())
    errors = {}
    for learned in (True, False):
        model = model_from(PLAIN, w=w)
        if learned:
            AdaRound(data=data, iterations=ROUNDS)(model)
        codes, scale = quantized(model, data)
        errors[learned] = np.square(fresh @ (codes * scale.astype(np.float64) - w)).sum()
    assert errors[True] < 0.7 * errors[False]


CASES = {
    "a Gemm that is transposed": ("float[n, 48] x", "y = Gemm <transB = 1> (x, w)", (40, 48), (48,)),
    "a convolution": ("float[n, 16, 9, 9] x", "y = Conv <pads = [1, 1, 1, 1]> (x, w)", (24, 16, 3, 3), (16, 9, 9)),
}


@pytest.mark.parametrize("case", CASES)
def test_other_layers_lose_less_too(case):
    inputs, body, shape, sample = CASES[case]
    w = normal(*shape)
    mix = normal(*sample[:1], *sample[:1]) * (np.arange(sample[0])[:, None] < 4) + 0.3 * np.eye(sample[0])
    data = Samples({"x": np.einsum("c...,cd->d...", normal(*sample), mix).astype(np.float32)} for _ in range(100))
    model = model_from(f"g ({inputs}) => (float y) {{ {body} }}", w=w)
    assert AdaRound(data=data, iterations=ROUNDS)(model).modified
    codes, scale = quantized(model, data)
    nearest, same = quantize_weight(w, 0, half=True)
    assert np.array_equal(scale, same)
    x = np.stack([sample["x"] for sample in data])
    patch = Patch((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    x = np.concatenate(list(patch.rows(x))) if len(sample) > 1 else x

    def loss(stored):
        return np.square(x @ (stored.reshape(len(w), -1) * scale[:, None] - w.reshape(len(w), -1)).T).sum()

    assert loss(codes) < 0.8 * loss(nearest)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_second_run_changes_nothing(dtype):
    text = PLAIN if dtype == np.float32 else PLAIN.replace("float[", "float16[")
    data = Samples({"x": sample["x"].astype(dtype)} for sample in samples())
    model = model_from(text, w=normal(48, 40).astype(dtype))
    assert AdaRound(data=data, iterations=20)(model).modified
    before = ir.to_proto(model).SerializeToString()
    result = AdaRound(data=data, iterations=20)(model)
    assert not result.modified
    assert [d.reason for d in result.decisions] == [CHOSEN]
    assert ir.to_proto(model).SerializeToString() == before


MIXED = """g (float[n, 704] x) => (float[n, 72] y, float[n, 40] z) {
    h = MatMul(x, u)  t = MatMul(h, v)  y = MatMul(t, w)  z = MatMul(x, p) }"""


def test_grids_are_those_that_weight_only_would_take():
    rng = np.random.default_rng(5)
    shapes = {"u": (704, 96), "v": (96, 176), "w": (176, 72), "p": (704, 40)}
    weights = {name: (normal(*shape, rng=rng) / shape[0] ** 0.5) for name, shape in shapes.items()}
    model, data = model_from(MIXED, **weights), Samples({"x": normal(704)} for _ in range(30))
    asked = {"bits": 4, "group": 128, "fit": True, "clip": True, "head": False, "min_dim": 64}
    with pytest.raises(UsageError, match="group 128 does not divide the 704 inputs"):
        AdaRound(data=data, **{**asked, "fit": False})(model)
    plain = model.clone()
    result = AdaRound(data=data, iterations=20, **asked)(model)
    found = {name: codes_of(value) for name, value in model.graph.initializers.items()}
    assert {name: codes and codes.grid for name, codes in found.items()} == {
        "u": Grid(4, 64),
        "v": Grid(4, 32),
        "w": None,
        "p": None,
    }
    refused = [d.reason for d in result.decisions if d.action == "skipped"]
    assert refused == ["makes an output of the model", "K or N below 64"]
    for name in "uv":
        nearest = quantize_groups(weights[name], found[name].grid, half=True, clip=True)
        assert np.array_equal(found[name].scale, nearest.scale)
        assert 0.01 < (found[name].values != nearest.values).mean() < 0.5
        assert np.abs(found[name].values.astype(int) - nearest.values).max() == 1
    stored = [WeightOnly(**asked)(work) for work in (model, plain)]  # with codes and without
    told = [[(d.node, d.action, d.reason) for d in outcome.decisions] for outcome in stored]
    assert told[0] == told[1]
    assert [node.outputs[0].shape for node in model.graph] == [node.outputs[0].shape for node in plain.graph]


def test_zero_points_are_those_of_the_nearest_codes():
    w, data = normal(48, 40) + 1, samples(100)
    errors = {}
    for learned in (True, False):
        model = model_from(PLAIN, w=w)
        if learned:
            options = {"bits": 4, "group": 16, "symmetric": False, "iterations": ROUNDS}
            assert AdaRound(data=data, target="ort-cpu", **options)(model).modified
        codes = codes_of(model.graph[0].inputs[1]) if learned else quantize_groups(w, Grid(4, 16, symmetric=False))
        assert codes.zero.any()
        assert codes.values.min() >= -8
        assert codes.values.max() <= 7
        errors[learned] = np.square(rows(data) @ (codes.dequantize() - w)).sum()
    assert errors[True] < 0.75 * errors[False]


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 0), (3, 24), (8, 16)])
def test_codes_of_few_bits_are_stored_by_weight_only(bits, group):
    w, data = normal(48, 40), samples(100)
    errors = {}
    for learned in (True, False):
        model = model_from(PLAIN, w=w)
        if learned:
            assert AdaRound(data=data, bits=bits, group=group, iterations=ROUNDS)(model).modified
            codes = codes_of(model.graph[0].inputs[1])
            assert codes.grid.bits == bits
            assert not AdaRound(data=data, bits=bits, group=group)(model).modified
        assert WeightOnly(bits=bits, group=group)(model).modified
        dq = model.graph[0]
        q, scale = (value.const_value.numpy().astype(np.float64) for value in dq.inputs[:2])
        if learned:
            assert np.array_equal(q, codes.values)
        wide = np.repeat(scale, 48 // len(scale), axis=0) if scale.ndim == 2 else scale
        errors[learned] = np.square(rows(data) @ (q * wide - w)).sum()
    assert errors[True] < 0.75 * errors[False]


TWO = "g (float[n, s, 48] x) => (float[n, s, 40] y) { h = MatMul(x, v)  y = MatMul(h, w) }"


def two_products():
    """A model, calibrated on what comes back with it, and its second product called so."""
    model, data = model_from(TWO, v=normal(48, 48), w=normal(48, 40)), samples(20)
    Calibrate(data=data)(model)
    model.graph[0].name, model.graph[1].name = "first", "second"
    return model, data


@pytest.mark.parametrize("target", ["tensorrt-rtx", "ort-cpu"])
def test_a_layer_that_stays_in_float_afterwards_computes_what_it_did(target):
    model, data = two_products()
    before, w = ir.to_proto(model).SerializeToString(), model.graph.initializers["w"].const_value.numpy().copy()
    assert AdaRound(data=data, target=target, iterations=20)(model).modified
    assert ir.to_proto(model).SerializeToString() == before
    snapshot = model.clone()
    Quantize(target=target, min_sqnr=-100, keep=("second",))(model)
    (node,) = (node for node in model.graph if node.name == "second")
    assert np.array_equal(node.inputs[1].const_value.numpy(), w)
    Quantize(target=target, min_sqnr=-100)(snapshot)  # what backing off begins with has the same notes
    again, first = (graph.initializers["v/int8"].const_value.numpy() for graph in (snapshot.graph, model.graph))
    assert np.array_equal(again, first)
    nearest = quantize_weight(model_weight(before, "v"), 1, half=target == "tensorrt-rtx")[0]
    assert 0.02 < (first != nearest).mean() < 0.5


def model_weight(serialized, name):
    proto = onnx.load_from_string(serialized)
    return next(onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer if tensor.name == name)


@pytest.mark.parametrize("learned", [True, False])
def test_a_layer_is_rated_by_the_integers_that_will_be_stored(learned):
    w = normal(48, 40)
    data = Samples({"x": normal(1, 48) @ MIXING} for _ in range(LIMIT))
    model = model_from(PLAIN, w=w)
    if learned:
        AdaRound(data=data, iterations=ROUNDS)(model)
    Calibrate(data=data, method="minmax")(model)
    rated, x = model.graph[0].meta[SQNR_KEY], rows(data)
    codes, scale = quantized(model, data)
    (step,) = (v.const_value.numpy() for n, v in model.graph.initializers.items() if n == "x/scale")
    y = x @ w
    noise = y - (np.rint(x / step) * step) @ (codes * scale.astype(np.float64))
    assert rated == pytest.approx(10 * np.log10(np.square(y).sum() / np.square(noise).sum()), abs=1e-3)


def test_the_mean_error_of_learned_integers_is_what_correction_takes_out():
    text = "g (float[n, s, 48] x) => (float[n, s, 40] y) { h = MatMul(x, w)  y = Add(h, b) }"
    data = Samples({"x": 1 + 0.1 * sample["x"]} for sample in samples())
    model = model_from(text, w=normal(48, 40), b=normal(40))
    work = model.clone()
    Calibrate(data=data)(work)
    AdaRound(data=data, iterations=ROUNDS)(work)
    Quantize(min_sqnr=-100)(work)

    def gap():
        outputs = [
            np.concatenate([opened.run({"x": sample["x"][None]})["y"][0] for sample in data])
            for opened in (open_model(found, SessionOptions(threads=1, literal=True)) for found in (model, work))
        ]
        return np.abs((outputs[1] - outputs[0]).mean(axis=0)).max()

    before = gap()
    assert CorrectBias(data=data)(work).modified
    assert gap() < 0.3 * before


def test_codes_are_void_for_another_weight_axis_or_type_of_scale():
    w = normal(48, 40)
    model = model_from(PLAIN, w=w)
    AdaRound(data=samples(), iterations=20)(model)
    value = model.graph[0].inputs[1]
    tensor = value.const_value
    chosen, _ = stored_numbers(value, tensor, 1, half=True)
    assert not np.array_equal(chosen, quantize_weight(w, 1, half=True)[0])
    other = ir.tensor(normal(48, 40))
    for changed, axis, half, kind in ((other, 1, True, "int8"), (tensor, 0, True, "int8"), (tensor, 1, False, "int8")):
        found = stored_numbers(value, changed, axis, half=half, kind=kind)
        expected = quantize_weight(changed.numpy(), axis, half=half, kind=kind)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert stored_numbers(value, tensor, 1, half=True, kind="fp8")[0].dtype != np.int8


@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_that_others_read_is_left_alone(bits):
    text = "g (float[n, 48] x) => (float y, float z) { y = MatMul(x, w)  t = Relu(x)  z = MatMul(t, w) }"
    model = model_from(text, w=normal(48, 40))
    result = AdaRound(data=Samples({"x": normal(48)} for _ in range(5)), bits=bits, iterations=20)(model)
    assert not result.modified
    assert [d.reason for d in result.decisions] == [TIED if bits == 8 else "several products read its weight"] * 2


def test_layers_are_left_alone_by_name_or_with_a_reason():
    text = """g (float[n, 16, 9, 9] x, float[n, 48] z) => (float y, float t) {
        y = Conv <group = 2> (x, v)  [named] t = MatMul(z, w) }"""
    text = text.replace("[named] t = MatMul", "t = MatMul")
    model = model_from(text, v=normal(24, 8, 1, 1), w=normal(48, 40))
    model.graph[1].name = "named"
    data = Samples({"x": normal(16, 9, 9), "z": normal(48)} for _ in range(3))
    before = ir.to_proto(model).SerializeToString()
    result = AdaRound(data=data, keep=("named",))(model)
    assert not result.modified
    assert {d.op: d.reason for d in result.decisions} == {
        "Conv": "a convolution in groups has a Gram matrix for each of them",
        "MatMul": "left alone by name",
    }
    assert ir.to_proto(model).SerializeToString() == before


def test_bad_options_are_refused():
    model, data = model_from(PLAIN, w=normal(48, 40)), samples(3)
    with pytest.raises(UsageError, match="calibration data"):
        AdaRound()(model)
    with pytest.raises(UsageError, match="no node is called"):
        AdaRound(data=data, keep=("nobody",))(model)
    with pytest.raises(UsageError, match="group 36 does not divide the 48 inputs"):
        AdaRound(data=data, bits=4, group=36)(model)
    for bad in ({"iterations": 0}, {"samples": 0}, {"group": -1}):
        with pytest.raises(UsageError, match=f"adaround.{next(iter(bad))}"):
            AdaRound(**bad)
