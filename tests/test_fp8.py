"""Floating 8-bit numbers: the format itself, its scales, and the graphs that hold it."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from helpers import Samples
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto as T
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qexport.calibration.calibrate import Calibrate
from qexport.calibration.statistics.histogram import Histogram
from qexport.calibration.statistics.methods import METHODS, mse
from qexport.errors import UsageError
from qexport.exporter.engines.engine import EngineOptions, build_engine
from qexport.passes.half import Half
from qexport.passes.numbers.formats import FORMATS
from qexport.passes.numbers.range import (
    RANGE_KEY,
    SMALLEST_SCALE,
    SQNR_KEY,
    Range,
    beyond_half,
    half_precision,
    integers_for,
)
from qexport.passes.numbers.weights import misfit, quantize_weight
from qexport.passes.quantize import Quantize
from qexport.passes.target import TARGETS
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.session import SessionOptions

E4M3 = ml_dtypes.float8_e4m3fn
GRID = np.arange(127, dtype=np.uint8).view(E4M3).astype(np.float64)  # 0, 2^-9, ..., 448
RNG = np.random.default_rng(0)
PRODUCT = "g (float[n, 32] x) => (float[n, 24] y) { y = MatMul(x, w) }"


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def model_from(text, opset=20, **weights):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def product(w, span=(-4.0, 4.0), opset=20, text=PRODUCT):
    model = model_from(text, opset, w=w)
    model.graph.inputs[0].meta[RANGE_KEY] = Range(*span)
    return model


def run(model, **feeds):
    """onnxruntime with the Q/DQ nodes as they are written."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return list(OrtSession(proto.SerializeToString(), SessionOptions(threads=1, literal=True)).run(feeds).values())


def pair(scale):
    zero = helper.make_tensor("z", T.FLOAT8E4M3FN, (), b"\0", raw=True)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, T.FLOAT, ["n"]) for name in "xy"]
    graph = helper.make_graph(
        nodes, "g", values[:1], values[1:], [zero, numpy_helper.from_array(np.float32(scale), "s")]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def by_hand(x, scale):
    """The nearest grid point, the even one of two, written without the format's own cast."""
    steps = np.minimum(np.abs(np.asarray(x, np.float32) / np.float32(scale)).astype(np.float64), 448.0)
    above = np.clip(np.searchsorted(GRID, steps), 1, len(GRID) - 1)
    low, high = GRID[above - 1], GRID[above]
    up = (steps - low > high - steps) | ((steps - low == high - steps) & (above % 2 == 0))
    return np.sign(x) * np.where(up, high, low) * scale


@settings(deadline=None, max_examples=30)
@given(st.floats(2.0**-14, 100), st.integers(0, 2**32 - 1))
def test_numbers_are_those_of_onnxruntime_of_onnx_and_of_the_grid_bit_for_bit(scale, seed):
    scale = float(np.float16(scale))
    rng = np.random.default_rng(seed)
    ties = (GRID[1:] + GRID[:-1]) / 2
    steps = np.concatenate([rng.standard_normal(500) * 10.0 ** rng.integers(-3, 4), GRID, -ties, ties * 1.0001])
    x = (steps * scale).astype(np.float32)
    numbers = integers_for(Range(-448 * scale, 448 * scale), "fp8")
    assert numbers.scale == scale
    mine = numbers.apply(x)
    np.testing.assert_array_equal(mine, by_hand(x, scale))
    proto = pair(scale)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], mine.astype(np.float32))
    np.testing.assert_array_equal(ReferenceEvaluator(proto).run(None, {"x": x})[0], mine.astype(np.float32))


def test_what_lies_beyond_the_range_saturates_and_is_never_nan():
    numbers = integers_for(Range(-1.0, 1.0), "fp8")
    x = np.array([1e30, -1e30, 3.4e38, 1.04, -1.04, np.inf], np.float32)
    np.testing.assert_allclose(np.abs(numbers.apply(x)), 1.0, rtol=2e-3)


