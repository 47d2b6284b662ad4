import re

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from helpers import model_from
from onnx.reference import ReferenceEvaluator

from qexport.calibration.running.emulate import emulate
from qexport.errors import UsageError
from qexport.passes.half import Half
from qexport.passes.numbers.extreme import EXTREME_KEY

RNG = np.random.default_rng(0)
F16 = ir.DataType.FLOAT16


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def ort_run(model, **feeds):
    proto = ir.to_proto(model)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def reasons(result):
    return [decision.reason for decision in result.decisions if decision.action == "kept"]


def half_run(model, **feeds):
    """Every value rounded to its type, as on a device; onnxruntime's CPU computes float16 graphs in float32."""
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    work = model.clone()
    emulate(work)
    return ort_run(work, **feeds)


def observe(model, **feeds):
    """Leave the extremes of one run on the values, by onnx's own reference."""
    proto = ir.to_proto(model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in values)
    found = dict(zip(values, ReferenceEvaluator(proto).run(None, feeds), strict=True))
    for name, array in (found | feeds).items():
        value = values.get(name) or next(v for v in model.graph.inputs if v.name == name)
        if array.dtype == np.float32:
            value.meta[EXTREME_KEY] = float(np.abs(array).max())


def test_long_sums_stay_in_float32_and_so_does_what_was_seen_to_read_large_ones():
    text = "g (float[n, 32] x) => (float[n] y) { h = Relu(x)  s = ReduceSum <keepdims = 0> (h, axes)  y = Sqrt(s) }"
    model, x = model_from(text, axes=np.array([1])), np.full((2, 32), 3000.0, np.float32)
    blind, seeing = model.clone(), model.clone()
    assert reasons(Half()(blind)) == ["sums many elements"]
    assert np.isinf(half_run(blind, x=x)[0]).all()  # 96000 is beyond float16
    observe(seeing, x=x)
    assert reasons(Half()(seeing)) == [
        f"observed 9.6e+04 at its {end}, float16 ends at 65504" for end in ("output", "input")
    ]
    np.testing.assert_allclose(half_run(seeing, x=x)[0], np.sqrt(32 * 3000.0), rtol=2e-3)


def test_a_node_with_a_constant_beyond_the_range_is_kept():
    for w in (np.float32([1e6, 1, 1, 1]), np.float32(1e6)):
        model = model_from("g (float[n, 4] x) => (float[n, 4] y) { h = Relu(x)  y = Mul(h, w) }", w=w)
        assert reasons(Half()(model)) == ["a constant is beyond float16"]
        np.testing.assert_allclose(half_run(model, x=np.ones((1, 4), np.float32))[0][0, 0], 1e6)


def test_what_carries_a_constant_beyond_the_range_is_kept_as_well():
    text = (
        "g (float[n, 4] x) => (float[n, 1] y) { h = Relu(x)  a = Add(h, w)  b = Neg(a)  c = ReduceMax(b)  y = Relu(c) }"
    )
    model = model_from(text, w=np.float32([-1e9, 1, 1, 1]))
    assert reasons(Half()(model)) == ["a constant is beyond float16", *["it may read what is beyond float16"] * 3]
    x = normal(2, 4)
    np.testing.assert_allclose(half_run(model, x=x)[0], ort_run(model, x=x)[0], rtol=1e-3)


@pytest.mark.parametrize("bounds", ["y = Clip(h, low, high)", "a = Max(h, low)  y = Min(a, high)"])
def test_bounds_that_are_never_reached_are_the_ends_of_the_format(bounds):
    model = model_from(
        f"g (float[n] x) => (float[n] y) {{ h = Relu(x)  {bounds} }}", low=np.float32(-1e9), high=np.float32(1e9)
    )
    assert reasons(Half()(model)) == []
    ends = sorted(float(value.const_value.numpy()) for value in model.graph.initializers.values())
    assert ends == [-65504, 65504]
    np.testing.assert_array_equal(half_run(model, x=np.float32([-3, 5]))[0], [0, 5])


def test_infinity_stays_infinite():
    model = model_from(
        "g (float[n] x, bool[n] m) => (float[n] y) { h = Relu(x)  y = Where(m, h, w) }", w=np.float32(-np.inf)
    )
    assert reasons(Half()(model)) == []
    np.testing.assert_array_equal(half_run(model, x=np.ones(2, np.float32), m=np.array([1, 0], bool))[0], [1, -np.inf])


