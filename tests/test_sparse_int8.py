"""Products with 2:4 weights: integers in and integers out for engines, and the recipe that makes them."""

import numpy as np
import onnx_ir as ir
import pytest
from helpers import Samples, model_from, session
from onnx.reference import ReferenceEvaluator

from qexport.calibration.calibrate import Calibrate
from qexport.exporter.looking.sparsity import zeros_of
from qexport.passes.half import Half
from qexport.passes.numbers.masks import Pattern, keep_mask
from qexport.passes.numbers.range import RANGE_KEY, SQNR_KEY, Range, integers_for, range_of
from qexport.passes.placement import is_two_of_four, plan
from qexport.passes.quantize import KEPT, NOT_CALIBRATED, Quantize
from qexport.passes.target import TARGETS, find_target

TWO = Pattern.parse("2:4")
ENGINES = ["tensorrt-rtx", "tensorrt"]
BOTH = "2:4 weight, activation and output"
XY = "(float[n, 64] x) => (float[n, 48] y)"


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sparse(*shape, seed=0, axis=0):
    """Normal numbers, 2:4 along ``axis``."""
    moved = normal(*shape, seed=seed).swapaxes(0, axis)
    flat = moved.reshape(len(moved), -1)
    return np.ascontiguousarray((flat * keep_mask(flat**2, TWO)).reshape(moved.shape).swapaxes(0, axis))


def calibrated(text, sample=(64,), target="tensorrt-rtx", outputs="sparse", **weights):
    """A model that knows its ranges; nodes are called like what they make."""
    model = model_from(f"g {text}", **weights)
    for node in model.graph:
        node.name = node.outputs[0].name
    data = Samples({"x": normal(*sample, seed=seed)} for seed in range(8))
    Calibrate(data=data, target=target, outputs=outputs)(model)
    return model


def quantized(text, target="tensorrt-rtx", outputs="sparse", **options):
    """The quantized model, and what was said of each node."""
    model = calibrated(text, target=target, outputs=outputs, **options)
    found = Quantize(target=target, outputs=outputs)(model)
    return model, {d.node: d.reason for d in found.decisions if d.action == "quantized"}


def in_integers(model):
    """Names of the values that quantizers alone read, in the order of the graph."""
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    return [v.name for v in values if v.uses() and all(n.op_type == "QuantizeLinear" for n in v.consumers())]


def pairs(model):
    return sum(node.op_type == "QuantizeLinear" for node in model.graph)


PLACES = {
    "its bias": ("m = MatMul(x, w)  a = Add(m, b)  y = Tanh(a)", "a"),
    "its bias on the left": ("m = MatMul(x, w)  a = Add(b, m)  y = Tanh(a)", "a"),
    "nothing": ("m = MatMul(x, w)  y = Tanh(m)", "m"),
    "a Gemm": ("m = Gemm(x, w, b)  y = Tanh(m)", "m"),
    "a Relu": ("m = MatMul(x, w)  a = Add(m, b)  r = Relu(a)  y = Tanh(r)", "r"),
    "its bias, with a Gelu behind": ("m = MatMul(x, w)  a = Add(m, b)  y = Gelu(a)", "a"),
    "its bias, which a Relu and a sum read": ("m = MatMul(x, w)  a = Add(m, b)  r = Relu(a)  y = Add(r, a)", "a"),
    "nothing, where the sum is of computed values": ("m = MatMul(x, w)  t = Tanh(m)  y = Add(m, t)", "m"),
    "nothing, where a product with itself is added": ("m = MatMul(x, w)  y = Add(m, m)", "m"),
}


@pytest.mark.parametrize("target", ENGINES)
@pytest.mark.parametrize("case", PLACES)
def test_a_sparse_product_hands_on_integers_behind(case, target):
    text, value = PLACES[case]
    weights = {"w": sparse(64, 48)} | ({"b": normal(48)} if "b" in text else {})
    model, told = quantized(f"{XY} {{ {text} }}", target=target, **weights)
    assert in_integers(model) == ["x", value]
    assert set(told.values()) == {BOTH}
    assert pairs(model) == 2