@pytest.mark.parametrize("outlier", [1.0, 1000.0])
def test_small_values_keep_their_digits_beside_an_outlier_where_int8_loses_them(outlier):
    x = np.concatenate([normal(5000), [4.0 * outlier]])
    span = Range(float(x.min()), float(x.max()))
    noise = {kind: np.square(integers_for(span, kind).apply(x) - x)[:-1].mean() for kind in ("int8", "fp8")}
    if outlier > 1:
        assert noise["fp8"] < 2e-3
        assert noise["int8"] > 0.3
    else:
        assert noise["fp8"] > noise["int8"]


def test_a_quantized_product_computes_what_the_formula_says_and_its_file_holds_fp8():
    w, x = normal(32, 24) * np.logspace(-2, 1, 24).astype(np.float32), normal(50, 32)
    model = product(w, (-2.0, 3.0))
    assert Quantize(format="fp8")(model).modified
    held, scale = quantize_weight(w, 1, half=True, kind="fp8")
    expected = integers_for(Range(-2.0, 3.0), "fp8").apply(x) @ (held.astype(np.float64) * scale)
    np.testing.assert_allclose(run(model, x=x)[0], expected, rtol=1e-4, atol=1e-4)
    (reference,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    np.testing.assert_allclose(reference, expected, rtol=1e-4, atol=1e-4)
    kinds = {name: value.const_value.dtype for name, value in model.graph.initializers.items()}
    assert kinds["w/fp8"] == kinds["x/zero_point"] == kinds["w/zero_point"] == ir.DataType.FLOAT8E4M3FN
    assert "w" not in kinds
    result = Quantize(format="fp8")(model)
    assert not result.modified
    assert [d.reason for d in result.decisions] == ["already quantized"]


@pytest.mark.parametrize("activation", ["Relu(h)", "Clip(h, low, high)"])
def test_a_run_of_the_file_as_written_keeps_the_activation_before_a_quantizer(activation):
    text = f"g (float[n, 32] x) => (float[n, 16] y) {{ h = MatMul(x, w)  r = {activation}  y = MatMul(r, v) }}"
    w, v, x = normal(32, 24), normal(24, 16), normal(20, 32)
    bounds = {"low": np.float32(-1), "high": np.float32(6)} if "low" in text else {}
    model = model_from(text, w=w, v=v, **{name: np.array(value) for name, value in bounds.items()})
    for node in model.graph:
        node.inputs[0].meta[RANGE_KEY] = Range(-20.0, 20.0)
    Quantize(format="fp8")(model)
    exact = np.clip(x @ w, bounds.get("low", 0), bounds.get("high", np.inf)) @ v
    assert np.square(run(model, x=x)[0] - exact).sum() < 1e-2 * np.square(exact).sum()


def test_half_precision_leaves_the_quantized_numbers_as_they_were():
    w, x = normal(32, 24), normal(50, 32)
    model = product(w)
    Quantize(format="fp8")(model)
    before = run(model, x=x)[0]
    Half()(model)
    assert any(
        v.const_value.dtype == ir.DataType.FLOAT16 and v.const_value.size == 24
        for v in model.graph.initializers.values()
    )
    np.testing.assert_allclose(run(model, x=x)[0], before, atol=0.05)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1]), st.booleans())
def test_each_channel_gets_the_best_of_the_scales_tried_and_none_is_worse_than_absmax(seed, axis, half):
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((6, 8)) * 10.0 ** rng.uniform(-2, 2, (1, 8))).astype(np.float32)
    held, scale = quantize_weight(w, axis, half=half, kind="fp8")
    assert held.dtype == E4M3
    assert held.shape == w.shape
    for index in range(w.shape[axis]):
        channel = np.take(w, index, axis).astype(np.float64)
        found = np.square(np.take(held, index, axis).astype(np.float64) * scale[index] - channel).sum()
        largest = np.abs(channel).max()
        scales = [largest / 448 * 2 ** (i / 8) for i in range(8)]
        scales = [float(half_precision(tried)) for tried in scales] if half else scales
        errors = [np.square(by_hand(channel, tried) - channel).sum() for tried in scales]
        assert found <= min(errors) * 1.0001 + 1e-30
        assert largest / 448 * 0.999 <= scale[index] <= max(largest / 448, SMALLEST_SCALE) * 2


