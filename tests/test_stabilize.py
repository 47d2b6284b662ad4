import time
from functools import partial

import helpers
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.calibration.running.emulate import emulate
from qexport.passes.half import Half
from qexport.passes.numbers.extreme import EXTREME_KEY
from qexport.passes.stabilize import HIDDEN, Stabilize

model_from = partial(helpers.model_from, opset=22)
LOWEST = float(np.finfo(np.float32).min)
SIZE = 6


def run(model, **feeds):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


CONSTANTS = {
    "one": np.float32(1),
    "zero": np.float32(0),
    "heads": np.array([1]),
    "axis": np.array([0]),
    "square": np.array([SIZE, SIZE]),
    "upper": np.array(1),
}

SPELLINGS = {
    "one minus mask": "f = Cast <to = 1> (m)  i = Sub(one, f)  b = Mul(i, c)  s = Add(x, b)",
    "mask minus one": "f = Cast <to = 1> (m)  i = Sub(f, one)  p = Neg(c)  b = Mul(i, p)  s = Add(x, b)",
    "a difference": "f = Cast <to = 1> (m)  i = Sub(one, f)  p = Neg(c)  b = Mul(p, i)  s = Sub(x, b)",
    "in place of scores": "k = Cast <to = 9> (m)  s = Where(k, x, c)",
    "a bias of zero": "k = Cast <to = 9> (m)  b = Where(k, zero, c)  s = Add(b, x)",
    "expanded": "k = Cast <to = 9> (m)  z = Shape(x)  e = Expand(c, z)  b = Where(k, zero, e)  s = Add(x, b)",
    "filled": "k = Cast <to = 9> (m)  z = Shape(x)  e = ConstantOfShape <value = float[1] {LOWEST}> (z)"
    "  b = Where(k, zero, e)  s = Add(x, b)",
    "a constant node": "k = Cast <to = 9> (m)  e = Constant <value_float = LOWEST> ()  s = Where(k, x, e)",
    "two masks, one causal": "k = Cast <to = 9> (m)  z = Shape(x)  e = Expand(c, z)  t = Trilu <upper = 1> (e, upper)"
    "  b = Where(k, zero, c)  a = Add(t, b)  s = Add(x, a)",
    "bounded below": "f = Cast <to = 1> (m)  i = Sub(one, f)  b = Mul(i, c)  a = Add(x, b)  s = Max(a, c)",
    "of floats": "w = Cast <to = 1> (m)  t = Cast <to = 10> (w)  f = Cast <to = 1> (t)  i = Sub(one, f)  b = Mul(i, c)"
    "  s = Add(x, b)",
    "unsqueezed": "f = Cast <to = 1> (m)  i = Sub(one, f)  u = Unsqueeze(i, axis)  b = Mul(u, c)  w = Squeeze(b, axis)"
    "  s = Add(x, w)",
}


def attention(spelling, masked=-1e9):
    text = f"g (float[6, 6] x, int64[6, 6] m) => (float[6, 6] y) {{ {SPELLINGS[spelling]}  y = Softmax(s) }}"
    text = text.replace("LOWEST", f"{masked:.1f}" if masked != LOWEST else "-3.4028234e38")
    constants = CONSTANTS | {"c": np.float32(masked)}
    return model_from(text, **{name: array for name, array in constants.items() if f"{name}" in text})


def feeds(seed=0, size=20.0):
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, (SIZE, SIZE))
    mask[:, 0] = 1  # no row is hidden as a whole
    return {"x": (size * rng.standard_normal((SIZE, SIZE))).astype(np.float32), "m": mask}


def constants(model):
    tensors = [value.const_value for value in model.graph.initializers.values()]
    tensors += [node.attributes["value"].as_tensor() for node in model.graph if "value" in node.attributes]
    tensors += [
        ir.tensor(node.attributes["value_float"].as_float()) for node in model.graph if "value_float" in node.attributes
    ]
    return [tensor.numpy() for tensor in tensors if tensor.dtype == ir.DataType.FLOAT]


