"""A model with systematic activation outliers: what ruins plain int8, and what each remedy brings back."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qexport.calibration.calibrate import Calibrate
from qexport.calibration.observe import Observe
from qexport.passes.dynamic import Dynamic
from qexport.passes.folding.activation import activation_of
from qexport.passes.llm_int8 import LlmInt8
from qexport.passes.quantize import Quantize
from qexport.passes.smooth import Smooth

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def data(outlier_model):
    return outlier_model.sentences(16, seed=1)


@pytest.fixture(scope="module")
def unseen(outlier_model):
    return outlier_model.sentences(8, seed=2)


@pytest.fixture(scope="module")
def clean(outlier_model):
    return outlier_model.transformer()


@pytest.fixture(scope="module")
def wide(outlier_model, clean):
    model = clean.clone()
    assert outlier_model.widen_norms(model) == 4
    return model


@pytest.fixture(scope="module")
def lifted(outlier_model, clean):
    model = clean.clone()
    outlier_model.lift_residual(model, "table")
    return model


@pytest.fixture(scope="module")
def truth(outlier_model, clean, unseen):
    return outlier_model.outputs(clean, unseen)


@pytest.fixture(scope="module")
def score(outlier_model, truth, unseen):
    """Output SQNR of a model after some passes, and how many nodes the last of them quantized."""

    def measure(model, *passes):
        work, result = model.clone(), None
        for step in passes:
            result = step(work)
        decisions = () if result is None else result.decisions
        count = sum(decision.action == "quantized" for decision in decisions)
        return outlier_model.decibel(truth, outlier_model.outputs(work, unseen)), count

    return measure


def plain(data, target="ort-cpu", **options):
    return Calibrate(data=data, target=target, method="minmax"), Quantize(target=target, **options)


def relative(one, other):
    return np.linalg.norm(one - other) / np.linalg.norm(one)


@pytest.mark.parametrize("factor", [3.0, 200.0, 1000.0])
def test_wide_norms_leave_the_function_as_it_was(outlier_model, clean, truth, unseen, factor):
    model = clean.clone()
    outlier_model.widen_norms(model, factor)
    assert relative(truth, outlier_model.outputs(model, unseen)) < 1e-5


def test_a_power_of_two_changes_no_bit(outlier_model, clean, truth, unseen):
    model = clean.clone()
    outlier_model.widen_norms(model, 256.0)
    assert np.array_equal(truth, outlier_model.outputs(model, unseen))


def test_a_lifted_residual_stream_leaves_the_function_as_it_was(outlier_model, lifted, truth, unseen):
    assert relative(truth, outlier_model.outputs(lifted, unseen)) < 1e-5


def test_the_outliers_are_in_a_few_columns_of_what_linear_layers_read(wide, data):
    model = wide.clone()
    Observe(data=data)(model)
    for name in ("q0", "u0", "q1", "u1"):
        (node,) = (node for node in model.graph if node.name == name)
        reach = activation_of(node.inputs[0]).reach
        assert np.sum(reach > 50 * np.median(reach)) == 2


TEXT = """<ir_version: 10, opset_import: ["" : 23]> g (float[n, 32] x) => (float[n, 24] y, float[n, 32] z) {
    h = RMSNormalization (x, g)  y = Gemm <transB = 1> (h, w)  k = LayerNormalization (x, g)  m = MatMul(k, v)
    z = Add(m, k) }"""


def test_norms_are_left_alone_where_something_else_reads_them(outlier_model):
    proto = onnx.parser.parse_model(TEXT)
    sizes = {"g": 32, "w": (24, 32), "v": (32, 32)}
    for name, size in sizes.items():
        array = RNG.standard_normal(size).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    before = model.clone()
    assert outlier_model.widen_norms(model, 100.0) == 1
    data = outlier_model.Samples([{"x": RNG.standard_normal(32).astype(np.float32)} for _ in range(4)])
    assert relative(outlier_model.outputs(before, data), outlier_model.outputs(model, data)) < 1e-5
    (gemm,) = (node for node in model.graph if node.op_type == "Gemm")
    assert "outliers" in gemm.inputs[1].name


def test_without_outliers_int8_is_close(score, clean, data):
    found, count = score(clean, *plain(data, min_sqnr=0.0))
    assert found > 38
    assert count == 12


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt-rtx"])
def test_plain_int8_collapses(score, wide, data, target):
    found, count = score(wide, *plain(data, target, min_sqnr=0.0))
    assert found < 10
    assert count == 12


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_ranges_per_call_do_not_help_against_columns(score, wide, granularity):
    assert score(wide, Dynamic(granularity=granularity))[0] < 12


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt-rtx"])
def test_smoothing_brings_everything_back(score, wide, data, target):
    steps = (Observe(data=data, target=target), Smooth(target=target), *plain(data, target, min_sqnr=0.0))
    found, count = score(wide, *steps)
    assert found >= 35
    assert count == 12


def test_outliers_multiplied_in_float_bring_everything_back(score, wide, data):
    found, count = score(wide, Observe(data=data, target="ort-cpu"), LlmInt8(target="ort-cpu"))
    assert found >= 40
    assert count == 12


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt-rtx"])
def test_so_they_do_with_static_ranges(score, wide, data, target):
    found, count = score(wide, Observe(data=data, target=target), LlmInt8(target=target, ranges="static"))
    assert found >= 38
    assert count == 12


def test_the_rating_of_layers_keeps_those_with_outliers_in_float(score, wide, data):
    found, count = score(wide, *plain(data))
    assert found >= 40
    assert count == 4  # the two output projections and the two down projections


def test_a_placement_per_consumer_does_not_see_outliers_of_the_residual_stream(score, lifted, clean, data):
    found, _ = score(lifted, *plain(data, min_sqnr=0.0))
    assert found == pytest.approx(score(clean, *plain(data, min_sqnr=0.0))[0], abs=1.0)
    assert found > 38


def test_int8_sums_and_norm_inputs_collapse_with_them(outlier_model, score, lifted, clean, data):
    def everything(model):
        assert outlier_model.quantize_all(model, data) == 13
        return Quantize()(model)

    assert score(lifted, *plain(data, min_sqnr=0.0), everything)[0] < 10
    assert score(clean, *plain(data, min_sqnr=0.0), everything)[0] > 25