def test_a_channel_of_zeros_gets_a_positive_scale():
    held, scale = quantize_weight(np.zeros((3, 4)), 0, kind="fp8")
    assert np.all(scale > 0)
    assert not held.astype(np.float32).any()


def test_the_exponent_makes_up_for_a_scale_that_float16_raises():
    w = normal(64, 500) * np.float32(1e-4)  # a scale of 2^-14 is twenty times too large for int8
    assert misfit(w, 0, half=True, kind="int8") is not None
    assert misfit(w, 0, half=True, kind="fp8") is None
    assert misfit(w * np.float32(1e-3), 0, half=True, kind="fp8") == "weights too small for float16 scales"
    span = Range(-(2.0**-12) * 7, 0.0)
    assert beyond_half(span, "int8") is not None
    assert beyond_half(span, "fp8") is None
    assert beyond_half(Range(-(2.0**-14), 0.0), "fp8") is not None
    x = normal(500) * np.float32(2.0**-12)
    noise = np.square(integers_for(span, "fp8").apply(x) - x).sum()
    assert noise < 1e-2 * np.square(x).sum()


def outliers(size=100_000):
    x = np.random.default_rng(0).standard_normal(size)
    x[:20] *= 20
    return x.astype(np.float32)


@pytest.mark.parametrize("spread", [1.0, 1.3, 1.7])
def test_mse_searches_the_real_grid_clips_and_stretches_alike(spread):
    x = np.concatenate([outliers(20_000), [100.0 * spread]]).astype(np.float32)
    histogram = Histogram()
    histogram.add(x)
    low, high = float(x.min()), float(x.max())

    def error(span):
        return float(np.square(by_hand(x, integers_for(span, "fp8").scale) - x).sum())

    best = min(error(Range(low * share, high * share)) for share in np.linspace(0.2, 1.9, 35))
    found = mse(histogram, "fp8")
    assert error(found) <= best * 1.1  # one value decides, and the error has many minima
    assert error(found) <= error(Range(low, high))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_gives_a_usable_scale(name):
    for x in (outliers(5000), np.zeros(5, np.float32), np.abs(outliers(5000))):
        histogram = Histogram()
        histogram.add(x)
        span = METHODS[name](histogram, "fp8")
        assert 2 * histogram.low <= span.low <= 0 <= span.high <= 2 * histogram.high
        assert np.isfinite(integers_for(span, "fp8").scale)
        assert integers_for(span, "fp8").scale >= SMALLEST_SCALE


def test_entropy_measures_the_grid_and_so_clips_less_than_for_evenly_spaced_numbers():
    histogram = Histogram()
    histogram.add(outliers())
    spans = {kind: METHODS["entropy"](histogram, kind).high for kind in ("int8", "fp8")}
    assert spans["fp8"] > 2 * spans["int8"]


def test_calibration_searches_ranges_and_rates_layers_for_the_format():
    w = normal(32, 24)
    data = Samples({"x": normal(32) * np.float32(30 if i == 0 else 1)} for i in range(60))
    histogram, models = Histogram(), {}
    histogram.add(np.stack([sample["x"] for sample in data]))
    for name in (None, "fp8"):
        model = models[name] = model_from(PRODUCT, w=w)
        Calibrate(data=data, method="mse", format=name)(model)
        assert model.graph.inputs[0].meta[RANGE_KEY] == METHODS["mse"](histogram, name or "int8")
    rated = {name: model.graph[0].meta[SQNR_KEY] for name, model in models.items()}
    assert abs(rated["fp8"] - 29) < 3
    assert rated[None] != rated["fp8"]


