import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import session
from onnx.reference import ReferenceEvaluator

from qexport.errors import UsageError
from qexport.exporter.engines.engine import EngineOptions, build_engine
from qexport.passes.dynamic import Dynamic
from qexport.passes.folding.activation import ACTIVATION_KEY, Activation
from qexport.passes.half import Half
from qexport.passes.llm_int8 import LlmInt8
from qexport.passes.numbers.range import Range, integers_for

RNG = np.random.default_rng(0)
OUTLIERS = (3, 17)
TEXT = "g (float[n, s, 32] x) => (float[n, s, 24] y) { y = MatMul(x, w) }"


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def activation(*shape, outliers=OUTLIERS):
    """Values as of a language model: a few columns are a hundred times larger."""
    x = np.clip(normal(*shape), -3, 3)
    x[..., list(outliers)] *= 100
    return x


def model_from(text, opset=21, dtype=np.float32, **weights):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    for name, value in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(dtype), name))
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{index}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def observed(model, **seen):
    """Leave on each named value what ``observe`` would."""
    values = {value.name: value for node in model.graph for value in node.inputs if value is not None}
    for name, x in seen.items():
        rows = x.reshape(-1, x.shape[-1])
        values[name].meta[ACTIVATION_KEY] = Activation(-1, rows.min(axis=0), rows.max(axis=0), rows)
    return model


def product(x, w=None, **options):
    return observed(model_from(TEXT, **options, w=normal(32, 24) if w is None else w), x=x)


def run(model, **feeds):
    return session(model).run(None, feeds)


def ops(model):
    return [node.op_type for node in model.graph]


def decibel(truth, found):
    return 10 * np.log10(np.square(truth).sum() / np.square(truth - found).sum())


def reasons(model, **options):
    before = ir.to_proto(model).SerializeToString()
    result = LlmInt8(**options)(model)
    assert not result.modified
    assert ir.to_proto(model).SerializeToString() == before
    assert {d.action for d in result.decisions} <= {"skipped"}
    return {d.node: d.reason for d in result.decisions}


def without(numbers, axis=-1):
    cleared = numbers.copy()
    np.moveaxis(cleared, axis, 0)[list(OUTLIERS)] = 0
    return cleared


def columns(w, half=False):
    """Integers times scales of a weight, one scale a column; float16 scales where an engine reads them."""
    scale = np.abs(w).max(axis=0) / np.float32(127)
    if half:
        rounded = scale.astype(np.float16)
        scale = np.where(rounded < scale, np.nextafter(rounded, np.float16(np.inf)), rounded).astype(np.float32)
    return np.rint(w / scale).astype(np.float64) * scale


def outlier_part(x, w):
    return x[..., list(OUTLIERS)].astype(np.float64) @ w[list(OUTLIERS)]


def token_by_hand(x, w):
    rest = without(x)
    scale = np.abs(rest).max(axis=-1, keepdims=True) / np.float32(127)
    return np.rint(rest / scale) * scale.astype(np.float64) @ columns(without(w, 0)) + outlier_part(x, w)


def static_by_hand(x, w, target):
    rest, kind = without(x), "uint8" if target == "ort-cpu" else "int8"
    half = target != "ort-cpu"
    numbers = integers_for(Range(float(rest.min()), float(rest.max())), kind, half=half)
    return numbers.apply(rest) @ columns(without(w, 0), half) + outlier_part(x, w)