def test_what_is_computed_is_what_the_formula_says():
    w, b = sparse(64, 48), normal(48, seed=1)
    model = calibrated(f"{XY} {{ m = MatMul(x, w)  a = Add(m, b)  r = Relu(a)  y = Tanh(r) }}", w=w, b=b)
    spans = [
        next(n for n in model.graph if n.name == "m").inputs[0],
        next(n for n in model.graph if n.name == "r").outputs[0],
    ]
    first, second = (integers_for(range_of(value), "int8") for value in spans)
    assert range_of(spans[1]).low == 0
    Quantize(outputs="sparse")(model)
    scale = np.abs(w).max(axis=0).astype(np.float64) / 127
    half = scale.astype(np.float16)
    scale = np.where(half < scale, np.nextafter(half, np.float16(np.inf)), half).astype(np.float64)
    x = normal(30, 64, seed=9)
    product = first.apply(x).astype(np.float64) @ (np.rint(w / scale) * scale) + b
    expected = np.tanh(second.apply(np.maximum(product, 0)))
    step = second.scale
    for found in (ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})[0], session(model).run(None, {"x": x})[0]):
        gap = np.abs(found - expected)
        assert np.quantile(gap, 0.99) < 1e-5  # a sum at a tie may fall to either side
        assert gap.max() <= 1.01 * step


@pytest.mark.parametrize("between", ["r = Relu(m)", "t = Reshape(m, s)  r = Identity(t)"])
def test_a_reader_that_is_quantized_anyway_has_its_one_pair(between):
    text = f"{XY} {{ m = MatMul(x, w)  {between}  p = MatMul(r, v)  y = Tanh(p) }}"
    shape = {"s": np.array([-1, 48])} if "(m, s)" in text else {}
    model, told = quantized(text, w=sparse(64, 48), v=normal(48, 48), **shape)
    assert told == {"m": BOTH, "p": "weight and activation"}
    assert in_integers(model) == ["x", "r"]
    assert pairs(model) == 2


def test_all_readers_share_the_pair_of_the_one_that_is_quantized():
    text = f"{XY} {{ m = MatMul(x, w)  p = MatMul(m, v)  t = Tanh(m)  y = Add(p, t) }}"
    model, _ = quantized(text, w=sparse(64, 48), v=normal(48, 48))
    assert in_integers(model) == ["x", "m"]
    assert pairs(model) == 2
    tanh = next(node for node in model.graph if node.op_type == "Tanh")
    assert tanh.inputs[0].producer().op_type == "DequantizeLinear"
    plain, _ = quantized(text, outputs="none", w=sparse(64, 48), v=normal(48, 48))
    assert in_integers(plain) == ["x"]


def test_a_move_that_others_read_in_float_does_not_count_as_quantized():
    text = f"{XY} {{ m = MatMul(x, w)  r = Identity(m)  p = MatMul(r, v)  t = Tanh(r)  y = Add(p, t) }}"
    model, _ = quantized(text, w=sparse(64, 48), v=normal(48, 48))
    assert "m" in in_integers(model)


def test_an_output_of_the_model_stays_as_it_is():
    for text in ("y = MatMul(x, w)", "m = MatMul(x, w)  y = Relu(m)"):
        model, told = quantized(f"{XY} {{ {text} }}", w=sparse(64, 48))
        assert set(told.values()) == {"weight and activation"}
        assert pairs(model) == 1
    text = "(float[n, 64] x) => (float[n, 48] m, float[n, 48] y) { m = MatMul(x, w)  y = Tanh(m) }"
    model, _ = quantized(text, w=sparse(64, 48))
    assert in_integers(model) == ["x"]


@pytest.mark.parametrize("why", ["dense", "ort-cpu", "ort-cuda", "none"])
def test_nothing_more_is_quantized_for(why):
    options = {"target": why} if why.startswith("ort") else {"outputs": why} if why == "none" else {}
    weight = normal(64, 48) if why == "dense" else sparse(64, 48)
    model, told = quantized(f"{XY} {{ m = MatMul(x, w)  y = Tanh(m) }}", w=weight, **options)
    assert in_integers(model) == ["x"]
    assert set(told.values()) == {"weight and activation"}


