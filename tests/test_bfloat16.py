import re

import helpers
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

import qexport
from qexport.calibration.running.emulate import computes_in, emulate
from qexport.calibration.running.execute import open_model
from qexport.errors import GateFailed, UsageError
from qexport.exporter.engines.engine import EngineOptions, build_engine
from qexport.passes.half import Half
from qexport.passes.numbers.range import RANGE_KEY, Range
from qexport.passes.quantize import Quantize
from qexport.runtime.session import SessionOptions


def model_from(text, opset=22, **weights):
    return helpers.model_from(text, opset, **weights)


RNG = np.random.default_rng(0)
F32, F16, BF16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LITERAL = SessionOptions(threads=1, literal=True)

# One layer of a transformer encoder, as its exporter writes it after fusion.
LAYER = """g (float[n, s, 32] x, int64[n, s] m) => (float[n, s, 32] y) {
    f = Cast <to = 1> (m)  i = Sub(one, f)  w = Unsqueeze(i, axes)  b = Mul(w, low)
    q0 = MatMul(x, wq)  q1 = Reshape(q0, split)  q = Transpose <perm = [0, 2, 1, 3]> (q1)
    k0 = MatMul(x, wk)  k1 = Reshape(k0, split)  k = Transpose <perm = [0, 2, 3, 1]> (k1)
    v0 = MatMul(x, wv)  v1 = Reshape(v0, split)  v = Transpose <perm = [0, 2, 1, 3]> (v1)
    a = MatMul(q, k)  c = Mul(a, scale)  d = Add(c, b)  p = Softmax(d)
    o0 = MatMul(p, v)  o1 = Transpose <perm = [0, 2, 1, 3]> (o0)  o2 = Reshape(o1, join)  o = MatMul(o2, wo)
    r = Add(x, o)  l = LayerNormalization <axis = -1> (r, gamma, beta)
    u = MatMul(l, up)  g = Gelu(u)  h = MatMul(g, down)  z = Add(l, h)
    y = LayerNormalization <axis = -1> (z, gamma, beta) }"""


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def layer():
    weights = {name: normal(32, 32) / 6 for name in ("wq", "wk", "wv", "wo")}
    weights |= {"up": normal(32, 64) / 6, "down": normal(64, 32) / 8, "gamma": 1 + normal(32) / 10, "beta": normal(32)}
    weights |= {"one": np.float32(1), "low": np.finfo(np.float32).min, "scale": np.float32(0.25)}
    return model_from(LAYER, axes=np.array([1, 2]), split=np.array([0, 0, 2, 16]), join=np.array([0, 0, 32]), **weights)


def feeds():
    return {"x": normal(2, 5, 32), "m": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}


def mlp():
    text = "g (float[n, 32] x) => (float[n, 16] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"
    return model_from(text, w=normal(32, 24), v=normal(24, 16))


