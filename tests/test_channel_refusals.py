"""Where no scale for each channel can be folded, the reason is told and nothing is touched."""

import numpy as np
import onnx_ir as ir
import pytest
from channel_models import build, give_shapes, random, value_named

from qexport.passes.folding.channels import Fold, find_fold
from qexport.passes.match import array

RNG = np.random.default_rng(0)


REFUSED = {
    "gelu": ("y = MatMul(a, v) x = Gelu(y) out = MatMul(x, w)", "Gelu makes it"),
    "clip": ("y = MatMul(a, v) x = Clip(y, zero, six) out = MatMul(x, w)", "Clip makes it"),
    "hard_swish": ("y = MatMul(a, v) x = HardSwish(y) out = MatMul(x, w)", "HardSwish makes it"),
    "model_input": ("x = Relu(a) out = MatMul(x, w)", "an input of the model"),
    "residual": (
        "y = MatMul(a, v) r = Add(a, y) x = LayerNormalization(r, g) o = MatMul(x, v) t = Add(x, o) out = Neg(t)",
        "output",
    ),
    "norm_reads_it": (
        "x = Mul(a, g) y = LayerNormalization(x, g) o = MatMul(x, v) out = Add(o, y)",
        "LayerNormalization reads it",
    ),
    "norm_over_two_axes": ("x = LayerNormalization<axis=1>(b, g) out = MatMul(x, w)", "normalizes over more"),
    "square": ("y = MatMul(a, v) x = Mul(y, y) out = MatMul(x, w)", "a square makes it"),
    "both_factors": ("y = MatMul(a, v) r = Relu(y) x = Mul(y, r) out = MatMul(x, w)", "both factors"),
    "silu": ("y = MatMul(a, v) s = Sigmoid(y) x = Mul(y, s) out = MatMul(x, w)", "Sigmoid"),
    "denominator": ("x = Mul(a, g) y = Div(b, x) o = MatMul(x, v) out = Add(o, y)", "a denominator"),
    "sigmoid_reads_it": ("x = Mul(a, g) y = Sigmoid(x) o = MatMul(x, v) out = Add(o, y)", "Sigmoid reads it"),
    "cast_to_integers": (
        "x = Mul(a, g) y = Cast<to=7>(x) z = Cast<to=1>(y) o = MatMul(x, v) out = Add(o, z)",
        "integers",
    ),
    "cast_from_integers": ("i = Cast<to=7>(a) j = Mul(i, whole) x = Cast<to=1>(j) out = MatMul(x, w)", "integers"),
    "slope": ("x = Mul(a, g) y = PRelu(b, x) o = MatMul(x, v) out = Add(o, y)", "as a parameter"),
    "vector": ("y = MatMul(a, v) x = Relu(y) o = MatMul(x, vec) u = Unsqueeze(o, last) out = Mul(u, g)", "a vector"),
    "from_a_vector": ("y = MatMul(d, vec) x = Relu(y) out = MatMul(x, w)", "a vector"),
    "row": ("y = MatMul(row, e) x = Relu(y) out = MatMul(x, w)", "rows of a product"),
    "attention_scores": (
        "x = MatMul(a, v) t = Transpose<perm=[0, 2, 1]>(x) o = MatMul(x, t) out = MatMul(o, x)",
        "attention",
    ),
    "key": (
        "x = Mul(a, g) o = Attention<q_num_heads=2, kv_num_heads=2>(b, x, b) y = MatMul(x, v) out = Add(o, y)",
        "attention",
    ),
    "unknown_heads": (
        "y = MatMul(a, v) r = Reshape(y, free) x = Attention(r, r, r) t = Transpose(x) out = MatMul(x, w)",
        "the heads of an attention",
    ),
    "foreign_operator": ("y = MatMul(a, v) x = other.Relu(y) out = MatMul(x, w)", "Relu makes it"),
    "foreign_reader": ("x = Mul(a, g) y = other.Mul(x, g) o = MatMul(x, v) out = Add(o, y)", "Mul reads it"),
    "foreign_attention": ("x = com.microsoft.Attention<num_heads=2>(a, v, g) out = MatMul(x, w)", "Attention makes it"),
    "flat_table": ("t = Gather(vec, ids) u = Reshape(t, shape) x = Relu(u) out = MatMul(x, w)", "a table is read"),
    "where": ("y = MatMul(a, v) m = IsNaN(y) x = Where(m, g, y) out = MatMul(x, w)", "Where makes it"),
    "computed_gain": (
        "h = ReduceMean<keepdims=0>(a, axes) x = LayerNormalization(a, h) out = MatMul(x, w)",
        "is computed",
    ),
    "sequence_axis": ("y = MatMul(e, v) t = Transpose(y) x = Reshape(t, wide) out = MatMul(x, w)", "rows of a product"),
}
CONSTANTS = {"v": "8x8", "g": "8", "w": "8x6", "vec": "8", "row": "8", "zero": np.float32(0), "six": np.float32(6)}
CONSTANTS |= {"whole": np.arange(8), "last": [-1], "axes": [0, 1], "shape": [1, 3, 8], "ids": np.array([0, 1, 2] * 8)}
CONSTANTS |= {"wide": [8, 1, 8], "free": [0, -1, 2, 8]}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_scale_goes_through_is_refused_with_a_reason(case):
    body, reason = REFUSED[case]
    inputs = "float[b, s, 8] a, float[b, s, 8] b, float[b, s, 8, 8] d, float[8, 8] e"
    model = build(body, inputs, "float[b, s, n] out", **CONSTANTS)
    if value_named(model, "x").shape is None:
        give_shapes(model, x=("b", "s", 8))
    before = model.clone()
    found = find_fold(value_named(model, "x"), -1, 8)
    assert isinstance(found, str)
    assert reason in found
    same_weights(before, model)