def test_only_engines_have_sparse_kernels():
    assert {name for name, target in TARGETS.items() if target.sparse_kernels} == set(ENGINES)
    assert all(target.engine for target in TARGETS.values() if target.sparse_kernels)


def test_outputs_that_were_not_calibrated_stay_in_float_with_a_reason():
    model = calibrated(f"{XY} {{ m = MatMul(x, w)  y = Tanh(m) }}", outputs="none", w=sparse(64, 48))
    found = Quantize(outputs="sparse")(model).decisions
    assert [(d.node, d.action) for d in found] == [("m", "quantized"), ("m", "skipped")]
    assert found[1].reason == f"output stays in float: {NOT_CALIBRATED}"
    assert in_integers(model) == ["x"]


def test_an_output_that_no_half_precision_scale_holds_stays_in_float():
    model = calibrated(f"{XY} {{ m = MatMul(x, w)  y = Tanh(m) }}", w=sparse(64, 48))
    model.graph[0].outputs[0].meta[RANGE_KEY] = Range(-1e8, 1e8)
    found = Quantize(outputs="sparse")(model).decisions
    assert found[1].reason == "output stays in float: its range is too large for a float16 scale"
    assert in_integers(model) == ["x"]


def test_a_layer_that_is_kept_in_float_has_a_float_output():
    model = calibrated(
        f"{XY} {{ m = MatMul(x, w)  p = MatMul(m, v)  y = Tanh(p) }}", w=sparse(64, 48), v=sparse(48, 48)
    )
    found = Quantize(outputs="sparse", keep=("m",))(model).decisions
    assert {d.node: d.reason for d in found} == {"m": KEPT, "p": BOTH}
    assert in_integers(model) == ["m", "p"]  # m is what p reads


def test_a_second_run_changes_nothing():
    data = Samples({"x": normal(64, seed=seed)} for seed in range(8))
    model = model_from(f"g {XY} {{ m = MatMul(x, w)  y = Tanh(m) }}", w=sparse(64, 48))
    assert Calibrate(data=data, outputs="sparse")(model).modified
    assert not Calibrate(data=data, outputs="sparse")(model).modified
    assert Quantize(outputs="sparse")(model).modified
    assert not Quantize(outputs="sparse")(model).modified


RESIDUAL = """(float[n, 32, 8, 8] x) => (float[n, 32, 8, 8] y) {
    c = Conv <pads = [1, 1, 1, 1]> (x, w)  s = Add(c, x)  r = Relu(s)  y = Tanh(r) }"""


@pytest.mark.parametrize(("target", "value"), [("tensorrt", "r"), ("tensorrt-rtx", "c")])
def test_the_residual_sum_of_a_convolution_belongs_to_it_where_the_target_says_so(target, value):
    model, _ = quantized(RESIDUAL, target=target, sample=(32, 8, 8), w=sparse(32, 32, 3, 3, axis=1))
    assert in_integers(model)[-1] == value


def test_half_precision_reads_and_makes_the_same_integers():
    model, _ = quantized(f"{XY} {{ m = MatMul(x, w)  y = Gelu(m) }}", w=sparse(64, 48))
    before = session(model).run(None, {"x": normal(30, 64, seed=9)})[0]
    Half(target="tensorrt-rtx")(model)
    after = session(model).run(None, {"x": normal(30, 64, seed=9)})[0]
    assert np.abs(after - before).max() < 0.02 * np.abs(before).max()