@pytest.mark.parametrize("masked", [-1e9, -65504.0, LOWEST])
@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_every_spelling_of_a_mask_gives_the_same_weights_afterwards(spelling, masked):
    if masked == LOWEST and spelling == "two masks, one causal":
        pytest.skip("two of them are infinite in float32 already")
    model = attention(spelling, masked)
    (before,) = run(model, **feeds())
    result = Stabilize()(model)
    assert result.modified
    assert {(d.action, d.reason) for d in result.decisions} == {("softened", "a mask beyond half precision")}
    assert max(np.abs(array).max() for array in constants(model)) == HIDDEN
    np.testing.assert_allclose(run(model, **feeds())[0], before, atol=1e-7)
    assert not Stabilize()(model).modified


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_in_16_bits_hidden_positions_weigh_nothing_and_rows_without_any_other_stay_finite(spelling, dtype):
    model, data = attention(spelling), feeds(size=3.0)
    data["m"][3] = 0
    hidden = np.argwhere(data["m"][0] == 0)
    Half(dtype=dtype)(model)
    emulate(model)
    (y,) = run(model, **data)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[0, hidden], 0)
    np.testing.assert_allclose(y.sum(axis=-1), 1, atol=0.02)


def softmax(scores):
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


ROWS = st.lists(st.tuples(st.floats(-8100, 8100, width=16), st.integers(0, 3)), min_size=2, max_size=8)


@given(ROWS.filter(lambda row: any(masks == 0 for _, masks in row)))
@settings(deadline=None, max_examples=300)
def test_up_to_three_masks_hide_in_float16_as_minus_1e9_does_for_scores_within_8100(row):
    scores, masks = (np.array(column) for column in zip(*row, strict=True))
    truth = softmax(np.float64(scores) - 1e9 * masks)
    total = np.float16(scores)
    for count in (1, 2, 3):
        total = total - np.where(masks >= count, np.float16(HIDDEN), np.float16(0))
    assert np.isfinite(total).all()
    np.testing.assert_allclose(softmax(np.float32(total)), truth, atol=1e-6)
    assert (softmax(np.float32(total))[masks > 0] == 0).all()


def test_the_smallest_float16_overflows_with_a_score_and_the_choice_does_not():
    for score in (-16.0, -8100.0):
        with np.errstate(over="ignore"):
            assert np.isinf(np.float16(-65504) + np.float16(score))
        assert np.isfinite(np.float16(-3 * HIDDEN) + np.float16(score))
    assert np.float16(-65504) + np.float16(-15) == -65504


def test_a_constant_with_other_readers_is_copied_for_those_that_hide_by_it():
    text = """g (float[6, 6] x, bool[6, 6] m) => (float[6, 6] y, float[6] z) {
        s = Where(m, x, c)  y = Softmax(s)  t = Where(m, x, c)  z = ReduceMax <keepdims = 0> (t, last) }"""
    model = model_from(text, c=np.float32(-1e9), last=np.array([1]))
    result = Stabilize()(model)
    assert [d.action for d in result.decisions] == ["softened"]
    assert sorted(float(array) for array in constants(model)) == [-1e9, -HIDDEN]
    mask = np.zeros((6, 6), bool)
    assert run(model, x=feeds()["x"], m=mask)[1][0] == -1e9
    assert not Stabilize()(model).modified


REFUSED = {
    "ReduceMax": "s = Where(m, x, c)  y = Softmax(s)  z = ReduceMax <keepdims = 0> (s)",
    "an output": "z = Where(m, x, c)  y = Softmax(z)",
    "Equal": "s = Where(m, x, c)  y = Softmax(s)  e = Equal(s, c)  z = Cast <to = 1> (e)",
}


@pytest.mark.parametrize("other", sorted(REFUSED))
def test_a_mask_that_somebody_else_reads_is_refused(other):
    model = model_from(
        f"g (float[6, 6] x, bool[6, 6] m) => (float[6, 6] y, float z) {{ {REFUSED[other]} }}", c=np.float32(-1e9)
    )
    before = ir.to_proto(model).SerializeToString()
    result = Stabilize()(model)
    assert not result.modified
    assert (result.decisions[0].action, result.decisions[0].reason) == ("skipped", f"a mask reaches {other} as well")
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize(
    ("body", "c"),
    [
        ("y = Clip(x, c)", -1e9),
        ("s = Mul(x, c)  y = Softmax(s)", -1e9),  # a temperature, not a mask
        ("s = Where(m, x, c)  y = LogSoftmax(s)", -1e9),  # its output holds the mask
        ("s = Where(m, x, c)  y = Softmax(s)", -10000.0),
        ("s = Where(m, x, c)  y = Softmax(s)", -np.inf),
        ("s = Div(x, c)  y = Softmax(s)", 1e9),
    ],
)
def test_what_is_no_mask_or_fits_is_left_alone_without_a_word(body, c):
    model = model_from(f"g (float[6, 6] x, bool[6, 6] m) => (float[6, 6] y) {{ {body} }}", c=np.float32(c))
    result = Stabilize()(model)
    assert (result.modified, result.decisions) == (False, ())
    assert float(constants(model)[0]) == c or np.isinf(c)