def cosine(a, b):
    a, b = np.float64(a), np.float64(b)
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(("dtype", "floor"), [("float16", 0.999999), ("bfloat16", 0.9999)])
def test_a_transformer_layer_agrees_with_float32_to_the_digits_of_the_format(dtype, floor):
    model, data = layer(), feeds()
    truth = open_model(model).run(data)["y"]
    result = Half(dtype=dtype)(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert [d.action for d in result.decisions if d.action == "kept"] == []
    found = open_model(model, LITERAL).run(data)["y"]
    assert (found.dtype, computes_in(model, (ir.DataType[dtype.upper()],))) == (np.float32, True)
    assert floor < cosine(found, truth) < 1
    assert not Half(dtype=dtype)(model).modified


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_emulated_model_computes_what_the_reference_of_onnx_does(dtype):
    """Products are left out: the reference rounds each of their steps, a device only the result."""
    text = """g (float[n, 8] x) => (float[n, 16] y) {
        a = Add(x, b)  c = Mul(a, b)  d = Div(c, k)  e = Sqrt(d)  f = Neg(e)  h = Concat <axis = 1> (f, a)
        t = Transpose <perm = [1, 0]> (h)  u = Relu(t)  v = Sub(u, k)  w = Abs(v)
        y = Transpose <perm = [1, 0]> (w) }"""
    model = model_from(text, b=np.abs(normal(8)) + 1, k=np.float32(0.3))
    Half(dtype=dtype)(model)
    x = np.abs(normal(5, 8))
    (truth,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    np.testing.assert_array_equal(open_model(model, LITERAL).run({"x": x})["y"], np.asarray(truth, np.float32))


FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(st.lists(FLOATS, min_size=1, max_size=20), st.sampled_from(sorted(NUMPY)))
@settings(deadline=None, max_examples=60)
def test_every_number_is_rounded_as_numpy_rounds_it(numbers, dtype):
    model = model_from("g (float[n] x) => (float[n] y) { a = Abs(x)  b = Neg(a)  y = Neg(b) }")
    Half(dtype=dtype)(model)
    x = np.float32(numbers)
    with np.errstate(over="ignore"):
        truth = np.abs(x.astype(NUMPY[dtype])).astype(np.float32)
    np.testing.assert_array_equal(open_model(model, LITERAL).run({"x": x})["y"], truth)


def test_a_cpu_does_not_show_the_overflow_of_float16_and_a_literal_run_does():
    model = model_from("g (float[n] x) => (float[n] y) { a = Mul(x, x)  y = Sqrt(a) }")
    Half()(model)
    x = np.float32([1000])
    assert open_model(model).run({"x": x})["y"] == 1000
    assert np.isinf(open_model(model, LITERAL).run({"x": x})["y"])
    wide = model_from("g (float[n] x) => (float[n] y) { a = Mul(x, x)  y = Sqrt(a) }")
    Half(dtype="bfloat16")(wide)
    np.testing.assert_allclose(open_model(wide, LITERAL).run({"x": x})["y"], 1000, rtol=4e-3)


def test_an_emulated_model_keeps_names_and_types_and_leaves_the_original_alone():
    text = "g (float16[n, 4] x) => (float16[n, 4] y, float16[n, 4] z) { y = Mul(x, k)  z = Neg(y) }"
    model = model_from(text, k=np.float16([1, 2, 3, 4]))
    before = ir.to_proto(model).SerializeToString()
    work = model.clone()
    emulate(work)
    assert ir.to_proto(model).SerializeToString() == before
    onnx.checker.check_model(ir.to_proto(work), full_check=True)
    assert [(v.name, v.dtype) for v in (*work.graph.inputs, *work.graph.outputs)] == [
        ("x", F16),
        ("y", F16),
        ("z", F16),
    ]
    x = np.float16(normal(3, 4))
    found = open_model(model, LITERAL).run({"x": x})
    np.testing.assert_array_equal(found["y"], x * np.float16([1, 2, 3, 4]))
    np.testing.assert_array_equal(found["z"], -found["y"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_table_that_rows_are_taken_from_stays_short_in_an_emulated_model(dtype):
    """Widened, the word embeddings of a sentence encoder are half of the memory of a whole run."""
    table = normal(300, 8)
    model = model_from(
        "g (int64[n] x) => (float[n, 8] y) { a = Gather(table, x)  y = Mul(a, k) }", table=table, k=table[:1]
    )
    Half(dtype=dtype)(model)
    work = model.clone()
    emulate(work)
    table_read = next(node for node in work.graph if node.op_type == "Gather").inputs[0]
    assert table_read.dtype == ir.DataType[dtype.upper()]
    assert {v.dtype for node in work.graph for v in node.outputs if node.op_type != "Cast"} <= {
        ir.DataType.FLOAT,
        ir.DataType[dtype.upper()],
    }
    x = np.int64([299, 0, 7])
    rows = table[x].astype(NUMPY[dtype])
    truth = (rows.astype(np.float32) * table[:1].astype(NUMPY[dtype]).astype(np.float32)).astype(NUMPY[dtype])
    found = open_model(model, LITERAL, ["a"]).run({"x": x})
    np.testing.assert_array_equal(found["y"], truth.astype(np.float32))
    np.testing.assert_array_equal(found["a"].astype(np.float32), rows.astype(np.float32))


def test_inner_values_are_tapped_under_their_own_names():
    model, x = mlp(), normal(3, 32)
    Half(dtype="bfloat16")(model)
    inner = [value.name for node in model.graph for value in node.outputs]
    found = open_model(model, LITERAL, inner).run({"x": x})
    h = found["h"].astype(np.float32)
    np.testing.assert_array_equal(h, h.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(found["r"], np.maximum(h, 0))


def test_a_model_with_control_flow_is_not_emulated():
    text = """g (bool c, float16[n] x) => (float16[n] y) {
        y = If (c) <then_branch = t () => (float16[n] a) { a = Relu(x) },
                    else_branch = e () => (float16[n] b) { b = Neg(x) }> }"""
    model = model_from(text)
    before = ir.to_proto(model).SerializeToString()
    emulate(model)
    assert ir.to_proto(model).SerializeToString() == before


def test_only_a_literal_run_emulates_float16_and_every_run_on_a_cpu_bfloat16():
    model = mlp()
    Half(dtype="bfloat16")(model)
    x = normal(4, 32)
    np.testing.assert_array_equal(open_model(model).run({"x": x})["y"], open_model(model, LITERAL).run({"x": x})["y"])


def test_targets_without_bfloat16_are_a_usage_error_that_names_those_with_it():
    with pytest.raises(UsageError, match="target ort-cpu does not read bfloat16") as caught:
        Half(dtype="bfloat16", target="ort-cpu")(mlp())
    assert "tensorrt-rtx" in (caught.value.hint or "")
    assert "dtype" in (caught.value.where or "")


def test_constants_that_only_bfloat16_holds_are_no_reason_to_stay_in_float32():
    text = "g (float[n] x) => (float[n] y) { r = Mul(x, k)  a = Add(r, tiny)  y = Div(r, a) }"
    for dtype, count in (("float16", 3), ("bfloat16", 0)):
        model = model_from(text, k=np.float32(1e6), tiny=np.float32(1e-12))
        assert sum(d.action == "kept" for d in Half(dtype=dtype)(model).decisions) == count


def test_the_lowest_float32_does_not_become_infinite():
    model = model_from("g (float[n] x) => (float[n] y) { y = Max(x, low) }", low=np.finfo(np.float32).min)
    Half(dtype="bfloat16")(model)
    (low,) = (value.const_value.numpy() for value in model.graph.initializers.values())
    assert low == ml_dtypes.finfo(ml_dtypes.bfloat16).min


def test_an_operator_that_the_opset_does_not_define_for_bfloat16_is_kept():
    text = """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
        h = Relu(x)  c = Conv <pads = [1, 1, 1, 1]> (h, w)  y = Neg(c) }"""
    told = {
        opset: [d.reason for d in Half(dtype="bfloat16")(model_from(text, opset, w=normal(4, 4, 3, 3))).decisions]
        for opset in (20, 22)
    }
    assert told == {20: ["the operator has no bfloat16 form"], 22: []}


def test_quantizers_take_bfloat16_scales():
    model, x = mlp(), normal(6, 32)
    for value in (model.graph.inputs[0], model.graph[1].outputs[0]):
        value.meta[RANGE_KEY] = Range(-20.0, 20.0)
    truth = open_model(model).run({"x": x})["y"]
    Quantize(min_sqnr=0)(model)
    Half(dtype="bfloat16")(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert cosine(open_model(model, LITERAL).run({"x": x})["y"], truth) > 0.99


@pytest.mark.rtx
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_engine_is_built_from_a_transformer_layer(tmp_path, dtype):
    module = pytest.importorskip("tensorrt_rtx")
    model = layer()
    Half(dtype=dtype)(model)
    path = tmp_path / "model.onnx"
    onnx.save(ir.to_proto(model), path)
    profile = {"x": ([1, 1, 32], [2, 8, 32], [4, 16, 32]), "m": ([1, 1], [2, 8], [4, 16])}
    engine = build_engine(path, module, EngineOptions(profiles=(profile,)))
    assert engine.info.bytes > 0
    assert engine.info.layers > 0


def save(tmp_path, model):
    path = tmp_path / "m.onnx"
    onnx.save(ir.to_proto(model), path)
    np.savez(tmp_path / "data.npz", x=normal(40, 32))
    return path, tmp_path / "data.npz"


def test_a_build_judges_bfloat16_rounded_and_names_the_missing_observation(tmp_path):
    model, data = save(tmp_path, mlp())
    options = qexport.BuildOptions(output=tmp_path / "out", set=("export.engine=false",))
    result = qexport.build(model, recipe="bfloat16", eval=data, options=options)
    assert 30 < result.quality.sqnr < 50  # 8 bits of every number
    exact = qexport.build(model, recipe="float16", eval=data, options=options)
    assert 55 < exact.quality.sqnr < 75  # 11 bits
    told = [decision.reason for step in exact.steps for decision in step.decisions]
    assert "no data: no extremes were observed" in told
    assert "ranges were not observed, the guard knows constants only" in told


def test_a_build_keeps_in_float32_what_was_seen_to_overflow_and_says_so(tmp_path):
    text = (
        "g (float[n, 32] x) => (float[n, 32] y) { h = MatMul(x, w)  b = Mul(h, big)  r = Relu(b)  y = Mul(r, little) }"
    )
    overflowing = model_from(text, w=100 * np.eye(32, dtype=np.float32), big=np.float32(1e3), little=np.float32(1e-4))
    model, data = save(tmp_path, overflowing)
    options = qexport.BuildOptions(output=tmp_path / "out", set=("export.engine=false",))
    result = qexport.build(model, calib=data, recipe="float16", eval=data, options=options)
    assert result.quality.cosine_worst > 0.99999
    told = [d.reason for step in result.steps for d in step.decisions if d.action == "kept"]
    assert any(re.fullmatch(r"observed \S+ at its output, float16 ends at 65504", reason) for reason in told)
    with pytest.raises(GateFailed, match="NaN or infinity"):
        qexport.build(model, recipe="float16", eval=data, options=options)
