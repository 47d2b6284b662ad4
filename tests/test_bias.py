"""Numbers added to a layer's output through its bias, whatever holds it."""

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model_from, session

from qexport.passes.match import array
from qexport.passes.writing.bias import NO_BIAS, bias_refusal, raise_bias

PLAIN = "g (float[n, 4] x) => (float[n, 3] y) { %s }"
IMAGE = "g (float[n, 2, 5, 5] x) => (float[n, 3, 5, 5] y) { %s }"
CONV = "Conv <kernel_shape = [1, 1]>"
ROW = np.float32([1, -2, 3])
SHIFT = np.array([0.5, 10, -4])


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


BODIES = {
    "behind": (PLAIN % "h = MatMul(x, w) y = Add(h, b)", {"w": normal(4, 3), "b": ROW}),
    "in_front": (PLAIN % "h = MatMul(x, w) y = Add(b, h)", {"w": normal(4, 3), "b": ROW[None]}),
    "one_number": (PLAIN % "h = MatMul(x, w) y = Add(h, b)", {"w": normal(4, 3), "b": np.float32(2)}),
    "gemm": (PLAIN % "y = Gemm <transB = 1> (x, w, b)", {"w": normal(3, 4), "b": ROW}),
    "factors": (PLAIN % "y = Gemm <alpha = 0.5, beta = 4.0> (x, w, b)", {"w": normal(4, 3), "b": ROW}),
    "one_for_all": (PLAIN % "y = Gemm <alpha = 3.0> (x, w, b)", {"w": normal(4, 3), "b": ROW[:1]}),
    "no_bias": (PLAIN % "y = Gemm <alpha = 3.0> (x, w)", {"w": normal(4, 3)}),
    "conv": (IMAGE % f"y = {CONV} (x, w, b)", {"w": normal(3, 2, 1, 1), "b": ROW}),
    "bare_conv": (IMAGE % f"y = {CONV} (x, w)", {"w": normal(3, 2, 1, 1)}),
}


def layer(model):
    return next(node for node in model.graph if node.op_type in ("MatMul", "Gemm", "Conv"))


def run(model):
    shape = [size if isinstance(size, int) else 2 for size in model.graph.inputs[0].shape]
    return session(model).run(None, {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)})[0]


@pytest.mark.parametrize("name", BODIES)
def test_every_output_moves_by_its_number_times_the_factor_of_the_product(name):
    text, weights = BODIES[name]
    model = model_from(text, **weights)
    before = run(model)
    assert bias_refusal(layer(model)) is None
    raise_bias(layer(model), SHIFT)
    factor = layer(model).attributes.get_float("alpha", 1.0)
    column = [-1, *[1] * (before.ndim - 2)]
    assert run(model) == pytest.approx(before + factor * SHIFT.reshape(column).astype(np.float32), abs=1e-5)
    assert len(model.graph.initializers) == 2


def test_a_product_without_a_bias_gets_an_add_where_asked_also_at_an_output():
    model = model_from(PLAIN % "y = MatMul(x, w)", w=normal(4, 3))
    before = run(model)
    assert bias_refusal(layer(model)) == NO_BIAS
    assert bias_refusal(layer(model), insert=True) is None
    raise_bias(layer(model), SHIFT)
    assert run(model) == pytest.approx(before + SHIFT, abs=1e-5)
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_who_else_reads_a_bias_still_reads_the_old_one():
    model = model_from(PLAIN % "h = MatMul(x, w) i = Add(h, b) y = Mul(i, b)", w=normal(4, 3), b=ROW)
    before = run(model)
    raise_bias(layer(model), SHIFT)
    assert run(model) == pytest.approx(before + SHIFT * ROW, abs=1e-4)


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("h = MatMul(x, w) y = Add(h, h)", {}),
        ("h = MatMul(x, w) i = Add(h, b) y = Mul(i, h)", {"b": ROW}),
        ("h = MatMul(x, w) y = Add(h, b)", {"b": normal(2, 3)}),
        ("y = Gemm(x, w, b)", {"b": normal(2, 3)}),
        ("c = ReduceSum <keepdims = 0> (x) y = Gemm(x, w, c)", {}),
        ("y = Gemm <beta = 0.0> (x, w, b)", {"b": ROW}),
        ("t = Transpose <perm = [1, 0]> (x) y = Gemm <transA = 1> (t, w, b)", {"b": ROW}),
    ],
)
def test_what_is_no_row_of_constants_behind_the_layer_alone_takes_nothing(body, weights):
    assert bias_refusal(layer(model_from(PLAIN % body, w=normal(4, 3), **weights)))


def test_a_new_bias_has_the_type_of_what_the_layer_reads():
    text = (PLAIN % "y = Gemm (x, w)").replace("float[", "float16[")
    model = model_from(text, w=normal(4, 3).astype(np.float16))
    raise_bias(layer(model), SHIFT)
    assert layer(model).inputs[2].dtype == ir.DataType.FLOAT16
    assert array(layer(model).inputs[2]).tolist() == SHIFT.tolist()