@pytest.mark.parametrize("masked", [-1e9, np.finfo(np.float32).min])
def test_masks_are_made_to_fit_and_still_hide(masked):
    text = """g (float[n, 4] x, float[n, 4] m) => (float[n, 4] y) {
        i = Sub(one, m)  h = Mul(i, c)  s = Add(x, h)  y = Softmax(s) }"""
    model = model_from(text, c=np.array(masked, np.float32), one=np.float32(1))
    result = Half()(model)
    assert ("softened", "a mask beyond half precision") in {(d.action, d.reason) for d in result.decisions}
    assert reasons(result) == []
    for scores in (normal(2, 4), np.full((2, 4), -300.0, np.float32)):
        (y,) = half_run(model, x=scores, m=np.float32([[1, 1, 0, 0], [0, 0, 0, 0]]))
        assert np.isfinite(y).all()
        np.testing.assert_array_equal(y[0, 2:], 0)


# The guard: a norm in small operators, whose squares are beyond float16 where its activations are beyond 256.
NORM = """g (float[n, 32] x) => (float[n, 32] y) {
    h = MatMul(x, w)  q = Pow(h, two)  m = ReduceMean <keepdims = 1> (q, axes)  e = Add(m, eps)
    r = Sqrt(e)  d = Div(h, r)  y = MatMul(d, w) }"""


def norm(size=1e3, text=NORM):
    """A norm that no fusion knows, and an input that makes its activations ``size``."""
    constants = {"two": np.float32(2), "axes": np.array([-1]), "eps": np.float32(1e-3), "minus": np.float32(-0.5)}
    used = {name: array for name, array in constants.items() if re.search(rf"\b{name}\b", text)}
    return model_from(text, w=np.eye(32, dtype=np.float32), **used), size * np.sign(normal(4, 32))


def test_without_the_guard_a_norm_overflows_and_with_it_it_does_not(monkeypatch):
    model, x = norm()
    (truth,) = ort_run(model, x=x)
    guarded, bare = model.clone(), model.clone()
    result = Half()(guarded)
    kept = {d.op for d in result.decisions if d.reason == "belongs to a sum of squares"}
    assert kept == {"Pow", "Add", "Sqrt"}
    assert {d.op for d in result.decisions if d.reason == "sums many elements"} == {"ReduceMean"}
    (found,) = half_run(guarded, x=x)
    np.testing.assert_allclose(found, truth, atol=2e-3)
    monkeypatch.setattr("qexport.passes.half.squares", lambda graph, sums: set())
    Half()(bare)
    assert np.abs(half_run(bare, x=x)[0] - truth).max() > 0.9  # x / sqrt(inf)


@pytest.mark.parametrize(
    "body",
    [
        "q = Mul(h, h)  m = ReduceMean <keepdims = 1> (q, axes)  e = Add(m, eps)  r = Sqrt(e)  i = Reciprocal(r)"
        "  d = Mul(h, i)",
        "q = Mul(h, h)  m = ReduceMean <keepdims = 1> (q, axes)  e = Max(m, eps)  i = Pow(e, minus)  d = Mul(h, i)",
        "m = ReduceSumSquare <keepdims = 1> (h, axes)  e = Add(m, eps)  r = Sqrt(e)  d = Div(h, r)",
        "a = ReduceMean <keepdims = 1> (h, axes)  c = Sub(h, a)  q = Mul(c, c)  m = ReduceMean <keepdims = 1> (q, axes)"
        "  e = Add(m, eps)  r = Sqrt(e)  d = Div(c, r)",
    ],
)
def test_every_spelling_of_a_norm_stays_finite(body):
    text = f"g (float[n, 32] x) => (float[n, 32] y) {{ h = MatMul(x, w)  {body}  y = MatMul(d, w) }}"
    model, x = norm(text=text)
    (truth,) = ort_run(model, x=x)
    Half()(model)
    np.testing.assert_allclose(half_run(model, x=x)[0], truth, atol=2e-3)
    assert sum(node.outputs[0].dtype == F16 for node in model.graph if node.op_type == "MatMul") == 2


GROWTH = """g (float[n, 32] x) => (float[n, 32] y) {
    h = MatMul(x, w)  b = Mul(h, big)  r = Relu(b)  s = Mul(r, small)  y = MatMul(s, w) }"""


def growth():
    constants = {"w": np.eye(32, dtype=np.float32), "big": np.float32(200), "small": np.float32(0.005)}
    return model_from(GROWTH, **constants), np.abs(normal(8, 32)) * 400


def test_a_value_that_was_observed_beyond_float16_is_named_and_stays_in_float32():
    model, x = growth()
    (truth,) = ort_run(model, x=x)
    peak = f"{np.abs(x).max() * 200:.1e}"
    blind, seeing = model.clone(), model.clone()
    blindly = Half()(blind)
    assert not np.isfinite(half_run(blind, x=x)[0]).all()
    assert [d.reason for d in blindly.decisions] == ["ranges were not observed, the guard knows constants only"]
    observe(seeing, x=x)
    result = Half()(seeing)
    assert [(d.op, d.reason) for d in result.decisions] == [
        ("Mul", f"observed {peak} at its output, float16 ends at 65504"),
        ("Relu", f"observed {peak} at its output, float16 ends at 65504"),
        ("Mul", f"observed {peak} at its input, float16 ends at 65504"),
    ]
    (found,) = half_run(seeing, x=x)
    np.testing.assert_allclose(found, truth, rtol=5e-3)
    assert not Half()(seeing).modified