def same_weights(one, other):
    assert [node.op_type for node in one.graph] == [node.op_type for node in other.graph]
    for name, value in one.graph.initializers.items():
        assert np.array_equal(array(value), array(other.graph.initializers[name]))


def test_outputs_of_the_model_and_unknown_ranks_are_refused():
    model = build("out = Mul(a, g)", g="8")
    assert find_fold(value_named(model, "out"), -1, 8) == "it is an output of the model"
    model = build("x = Mul(a, g) out = MatMul(x, w)", g="8", w="8x6")
    value_named(model, "x").shape = None
    assert find_fold(value_named(model, "x"), -1, 8) == "the rank of its input is not known"


@pytest.mark.parametrize("state", ["past", "present", "bias", "lengths"])
def test_an_attention_that_keeps_its_values_is_refused(state):
    inputs = "float[b, 3, 8] a, float[b, 2, p, 4] pk, float[b, 2, p, 4] pv"
    heads, made, domain, opset, outputs = "q_num_heads=2, kv_num_heads=2", "x", "", 23, "float[b, 3, 6] out"
    read = {"past": "m, pk, pv", "present": "", "bias": "c", "lengths": "m, , , n"}[state]
    if state == "present":
        made, outputs = "x, kk, kv", outputs + ", float[b, 2, 3, 4] kv"
    if state == "bias":
        heads, domain = "num_heads=2", "com.microsoft."
    if state == "lengths":
        opset = 24
    body = f"y = MatMul(a, v) {made} = {domain}Attention<{heads}>(a, a, y, {read}) out = MatMul(x, w)".replace(
        "y, )", "y)"
    )
    body = body.replace("microsoft.Attention", "microsoft.MultiHeadAttention")
    constants = {"v": "8x8", "c": "24", "w": "8x6", "m": np.zeros((3, 5), np.float32), "n": [3, 2]}
    model = build(body, inputs, outputs, opset, **constants)
    give_shapes(model, x=("b", 3, 8))
    assert find_fold(value_named(model, "x"), -1, 8) == "an attention keeps its values"


def test_a_branch_that_reads_the_value_is_refused():
    body = """x = Mul(a, g) c = ReduceMax<keepdims=0>(a) t = Greater(c, zero)
    y = If(t) <then_branch = one () => (float[b, s, 8] p) { p = Mul(x, g) },
               else_branch = other () => (float[b, s, 8] q) { q = Identity(a) }>
    o = MatMul(x, v) out = Add(o, y)"""
    model = build(body, g="8", v="8x8", zero=np.float32(0))
    assert find_fold(value_named(model, "x"), -1, 8) == "a control-flow branch reads it"


@pytest.mark.parametrize("code", [10, 11, 16])
def test_models_in_other_floats_keep_their_type(code):
    dtype = ir.DataType(code)
    constants = {name: random(shape).astype(dtype.numpy()) for name, shape in {"g": "8", "w": "8x6"}.items()}
    name = {10: "float16", 11: "double", 16: "bfloat16"}[code]
    body = "x = RMSNormalization(a, g) out = MatMul(x, w)"
    model = build(body, f"{name}[b, s, 8] a", f"{name}[b, s, 6] out", **constants)
    fold = find_fold(value_named(model, "x"), -1, 8)
    assert isinstance(fold, Fold)
    fold.apply(np.full(8, 2.0))
    gain, kernel = (node.inputs[1] for node in model.graph)
    assert (gain.dtype, kernel.dtype) == (dtype, dtype)
    assert np.array_equal(array(gain).astype(np.float64) * 2, constants["g"].astype(np.float64))


def test_an_initializer_that_a_caller_can_override_is_no_constant():
    model = build("x = Mul(a, g) out = MatMul(x, w)", "float[b, s, 8] a, float[8] g", g="8", w="8x6")
    assert find_fold(value_named(model, "x"), -1, 8) == "it is an input of the model"
