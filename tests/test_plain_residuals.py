"""Residual sums that onnxruntime does not merge with the normalization behind them."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qexport.passes.plain_residuals import PlainResiduals

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 5, 64)).astype(np.float32)
WEIGHTS = {"w": (64, 64), "b": (64,), "g": (64,), "c": (64,), "p": (1, 5, 64)}
NORM = "y = LayerNormalization <axis = -1> (a, g, c)"
FIRES = {
    "a residual": f"m = MatMul(x, w)  a = Add(m, x)  {NORM}",
    "a residual first": f"m = MatMul(x, w)  a = Add(x, m)  {NORM}",
    "a bias in between": f"m = MatMul(x, w)  h = Add(m, b)  a = Add(h, x)  {NORM}",
}
STAYS = {
    "a bias": f"m = MatMul(x, w)  a = Add(m, b)  {NORM}",
    "constants of each position": f"m = MatMul(x, w)  a = Add(m, p)  {NORM}",
    "read again behind the norm": (
        "m = MatMul(x, w)  a = Add(m, x)  n = LayerNormalization <axis = -1> (a, g, c)  y = Add(n, a)"
    ),
    "a scale": "m = MatMul(x, w)  t = Relu(r)  s = Add(t, r)  y = LayerNormalization <axis = -1> (m, s, c)",
    "another normalization": "m = MatMul(x, w)  a = Add(m, x)  y = RMSNormalization <axis = -1> (a, g)",
    "a product": f"a = Mul(x, x)  {NORM}",
}
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_LAYOUT", "ORT_ENABLE_ALL")


def model_from(body, opset=23, ends="float[B, S, 64] y"):
    inputs = "float[B, S, 64] x" + (", float[64] r" if "(r)" in body else "")
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> net ({inputs}) => ({ends}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    read = {name for node in proto.graph.node for name in node.input}
    for name, shape in WEIGHTS.items():
        if name in read:
            array = RNG.standard_normal(shape).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def session(model, level="ORT_ENABLE_ALL", path=""):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(path)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model):
    (y,) = session(model, "ORT_DISABLE_ALL").run(None, {"x": X})
    return y


def optimized(model, level, path):
    session(model, level, path)
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("case", FIRES)
def test_a_residual_before_a_normalization_becomes_a_sum_with_the_same_bits(case):
    model = model_from(FIRES[case])
    before, names = run(model), {node.outputs[0].name for node in model.graph}
    result = PlainResiduals()(model)
    assert result.modified
    assert [(d.op, d.action) for d in result.decisions] == [("Add", "fused")]
    assert [node.op_type for node in model.graph].count("Sum") == 1
    assert {node.outputs[0].name for node in model.graph} == names
    np.testing.assert_array_equal(run(model), before)
    assert not PlainResiduals()(model).modified


@pytest.mark.parametrize("case", STAYS)
def test_other_sums_stay_as_they_are(case):
    model = model_from(STAYS[case])
    result = PlainResiduals()(model)
    assert not result.modified
    assert not result.decisions
    assert "Sum" not in [node.op_type for node in model.graph]


@pytest.mark.parametrize("case", FIRES)
@pytest.mark.parametrize("level", LEVELS)
def test_onnxruntime_merges_the_one_spelling_and_at_no_level_the_other(case, level, tmp_path):
    model = model_from(FIRES[case])
    merged = level not in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC")
    assert ("SkipLayerNormalization" in optimized(model, level, tmp_path / "before.onnx")) is merged
    PlainResiduals()(model)
    kept = optimized(model, level, tmp_path / "after.onnx")
    assert kept.count("Sum") == kept.count("LayerNormalization") == 1


@pytest.mark.parametrize("case", ["a bias", "read again behind the norm", "another normalization"])
def test_what_stays_is_nothing_that_onnxruntime_merges(case, tmp_path):
    ops = optimized(model_from(STAYS[case]), "ORT_ENABLE_ALL", tmp_path / "optimized.onnx")
    assert not any(op.startswith("Skip") for op in ops)


def test_a_sum_that_the_model_gives_out_stays(tmp_path):
    model = model_from(FIRES["a residual"], ends="float[B, S, 64] y, float[B, S, 64] a")
    assert "SkipLayerNormalization" not in optimized(model, "ORT_ENABLE_ALL", tmp_path / "optimized.onnx")
    assert not PlainResiduals()(model).modified


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx", "ort-cuda"])
def test_other_targets_keep_their_sums(target):
    model = model_from(FIRES["a residual"])
    assert not PlainResiduals(target=target)(model).modified


def test_an_opset_whose_sum_does_not_broadcast_is_refused():
    model = model_from("m = MatMul(x, w)  a = Add(m, x)  y = LayerNormalization <axis = -1> (a, g, c)", opset=7)
    result = PlainResiduals()(model)
    assert not result.modified
    assert [d.reason for d in result.decisions] == ["needs opset 8, model has 7"]


def test_residuals_in_branches_and_functions_are_found():
    text = """<ir_version: 10, opset_import: ["" : 23, "own" : 1]>
    net (float[2, 5, 64] x, bool t, float[64] g) => (float[2, 5, 64] y) {
        z = own.block(x, g)
        y = If (t) <
            then_branch = one () => (float[2, 5, 64] u) { a = Add(z, x)  u = LayerNormalization <axis = -1> (a, g) },
            else_branch = other () => (float[2, 5, 64] v) { v = Identity(z) }>
    }
    <domain: "own", opset_import: ["" : 23]> block (p, s) => (q) { n = Neg(p)  a = Add(n, p)  r = Relu(p)
        k = Add(r, p)  q = LayerNormalization <axis = -1> (k, s) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    result = PlainResiduals()(model)
    assert result.modified
    assert len(result.decisions) == 2
    onnx.checker.check_model(ir.to_proto(model))
    assert not PlainResiduals()(model).modified