@pytest.mark.parametrize(
    "step", [Quantize(target="ort-cpu", format="fp8"), Calibrate(Samples(), target="ort-cpu", format="fp8")]
)
def test_a_target_that_does_not_read_fp8_is_a_usage_error_that_names_those_that_do(step):
    model = product(normal(32, 24))
    with pytest.raises(UsageError, match="target ort-cpu does not read fp8") as caught:
        step(model)
    assert "tensorrt-rtx" in caught.value.hint
    assert caught.value.where.endswith(".format")
    assert [node.op_type for node in model.graph] == ["MatMul"]


def test_the_rows_of_onnxruntime_are_right_that_it_refuses_merged_fp8():
    model = product(normal(32, 24))
    Quantize(format="fp8")(model)
    with pytest.raises(Exception, match=r"float8e4m3fn.*MatMulIntegerToFloat"):
        ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("opset", "modified"), [(13, False), (18, False), (19, True)])
def test_an_opset_without_the_type_is_left_alone(opset, modified):
    result = Quantize(format="fp8")(product(normal(32, 24), opset=opset))
    assert result.modified == modified
    if not modified:
        assert [d.reason for d in result.decisions] == [f"needs opset 19, model has {opset}"]


def test_a_tied_table_is_stored_as_int8_rows_and_multiplied_in_fp8():
    text = """g (int64[n] ids) => (float[n, 2048] y) { r = Gather(table, ids)  y = Gemm <transB = 1> (r, table) }"""
    table = normal(2048, 64)
    model = model_from(text, table=table)
    model.graph[0].outputs[0].meta[RANGE_KEY] = Range(-4.0, 4.0)
    target = replace(TARGETS["tensorrt-rtx"], min_dim=16)
    assert target.table == "dequantize"
    assert Quantize(format="fp8")(model).modified
    ids = np.arange(5)
    exact = table[ids] @ table.T
    assert np.square(run(model, ids=ids)[0] - exact).sum() < 5e-3 * np.square(exact).sum()


def test_attention_products_take_the_format_on_both_sides():
    text = "g (float[n, s, 32] q, float[n, 32, s] k) => (float[n, s, s] y) { y = MatMul(q, k) }"
    model = model_from(text)
    for value in model.graph.inputs:
        value.meta[RANGE_KEY] = Range(-3.0, 3.0)
    assert Quantize(attention=True, format="fp8")(model).modified
    q, k = normal(1, 5, 32), normal(1, 32, 5)
    numbers = integers_for(Range(-3.0, 3.0), "fp8")
    np.testing.assert_allclose(run(model, q=q, k=k)[0], numbers.apply(q) @ numbers.apply(k), atol=1e-4)


def test_the_edges_of_the_grid_part_its_magnitudes():
    edges = FORMATS["fp8"].edges * 448
    assert len(edges) == 128
    assert np.all((edges[:-1] <= GRID) & (edges[1:] >= GRID))


@pytest.mark.rtx
@pytest.mark.parametrize("half", [False, True])
def test_tensorrt_rtx_builds_products_convolutions_and_tables(half):
    rtx = pytest.importorskip("tensorrt_rtx")
    text = """g (int64[n, s] ids, float[n, 16, 8, 8] image) => (float[n, s, 64] y, float[n, 32, 6, 6] z) {
        t = Gather(table, ids)  h = MatMul(t, w)  r = Relu(h)  y = MatMul(r, v)  z = Conv(image, k) }"""
    weights = {"table": normal(2048, 64), "w": normal(64, 128), "v": normal(128, 64), "k": normal(32, 16, 3, 3)}
    model = model_from(text, **weights)
    for node in model.graph:
        node.inputs[0].meta[RANGE_KEY] = Range(-9.0, 9.0)
    assert sum(d.action == "quantized" for d in Quantize(format="fp8")(model).decisions) == 4
    if half:
        Half()(model)
    shapes = {"ids": [(1, 4), (2, 8), (4, 16)], "image": [(1, 16, 8, 8), (2, 16, 8, 8), (4, 16, 8, 8)]}
    engine = build_engine(ir.to_proto(model).SerializeToString(), rtx, EngineOptions(profiles=(shapes,)))
    assert len(engine.plan) > 1000