def test_a_mask_of_floats_counts_where_it_is_taken_from_one():
    text = """g (float[6, 6] x, float[6, 6] m) => (float[6, 6] y) {
        i = Sub(one, m)  b = Mul(i, c)  s = Add(x, b)  y = Softmax(s) }"""
    model, data = model_from(text, c=np.float32(-1e9), one=np.float32(1)), feeds()
    data["m"] = data["m"].astype(np.float32)
    (before,) = run(model, **data)
    assert Stabilize()(model).modified
    np.testing.assert_allclose(run(model, **data)[0], before, atol=1e-7)


def test_a_matrix_keeps_what_is_not_huge():
    causal = np.triu(np.full((SIZE, SIZE), -1e9, np.float32), 1) + np.float32(0.25)
    model = model_from("g (float[6, 6] x) => (float[6, 6] y) { s = Add(x, c)  y = Softmax(s) }", c=causal)
    (before,) = run(model, x=feeds()["x"])
    Stabilize()(model)
    np.testing.assert_array_equal(constants(model)[0], np.where(causal < 0, -HIDDEN, 0.25))
    np.testing.assert_allclose(run(model, x=feeds()["x"])[0], before, atol=1e-7)


def test_a_mask_of_the_attention_operator_is_one():
    text = """g (float[1, 2, 6, 8] q, bool[6, 6] m) => (float[1, 2, 6, 8] y) {
        b = Where(m, zero, c)  y = Attention(q, q, q, b) }"""
    model = model_from(text, opset=23, c=np.float32(LOWEST), zero=np.float32(0))
    assert Stabilize()(model).modified
    assert min(array.min() for array in constants(model)) == -HIDDEN


@pytest.mark.parametrize("side", ["x", "m"])
def test_chains_of_thousands_of_nodes_and_diamonds_are_followed_in_one_pass(side):
    """A mask through 1500 Neg, or times what is made of the mask by as many; then 60 times a sum with itself."""
    steps = [("Neg", 1)] * 1500 + [("Add", 2)] * 60
    last, body = "b0", "f = Cast <to = 1> (m)  " + ("b0 = Mul(f, c)" if side == "x" else "b0 = Identity(f)")
    for number, (op, count) in enumerate(steps if side == "x" else steps[:1500] + [("Mul", 2)] * 60, 1):
        body += f"  b{number} = {op}({', '.join([last] * count)})"
        last = f"b{number}"
    body += f"  s = Add(x, {last})" if side == "x" else f"  b = Mul({last}, c)  s = Add(x, b)"
    text = f"g (float[6, 6] x, int64[6, 6] m) => (float[6, 6] y) {{ {body}  y = Softmax(s) }}"
    model = model_from(text, c=np.float32(-1e9))
    start = time.process_time()
    result = Stabilize()(model)
    assert time.process_time() - start < 2
    assert [d.action for d in result.decisions] == ["softened"]
    assert float(constants(model)[0]) == -HIDDEN
    assert not Stabilize()(model).modified


def test_masks_in_a_branch_are_softened_there():
    text = """g (bool k, float[6, 6] x, bool[6, 6] m) => (float[6, 6] y) {
        y = If (k) <then_branch = t () => (float[6, 6] a) { s = Where(m, x, c)  a = Softmax(s) },
                    else_branch = e () => (float[6, 6] b) { b = Identity(x) }> }"""
    model, data = model_from(text, c=np.float32(-1e9)), feeds()
    data = {"x": data["x"], "m": data["m"].astype(bool), "k": np.array(True)}
    (before,) = run(model, **data)
    assert Stabilize()(model).modified
    np.testing.assert_allclose(run(model, **data)[0], before, atol=1e-7)
    assert not Stabilize()(model).modified


def test_float16_models_are_softened_in_their_own_type():
    text = "g (float16[6, 6] x, bool[6, 6] m) => (float16[6, 6] y) { s = Where(m, x, c)  y = Softmax(s) }"
    model = model_from(text, c=np.float16(-65504))
    assert Stabilize()(model).modified
    (tensor,) = [value.const_value for value in model.graph.initializers.values()]
    assert (tensor.dtype, float(tensor.numpy())) == (ir.DataType.FLOAT16, -HIDDEN)


def test_what_was_observed_with_the_old_mask_is_forgotten():
    model = attention("one minus mask")
    values = {value.name: value for node in model.graph for value in node.outputs}
    for value in values.values():
        value.meta[EXTREME_KEY] = 1e9
    Stabilize()(model)
    noted = {name for name, value in values.items() if EXTREME_KEY in value.meta}
    assert noted == {"f", "i", "y"}