LAYOUTS = {
    "MatMul": ("float[n, 64] x", "MatMul(x, w)", (64, 48), 0),
    "Gemm": ("float[n, 64] x", "Gemm(x, w)", (64, 48), 0),
    "turned Gemm": ("float[n, 64] x", "Gemm <transB = 1> (x, w)", (48, 64), 1),
    "Conv": ("float[n, 32, 8, 8] x", "Conv(x, w)", (48, 32, 3, 3), 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pattern_is_looked_for_along_the_inputs(layout):
    x, call, shape, axis = LAYOUTS[layout]
    weight = sparse(*shape, axis=axis)
    for change in (False, True):
        if change:
            place = tuple(np.argwhere(weight == 0)[7])
            weight[place] = 1.0
        model = model_from(f"g ({x}) => (float[n] y) {{ y = {call} }}", w=weight)
        (site,) = plan(model, find_target("tensorrt-rtx")).roots
        assert is_two_of_four(site) is not change
        assert zeros_of(model)[0].two_of_four is not change


@pytest.mark.parametrize("opset", [20, 21, 23])
def test_a_runtime_that_moves_pairs_loads_the_model_at_every_opset(opset):
    """Onnxruntime copies a pair to behind what moves numbers, and types the copy from its zero point."""
    text = "(float[n, 8, 64] x) => (float[n, 4, 8, 12] y) {"
    text += " m = MatMul(x, w)  r = Reshape(m, s)  t = Transpose <perm = [0, 2, 1, 3]> (r)  y = Tanh(t) }"
    weights = {"w": sparse(64, 48), "s": np.array([0, 0, 4, 12])}
    model, _ = quantized(text, sample=(8, 64), opset=opset, **weights)
    assert in_integers(model) == ["x", "m"]
    x = normal(5, 8, 64, seed=9)
    (expected,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    np.testing.assert_allclose(session(model).run(None, {"x": x})[0], expected, atol=1e-4)


TANH = f"{XY} {{ m = MatMul(x, w)  y = Tanh(m) }}"


def row_signal(rows, span):
    """Mean over rows of error over power, in dB; rows of next to nothing have a floor."""
    power, error = (rows**2).sum(axis=1), ((integers_for(span, "int8").apply(rows) - rows) ** 2).sum(axis=1)
    return -10 * np.log10((error / (power + 0.01 * np.median(power))).mean())


def test_a_few_large_rows_do_not_decide_the_range_of_an_output():
    data = Samples({"x": normal(64, seed=seed) * (300 if seed == 3 else 1)} for seed in range(60))
    model, rows = model_from(f"g {TANH}", w=sparse(64, 48)), np.stack([sample["x"] for sample in data]) @ sparse(64, 48)
    Calibrate(data=data, outputs="sparse")(model)
    made = model.graph[0].outputs[0]
    reach = np.abs(rows).max()
    assert range_of(made).high < 0.1 * reach
    assert made.meta[SQNR_KEY] == pytest.approx(row_signal(rows, range_of(made)), abs=0.01)
    wide = Range(rows.min(), rows.max())
    assert row_signal(rows, range_of(made)) > row_signal(rows, wide) + 10
    for share in np.linspace(0.01, 1, 50):
        assert row_signal(rows, Range(share * wide.low, share * wide.high)) < made.meta[SQNR_KEY] + 1


def test_an_output_whose_rows_would_suffer_stays_in_float():
    model = calibrated(TANH, w=sparse(64, 48))
    found = model.graph[0].outputs[0].meta[SQNR_KEY]
    for least, told in ((found - 0.1, BOTH), (found + 0.1, "weight and activation")):
        work = model.clone()
        decisions = Quantize(outputs="sparse", min_output_sqnr=least)(work).decisions
        assert decisions[0].reason == told
        assert in_integers(work) == (["x", "m"] if told == BOTH else ["x"])
    assert decisions[1].reason == f"output stays in float: SQNR of its rows below {least:g} dB"


def test_an_output_that_a_product_reads_has_the_range_that_is_best_for_it():
    text = f"{XY} {{ m = MatMul(x, w)  p = MatMul(m, v)  t = Tanh(m)  y = Add(p, t) }}"
    weights = {"w": sparse(64, 48), "v": normal(48, 48)}
    ranges = [range_of(calibrated(text, outputs=o, **weights).graph[0].outputs[0]) for o in ("none", "sparse")]
    assert ranges[0] == ranges[1] is not None


@pytest.mark.parametrize("method", ["minmax", "mse", "percentile", "entropy"])
def test_outputs_have_the_method_that_was_asked_for(method):
    data = Samples({"x": normal(64, seed=seed)} for seed in range(8))
    model = model_from(f"g {TANH}", w=sparse(64, 48))
    Calibrate(data=data, outputs="sparse", method=method)(model)
    rows = np.stack([sample["x"] for sample in data]) @ sparse(64, 48)
    found = range_of(model.graph[0].outputs[0])
    assert 0.5 * rows.max() < found.high <= rows.max() * 1.0001
