import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from helpers import session
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn
from onnx.reference import ReferenceEvaluator
from onnxruntime import quantization

from qexport.errors import UsageError
from qexport.passes.dynamic import Dynamic
from qexport.passes.writing.quantized import quantized_nodes

RNG = np.random.default_rng(0)
GRANULARITIES = ("tensor", "token")


def model_from(text, opset=21, **weights):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    for name, value in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{index}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def product(w, inner="32"):
    return model_from(f"g (float[n, s, {inner}] x) => (float[n, s, m] y) {{ y = MatMul(x, w) }}", w=w)


def run(model, **feeds):
    return session(model).run(None, feeds)


def fused(model, path):
    """The operators that onnxruntime makes of the model."""
    session(model, path)
    return [node.op_type for node in onnx.load(path).graph.node]


def ops(model):
    return [node.op_type for node in model.graph]


def columns(w):
    """Integers and scales of a weight, one scale a column."""
    scale = np.abs(w).max(axis=0) / np.float32(127)
    return np.rint(w / scale), scale


def tensor_by_hand(x, w):
    """DynamicQuantizeLinear's definition, then exact integers."""
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = np.float32((high - low) / np.float32(255))
    zero = np.rint(-low / scale)
    integers = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    kernel, steps = columns(w)
    return (integers @ kernel) * scale * steps


def token_by_hand(x, w):
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    integers = np.rint(np.divide(x, scale, where=scale > 0, out=np.zeros_like(x)))
    kernel, steps = columns(w)
    return (integers @ kernel) * scale * steps