def agree(model, expected, x):
    (reference,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    for found in (reference, *run(model, x=x)):
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_per_token_it_computes_what_the_formula_says():
    x, w = activation(2, 9, 32), normal(32, 24)
    model = product(x, w)
    result = LlmInt8(target="ort-cpu")(model)
    assert [(d.action, d.reason) for d in result.decisions] == [("quantized", "2 outlier columns in float")]
    agree(model, token_by_hand(x, w), x)


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt-rtx"])
def test_with_static_ranges_it_computes_what_the_formula_says(target):
    x, w = activation(2, 9, 32), normal(32, 24)
    model = product(x, w)
    assert LlmInt8(target=target, ranges="static")(model).modified
    agree(model, static_by_hand(x, w, target), x)


def test_outliers_beyond_what_calibration_saw_are_still_exact():
    x, w = activation(2, 9, 32), normal(32, 24)
    for options in ({"target": "ort-cpu"}, {"target": "tensorrt-rtx"}):
        model = product(x, w)
        LlmInt8(**options)(model)
        larger = x.copy()
        larger[..., list(OUTLIERS)] *= 50
        assert decibel(larger @ w, run(model, x=larger)[0]) > 60


def test_plain_int8_loses_what_the_decomposition_keeps():
    x, w = activation(2, 50, 32), normal(32, 24)
    w[list(OUTLIERS)] /= 100  # as in a trained model, where outliers do not drown the others
    plain, split = product(x, w), product(x, w)
    Dynamic(granularity="token")(plain)
    LlmInt8(target="ort-cpu")(split)
    assert decibel(x @ w, run(plain, x=x)[0]) < 10
    assert decibel(x @ w, run(split, x=x)[0]) >= 40


def test_without_outliers_it_is_plain_quantization_per_token():
    x, w = normal(2, 9, 32), normal(32, 24)
    split, plain = product(x, w), product(x, w)
    result = LlmInt8(target="ort-cpu")(split)
    assert [d.reason for d in result.decisions] == ["0 outlier columns in float"]
    Dynamic(granularity="token")(plain)
    assert ops(split) == ops(plain)
    assert np.array_equal(run(split, x=x)[0], run(plain, x=x)[0])


def test_without_outliers_and_with_static_ranges_it_is_one_pair_of_quantizers():
    model = product(normal(2, 9, 32))
    LlmInt8()(model)
    assert ops(model) == ["DequantizeLinear", "QuantizeLinear", "DequantizeLinear", "MatMul"]


def test_float_holds_the_outlier_rows_alone():
    model = product(activation(2, 9, 32))
    LlmInt8(target="ort-cpu")(model)
    sizes = {v.const_value.shape.numpy(): v.const_value.dtype for v in model.graph.initializers.values()}
    assert sizes[(32, 24)] == ir.DataType.INT8
    assert sizes[(2, 24)] == ir.DataType.FLOAT
    static = product(activation(2, 9, 32))
    LlmInt8()(static)
    assert "w" not in static.graph.initializers
    assert [v.const_value.dtype for v in static.graph.initializers.values() if v.const_value.size == 32 * 24] == [
        ir.DataType.INT8
    ]


@pytest.mark.parametrize("ranges", ["token", "static"])
def test_products_of_one_activation_share_what_they_read(ranges):
    text = """g (float[n, s, 32] x) => (float[n, s, 24] y, float[n, s, 24] z, float[n, s, 32] r) {
        y = MatMul(x, w)  z = MatMul(x, v)  r = Add(x, x) }"""
    x, w, v = activation(2, 9, 32), normal(32, 24), normal(32, 24)
    model = observed(model_from(text, w=w, v=v), x=x)
    LlmInt8(target="ort-cpu", ranges=ranges)(model)
    made = ops(model)
    assert (made.count("Gather"), made.count("QuantizeLinear"), made.count("Add")) == (1, 1, 3)
    y, z, r = run(model, x=x)
    assert min(decibel(x @ w, y), decibel(x @ v, z)) > 60
    assert np.array_equal(r, x + x)


def test_a_weight_that_two_products_read_is_cut_for_each():
    text = """g (float[n, 32] x, float[n, 32] u) => (float[n, 24] y, float[n, 24] z) {
        y = MatMul(x, w)  z = MatMul(u, w) }"""
    x, u, w = activation(50, 32), activation(50, 32, outliers=(5,)), normal(32, 24)
    for ranges in ("token", "static"):
        model = observed(model_from(text, w=w), x=x, u=u)
        LlmInt8(target="ort-cpu", ranges=ranges)(model)
        y, z = run(model, x=x, u=u)
        assert min(decibel(x @ w, y), decibel(u @ w, z)) > 50


GEMMS = {
    "plain": "y = Gemm(x, w)",
    "with a bias": "y = Gemm(x, w, b)",
    "transposed": "y = Gemm <transB = 1> (x, t, b)",
    "scaled": "y = Gemm <transB = 1, alpha = -0.5, beta = 3.0> (x, t, b)",
}


@pytest.mark.parametrize("ranges", ["token", "static"])
@pytest.mark.parametrize("case", GEMMS)
def test_every_spelling_of_gemm_computes_the_same_product(case, ranges):
    words = set(GEMMS[case].translate(str.maketrans("(),", "   ")).split())
    weights = {"w": normal(32, 24), "t": normal(24, 32), "b": 100 * normal(24)}
    weights = {name: value for name, value in weights.items() if name in words}
    x = activation(50, 32)
    model = observed(model_from(f"g (float[n, 32] x) => (float[n, 24] y) {{ {GEMMS[case]} }}", **weights), x=x)
    (expected,) = run(model, x=x)
    assert LlmInt8(target="ort-cpu", ranges=ranges)(model).modified
    assert 50 < decibel(expected, run(model, x=x)[0]) < 90


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt-rtx"])
def test_a_second_run_changes_nothing(target):
    model = product(activation(2, 9, 32))
    LlmInt8(target=target)(model)
    before = ir.to_proto(model).SerializeToString()
    result = LlmInt8(target=target)(model)
    assert not result.modified
    assert [d.reason for d in result.decisions] == ["already quantized"]
    assert ir.to_proto(model).SerializeToString() == before


def test_the_threshold_says_what_an_outlier_is():
    x = normal(2, 9, 32)
    x[0, 0] = 0
    x[0, 0, 5], x[1, 1, 9] = 5.9, -6.1
    counts = {}
    for threshold in (5.0, 6.0, 7.0):
        result = LlmInt8(target="ort-cpu", threshold=threshold)(product(x))
        counts[threshold] = result.decisions[0].reason
    assert [counts[key].split()[0] for key in (5.0, 6.0, 7.0)] == ["2", "1", "0"]


def test_a_relative_threshold_does_not_depend_on_the_unit():
    x = activation(2, 9, 32)
    for unit in (1e-3, 1.0, 1e3):
        result = LlmInt8(target="ort-cpu", relative=20.0)(product(x * np.float32(unit)))
        assert result.decisions[0].reason == "2 outlier columns in float"
    assert LlmInt8(target="ort-cpu")(product(x * np.float32(1e-3))).decisions[0].reason.startswith("0 ")
    assert "outliers" in reasons(product(x * np.float32(1e3)), target="ort-cpu")["MatMul_0"]


def test_what_is_not_quantized_has_a_reason():
    x = activation(2, 9, 32)
    assert reasons(product(x), max_share=0.05) == {"MatMul_0": "more than 0.05 of its columns are outliers"}
    assert reasons(product(x), keep=("MatMul_0",)) == {"MatMul_0": "kept in float by name"}
    assert reasons(product(np.zeros_like(x))) == {"MatMul_0": "its input is always zero"}
    assert reasons(product(1e8 * normal(2, 9, 32)), max_share=1.0, threshold=1e12) == {
        "MatMul_0": "its range is too large for a float16 scale"
    }
    assert reasons(product(x, normal(32, 24) * np.float32(1e8))) == {"MatMul_0": "weights too large for float16 scales"}
    assert reasons(product(x, opset=18)) == {"": "needs opset 19, model has 18"}
    assert reasons(product(x, opset=20), target="ort-cpu") == {"": "needs opset 21, model has 20"}
    text = """g (float[n, 16, 8, 8] a, float[n, 32] x, float[n, 32] u) => (float b, float[n, 24] y, float[n, 24] z) {
        b = Conv(a, k)  y = MatMul(x, w)  z = MatMul(u, w) }"""
    model = observed(model_from(text, w=normal(32, 24), k=normal(16, 16, 3, 3)), x=x[0])
    found = {d.node: d.reason for d in LlmInt8(target="ort-cpu")(model).decisions}
    assert found == {
        "Conv_0": "not a matrix product",
        "MatMul_1": "2 outlier columns in float",
        "MatMul_2": "no sample was observed at its input",
    }


def test_wrong_options_are_refused():
    x = activation(2, 9, 32)
    with pytest.raises(UsageError, match="no activation was looked at") as caught:
        LlmInt8()(model_from(TEXT, w=normal(32, 24)))
    assert "observe" in caught.value.hint
    with pytest.raises(UsageError, match="does not read dynamic"):
        LlmInt8(target="tensorrt", ranges="token")(product(x))
    with pytest.raises(UsageError, match="no node is called"):
        LlmInt8(keep=("MatMul_7",))(product(x))
    for wrong in ({"threshold": 0.0}, {"threshold": np.nan}, {"relative": -1.0}, {"max_share": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LlmInt8(**wrong)


def test_onnxruntime_keeps_the_scales_of_tokens_and_multiplies_integers(tmp_path):
    model = product(activation(2, 9, 32))
    LlmInt8(target="ort-cpu")(model)
    session(model, tmp_path / "fused.onnx")
    made = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert "MatMulInteger" in made
    assert "MatMulIntegerToFloat" not in made


def test_a_half_precision_model_is_split_as_well():
    x, w = activation(2, 9, 32), normal(32, 24)
    model = product(x, w)
    LlmInt8(target="tensorrt-rtx")(model)
    Half(target="tensorrt-rtx")(model)
    kinds = {v.name: v.const_value.dtype for v in model.graph.initializers.values()}
    assert kinds["MatMul_0/outliers/half"] == ir.DataType.FLOAT16
    assert decibel(static_by_hand(x, w, "tensorrt-rtx"), run(model, x=x)[0]) > 55
    text = TEXT.replace("float[", "float16[")
    native = observed(model_from(text, dtype=np.float16, w=w), x=x)
    assert LlmInt8(target="tensorrt-rtx")(native).modified
    found = run(native, x=x.astype(np.float16))[0]
    assert found.dtype == np.float16
    assert decibel(static_by_hand(x, w, "tensorrt-rtx"), found.astype(np.float64)) > 50


@pytest.mark.rtx
def test_the_static_form_builds_as_an_engine():
    module = pytest.importorskip("tensorrt_rtx")
    text = "g (float[n, s, 64] x) => (float[n, s, 64] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"
    x, w = activation(2, 9, 64), normal(64, 64)
    model = observed(model_from(text, w=w, v=normal(64, 64)), x=x, r=activation(2, 9, 64, outliers=(7,)))
    LlmInt8(target="tensorrt-rtx")(model)
    Half(target="tensorrt-rtx")(model)
    assert ops(model).count("Gather") == 2
    shapes = {"x": ([1, 1, 64], [8, 32, 64], [32, 128, 64])}
    engine = build_engine(ir.to_proto(model).SerializeToString(), module, EngineOptions(profiles=(shapes,)))
    assert engine.info.layers > 10


def test_options_are_those_of_the_paper_by_default():
    assert {field.name: field.default for field in dataclasses.fields(LlmInt8)}["threshold"] == 6.0