def test_headroom_says_how_near_to_the_end_is_too_near():
    model, _ = growth()
    model.graph[1].outputs[0].meta[EXTREME_KEY] = 40000.0
    assert reasons(Half(headroom=1.5)(model.clone())) == []
    assert len(reasons(Half(headroom=2)(model.clone()))) == 2


@pytest.mark.parametrize(
    ("op", "peak", "inner"),
    [("LpNormalization <axis = 1>", 300.0, "9.0e+04"), ("Softplus", 12.0, "1.6e+05"), ("ReduceL2", 300.0, "9.0e+04")],
)
def test_what_is_computed_in_between_counts(op, peak, inner):
    model = model_from(
        f"g (float[n, 4] x) => (float[n, m] y) {{ h = Relu(x)  y = {op.replace(' <', '<')} (h) }}", opset=22
    )
    model.graph[0].outputs[0].meta[EXTREME_KEY] = peak
    result = Half(keep_ops=(), headroom=1)(model)
    assert reasons(result) == [f"observed {inner} inside it, float16 ends at 65504"]


def test_a_layer_norm_computes_in_float32_inside():
    text = "g (float[n, 4] x) => (float[n, 4] y) { h = Relu(x)  y = LayerNormalization(h, w) }"
    model = model_from(text, w=np.ones(4, np.float32))
    model.graph[0].outputs[0].meta[EXTREME_KEY] = 1e4
    assert reasons(Half()(model)) == []


POSITIONS = """g (int64 s, float[n, 4] x) => (float[n, 4] y) {
    r = Range(zero, s, one)  p = Cast <to = 1> (r)  u = Unsqueeze(p, last)  a = Mul(u, freq)  c = Cos(a)
    h = Relu(x)  y = Mul(h, c) }"""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_angles_of_positions_keep_their_digits(dtype):
    constants = {
        "zero": np.array(0),
        "one": np.array(1),
        "last": np.array([-1]),
        "freq": np.float32([1, 0.1, 0.01, 1e-3]),
    }
    model = model_from(POSITIONS, opset=22, **constants)
    feeds = {"s": np.array(2000), "x": np.ones((2000, 4), np.float32)}
    (truth,) = ort_run(model, **feeds)
    result = Half(dtype=dtype)(model)
    assert {d.op for d in result.decisions if d.reason == "counts positions"} == {"Cast", "Unsqueeze", "Mul", "Cos"}
    np.testing.assert_allclose(half_run(model, **feeds)[0], truth, atol=1e-2)


def test_distances_that_become_integers_keep_their_digits():
    text = """g (int64[n] p, float[n] x) => (int64[n] y, float[n] z) {
        f = Cast <to = 1> (p)  d = Div(f, c)  l = Log(d)  m = Mul(l, k)  y = Cast <to = 7> (m)  z = Relu(x) }"""
    model = model_from(text, c=np.float32(3), k=np.float32(7.3))
    feeds = {"p": np.arange(1, 3000), "x": np.ones(2999, np.float32)}
    before = ort_run(model, **feeds)[0]
    assert set(reasons(Half()(model))) == {"counts positions"}
    np.testing.assert_array_equal(half_run(model, **feeds)[0], before)


def test_integers_that_were_seen_to_be_large_are_kept_and_small_ones_are_not():
    text = "g (int64[n] p, float[n] x) => (float[n] y) { f = Cast <to = 1> (p)  m = Add(f, x)  y = Relu(m) }"
    for peak, dtype, expected in (
        (2048.0, "float16", []), (2049.0, "float16", ["counts positions"]),
        (256.0, "bfloat16", []), (257.0, "bfloat16", ["counts positions"]),
    ):  # fmt: skip
        model = model_from(text)
        model.graph[0].outputs[0].meta[EXTREME_KEY] = peak
        assert reasons(Half(dtype=dtype)(model)) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"headroom": 0.5}, "headroom is 0.5"),
        ({"headroom": float("nan")}, "headroom is nan"),
    ],
)
def test_bad_options_are_usage_errors(options, words):
    with pytest.raises(UsageError, match=words):
        Half(**options)


def test_a_name_that_no_node_has_is_a_usage_error():
    with pytest.raises(UsageError, match="no node is called"):
        Half(keep=("nobody",))(growth()[0])