BY_HAND = {"tensor": tensor_by_hand, "token": token_by_hand}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_product_computes_what_the_formula_says(granularity):
    w, x = normal(32, 24), normal(3, 7, 32) * np.logspace(-3, 2, 7, dtype=np.float32)[:, None]
    model = product(w)
    result = Dynamic(granularity=granularity)(model)
    assert result.modified
    assert [(d.node, d.action) for d in result.decisions] == [("MatMul_0", "quantized")]
    expected = BY_HAND[granularity](x, w)
    (reference,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    for found in (reference, *run(model, x=x)):
        assert (np.abs(found - expected) <= 1e-5 * np.abs(expected).max(axis=-1, keepdims=True)).all()


def test_the_integers_are_those_of_quantize_dynamic(tmp_path):
    w, b, x = normal(32, 24), normal(24), normal(5, 9, 32)
    text = "g (float[n, s, 32] x) => (float[n, s, 24] y) { h = MatMul(x, w)  y = Add(h, b) }"
    model = model_from(text, w=w, b=b)
    source, target = tmp_path / "float.onnx", tmp_path / "dynamic.onnx"
    onnx.save(ir.to_proto(model), source)  # onnxruntime reads files only
    quantization.quantize_dynamic(source, target, per_channel=True, weight_type=quantization.QuantType.QInt8)
    (theirs,) = ort.InferenceSession(target, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    Dynamic()(model)
    np.testing.assert_allclose(run(model, x=x)[0], theirs, rtol=1e-5, atol=1e-5)


def test_the_file_holds_integers_and_no_float_copy_of_the_weight():
    model = product(normal(32, 24))
    Dynamic()(model)
    kinds = {name: value.const_value.dtype for name, value in model.graph.initializers.items()}
    assert kinds["w/int8"] == ir.DataType.INT8
    assert "w" not in kinds


def test_onnxruntime_makes_one_kernel_of_a_product_per_tensor_and_its_bias(tmp_path):
    text = "g (float[n, s, 32] x) => (float[n, s, 24] y) { h = MatMul(x, w)  y = Add(h, b) }"
    model = model_from(text, w=normal(32, 24), b=normal(24))
    Dynamic()(model)
    assert fused(model, tmp_path / "fused.onnx") == ["DynamicQuantizeMatMul"]


SHARED = """g (float[n, s, 32] x) => (float[n, s, 24] y, float[n, s, 24] z, float[n, s, 32] r) {
    y = MatMul(x, w)  z = MatMul(x, v)  r = Add(x, x) }"""


def test_products_of_one_activation_share_its_integers_and_others_read_the_float(tmp_path):
    model = model_from(SHARED, w=normal(32, 24), v=normal(32, 24))
    Dynamic()(model)
    assert ops(model).count("DynamicQuantizeLinear") == 1
    assert sorted(fused(model, tmp_path / "fused.onnx")) == [
        "Add",
        "DynamicQuantizeLinear",
        "MatMulIntegerToFloat",
        "MatMulIntegerToFloat",
    ]
    (add,) = (node for node in model.graph if node.op_type == "Add")
    assert {value.name for value in add.inputs} == {"x"}
    token = model_from(SHARED, w=normal(32, 24), v=normal(32, 24))
    Dynamic(granularity="token")(token)
    assert ops(token).count("QuantizeLinear") == 1


def test_the_scales_of_tokens_survive_onnxruntimes_fusions(tmp_path):
    model = product(normal(32, 24))
    Dynamic(granularity="token")(model)
    made = fused(model, tmp_path / "fused.onnx")
    assert "MatMulInteger" in made
    assert "MatMulIntegerToFloat" not in made  # it would multiply every row by the scale of the first


def test_a_zero_row_and_a_zero_tensor_give_zeros():
    x = normal(2, 3, 32)
    x[0, 1] = 0
    for granularity in GRANULARITIES:
        model = product(normal(32, 24))
        Dynamic(granularity=granularity)(model)
        (found,) = run(model, x=x)
        assert np.isfinite(found).all()
        assert not found[0, 1].any()
        (reference,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})  # warns of a division by zero
        assert not reference[0, 1].any()
        assert not run(model, x=np.zeros_like(x))[0].any()


TOKEN = product(normal(32, 24))
Dynamic(granularity="token")(TOKEN)
TOKEN_SESSION = session(TOKEN)


@given(
    hn.arrays(np.float32, (4, 32), elements=st.floats(-1, 1, width=32)),
    hn.arrays(np.float32, (4, 1), elements=st.floats(2.0**-60, 2.0**60, width=32)),
)
def test_a_row_does_not_depend_on_the_rows_beside_it(rows, sizes):
    x = rows * sizes
    together = TOKEN_SESSION.run(None, {"x": x[None]})[0][0]
    alone = [TOKEN_SESSION.run(None, {"x": row[None, None]})[0][0, 0] for row in x]
    np.testing.assert_allclose(together, alone, rtol=1e-6)


def test_tokens_of_different_sizes_lose_less_with_a_scale_each():
    w, x = normal(32, 24), normal(1, 20, 32) * np.logspace(-2, 1, 20, dtype=np.float32)[:, None]
    errors = {}
    for granularity in GRANULARITIES:
        model = product(w)
        Dynamic(granularity=granularity)(model)
        gap = run(model, x=x)[0] - x @ w
        errors[granularity] = (np.square(gap).sum(-1) / np.square(x @ w).sum(-1)).max()
    assert errors["token"] < 1e-3 < errors["tensor"]


GEMMS = {
    "plain": "y = Gemm(x, w)",
    "with a bias": "y = Gemm(x, w, b)",
    "transposed": "y = Gemm <transB = 1> (x, t, b)",
    "scaled": "y = Gemm <transB = 1, alpha = -0.5, beta = 3.0> (x, t, b)",
    "a computed bias": "c = Relu(b) y = Gemm <alpha = 2.0> (x, w, c)",
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("case", GEMMS)
def test_every_spelling_of_gemm_computes_the_same_product(case, granularity):
    used = {"w": normal(32, 24), "t": normal(24, 32), "b": normal(24)}
    weights = {name: value for name, value in used.items() if name in _words(GEMMS[case])}
    model = model_from(f"g (float[n, 32] x) => (float[n, 24] y) {{ {GEMMS[case]} }}", **weights)
    x = normal(50, 32)
    (expected,) = run(model, x=x)
    Dynamic(granularity=granularity)(model)
    assert "Gemm" not in ops(model)
    (found,) = run(model, x=x)
    assert 0 < np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def _words(text):
    return set(text.translate(str.maketrans("(),", "   ")).split())


def test_a_weight_that_two_products_read_is_stored_once():
    text = "g (float[n, 32] x) => (float[n, 32] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, w) }"
    model = model_from(text, w=normal(32, 32))
    Dynamic()(model)
    assert [v.const_value.dtype for v in model.graph.initializers.values()].count(ir.DataType.INT8) == 1
    assert ops(model).count("MatMulInteger") == 2


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_second_run_changes_nothing(granularity):
    model = product(normal(32, 24))
    Dynamic(granularity=granularity)(model)
    before = ir.to_proto(model).SerializeToString()
    result = Dynamic(granularity=granularity)(model)
    assert not result.modified
    assert [d.reason for d in result.decisions] == ["already quantized"]
    assert ir.to_proto(model).SerializeToString() == before


def reasons(model, **options):
    before = ir.to_proto(model).SerializeToString()
    result = Dynamic(**options)(model)
    assert not result.modified
    assert ir.to_proto(model).SerializeToString() == before
    assert {d.action for d in result.decisions} <= {"skipped"}
    return {d.node: d.reason for d in result.decisions}


def test_what_is_not_quantized_has_a_reason():
    conv = "g (float[n, 16, 8, 8] x) => (float[n, 16, 6, 6] y) { y = Conv(x, w) }"
    found = reasons(model_from(conv, w=normal(16, 16, 3, 3)))
    assert found == {"Conv_0": "an integer convolution is slower than a float one"}
    half = "g (float16[n, 32] x) => (float16[n, 24] y) { y = MatMul(x, w) }"
    found = reasons(model_from(half, w=normal(32, 24).astype(np.float16)))
    assert found == {"MatMul_0": "only float32 is quantized at every call"}
    gemm = "g (float[n, 32] x, float[24] b) => (float[n, 24] y) { y = Gemm <beta = 2.0> (x, w, b) }"
    assert reasons(model_from(gemm, w=normal(32, 24))) == {"Gemm_0": "its bias is computed and scaled"}
    assert reasons(product(normal(32, 8))) == {"MatMul_0": "K or N below 16"}
    assert reasons(product(normal(32, 24)), keep=("MatMul_0",)) == {"MatMul_0": "kept in float by name"}
    nan = normal(32, 24)
    nan[3, 3] = np.nan
    assert reasons(product(nan)) == {"MatMul_0": "weights are not finite"}


def test_an_opset_that_is_too_old_is_left_alone():
    text = "g (float[n, 32] x) => (float[n, 24] y) { y = MatMul(x, w) }"
    model = model_from(text, opset=20, w=normal(32, 24))
    assert reasons(model, granularity="token") == {"": "needs opset 21, model has 20"}
    assert Dynamic()(model).modified


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx", "ort-cuda"])
def test_targets_without_ranges_per_call_are_refused(target):
    model = product(normal(32, 24))
    with pytest.raises(UsageError, match="does not read dynamic") as caught:
        Dynamic(target=target)(model)
    assert caught.value.hint == "targets that read it: ort-cpu"
    assert not quantized_nodes(model)


def test_a_name_that_no_node_has_is_refused():
    with pytest.raises(UsageError, match="no node is called"):
        Dynamic(keep=("MatMul_9",))(product(normal(32, 24)))
