import json

import cached_models
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from helpers import model_from
from onnx_ir.passes.common import ShapeInferencePass
from safetensors.numpy import save_file

from qexport.exporter.load import load_model
from qexport.passes.half import Half
from qexport.passes.numbers.range import RANGE_KEY, Range
from qexport.passes.quantize import Quantize
from qexport.runtime.decoder import Decoder

RNG = np.random.default_rng(0)
F16, F32 = ir.DataType.FLOAT16, ir.DataType.FLOAT


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def run(model, **feeds):
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return ort_run(model, **feeds)


def ort_run(model, **feeds):
    proto = ir.to_proto(model)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def reasons(result):
    return [decision.reason for decision in result.decisions if decision.action == "kept"]


def mlp():
    text = "g (float[n, 32] x) => (float[n, 16] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"
    return model_from(text, w=normal(32, 24), v=normal(24, 16))


def test_inner_values_and_weights_become_half_and_the_borders_keep_their_types():
    model = mlp()
    assert Half()(model).modified
    assert [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)] == [F32, F32]
    assert model.graph.outputs[0].name == "y"
    assert {value.const_value.dtype for value in model.graph.initializers.values()} == {F16}
    assert all(node.outputs[0].dtype == F16 for node in model.graph if node.op_type in ("MatMul", "Relu"))


def test_numbers_agree_to_half_precision():
    model, x = mlp(), normal(40, 32)
    (before,) = run(model, x=x)
    Half()(model)
    (after,) = run(model, x=x)
    assert after.dtype == np.float32
    np.testing.assert_allclose(after, before, atol=0.1, rtol=0.01)
    assert np.abs(after - before).max() > 0


def test_the_model_it_was_cloned_from_stays_in_float32():
    model = mlp()
    clone = model.clone()
    Half()(clone)
    assert {value.dtype for node in model.graph for value in node.outputs} == {F32}


def test_a_second_run_changes_nothing():
    model = mlp()
    Half()(model)
    before = ir.to_proto(model).SerializeToString()
    assert not Half()(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_targets_that_compute_in_float32_are_left_alone():
    result = Half(target="ort-cpu")(mlp())
    assert not result.modified
    assert "computes in float32" in result.decisions[0].reason


def test_scales_of_quantizers_become_half_without_changing_value():
    model = mlp()
    for value in (model.graph.inputs[0], model.graph[1].outputs[0]):
        value.meta[RANGE_KEY] = Range(-4.0, 4.0)
    Quantize(min_sqnr=0)(model)
    before = {n: v.const_value.numpy() for n, v in model.graph.initializers.items() if n.endswith("/scale")}
    Half()(model)
    for name, scale in before.items():
        half = model.graph.initializers[f"{name}/half"].const_value.numpy()
        assert half.dtype == np.float16
        np.testing.assert_array_equal(half.astype(np.float32), scale)
    run(model, x=normal(3, 32))


def test_old_quantizers_are_refused():
    model = model_from("g (float[n, 32] x) => (float[n, 24] y) { y = MatMul(x, w) }", opset=17, w=normal(32, 24))
    model.graph.inputs[0].meta[RANGE_KEY] = Range(-4.0, 4.0)
    Quantize()(model)
    result = Half()(model)
    assert not result.modified
    assert "needs opset 19" in result.decisions[0].reason


def test_casts_to_float_become_casts_to_half():
    model = model_from("g (int64[n] x) => (float[n] y) { f = Cast <to = 1> (x)  y = Relu(f) }")
    Half()(model)
    assert [node.op_type for node in model.graph] == ["Cast", "Relu", "Cast"]
    np.testing.assert_array_equal(run(model, x=np.array([1, 2]))[0], [1, 2])


def test_an_operator_without_a_half_form_is_kept():
    text = "g (float[1, 1, 4, 4] x) => (float[1, 1, 8, 8] y) { h = Relu(x)  y = Resize(h, roi, scales) }"
    model = model_from(text, roi=np.zeros(0, np.float32), scales=np.float32([1, 1, 2, 2]))
    x = normal(1, 1, 4, 4)
    result = Half()(model)
    assert [(d.op, d.action, d.reason) for d in result.decisions if d.op != "graph"] == [
        ("Resize", "kept", "the operator has no float16 form")
    ]
    dtypes = {node.op_type: (node.inputs[0].dtype, node.outputs[0].dtype) for node in model.graph}
    assert dtypes["Resize"] == (F32, F32)
    assert dtypes["Relu"] == (F16, F16)
    np.testing.assert_allclose(run(model, x=x)[0], np.maximum(x, 0).repeat(2, 2).repeat(2, 3), atol=2e-3)


def test_an_output_that_is_read_inside_as_well_keeps_its_name():
    model = model_from("g (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) { y = Relu(x)  z = Neg(y) }")
    Half()(model)
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    x = normal(3, 4)
    y, z = run(model, x=x)
    np.testing.assert_allclose(y, np.maximum(x, 0), atol=2e-3)
    np.testing.assert_allclose(z, -y)


def test_control_flow_is_left_alone_with_a_reason():
    text = """g (bool c, float[n] x) => (float[n] y) {
        y = If (c) <then_branch = t () => (float[n] a) { a = Relu(x) },
                    else_branch = e () => (float[n] b) { b = Neg(x) }> }"""
    result = Half()(model_from(text))
    assert not result.modified
    assert "control flow" in result.decisions[0].reason


@pytest.mark.parametrize(
    "text",
    [
        "g (int64[1] s, float[n] x) => (float[m] y) { c = ConstantOfShape(s)  y = Sub(c, x) }",
        "g (int64[1] s, float[n] x) => (float[m] y) { c = ConstantOfShape <value = float[1] {3.0}> (s)  y = Add(c, x)}",
        "g (int64[1] s, float[n] x) => (float[n] y) { c = Constant <value_float = 2.5> ()  y = Mul(c, x) }",
        "g (int64[1] s, float[n] x) => (float[n] y) { c = Constant <value_floats = [2.5, 1.0]> ()  y = Mul(c, x) }",
        "g (int64[1] s, float[2, 2] x) => (float[2, 2] y) { e = EyeLike <dtype = 1> (x)  y = Add(e, x) }",
        "g (int64[1] s, float[n] x) => (float[n] y) { r = RandomNormal <shape = [2], seed = 1.0> ()  z = Sub(r, r)"
        "  y = Add(z, x) }",
        "g (int64[1] s, float[n] x) => (float[n] y) { r = Relu(x)  b = Bernoulli <dtype = 1> (r)  y = Mul(b, x) }",
        "g (int64[1] s, float[n] x) => (float[m] y) { w = HannWindow(s)  y = Mul(w, x) }",
        "g (int64[1] s, float[n] x) => (float[m] y) { r = Relu(x)  q = SplitToSequence(r)"
        "  i = Constant <value_int = 1> ()  a = SequenceAt(q, i)  y = Neg(a) }",
        "g (int64[1] s, float[n] x) => (float[m] y) { r = Relu(x)  q = SequenceConstruct(r, x)"
        "  a = ConcatFromSequence <axis = 0> (q)  y = Neg(a) }",
    ],
)
def test_what_fixes_its_type_itself_is_converted_or_kept_but_never_mixed(text):
    model = model_from(text)
    x = np.ones((2, 2) if "2, 2" in text else 2, np.float32)
    before = run(model, s=np.array([2]), x=x)
    Half()(model)
    for found, expected in zip(run(model, s=np.array([2]), x=x), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert not Half()(model).modified


def test_constants_of_every_spelling_are_half_for_half_readers():
    text = """g (int64[1] s, float[n] x) => (float[m] y) {
        a = ConstantOfShape(s)  b = Constant <value_float = 2.5> ()  c = Mul(a, b)  y = Mul(c, x) }"""
    model = model_from(text)
    Half()(model)
    assert [(node.op_type, node.outputs[0].dtype) for node in model.graph][-4:] == [
        ("ConstantOfShape", F16), ("Mul", F16), ("Mul", F16), ("Cast", F32)
    ]  # fmt: skip


def test_what_an_unknown_operator_makes_stays_as_it_is():
    text = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
    g (float[n, 4] x) => (float[n, 4] y) { r = Relu(x)  q = com.microsoft.QuickGelu(r)  a = Add(q, x)  b = Neg(a)
        y = Mul(b, x) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    x = normal(3, 4)
    (before,) = ort_run(model, x=x)
    result = Half()(model)
    assert "a value is no tensor, or of unknown type" in {decision.reason for decision in result.decisions}
    np.testing.assert_allclose(ort_run(model, x=x)[0], before, atol=0.02)


def test_an_initializer_that_a_caller_overrides_is_cast_and_not_frozen():
    text = '<ir_version: 10, opset_import: ["" : 20]>\ng (float[n] x, float[1] k) => (float[n] y) { y = Mul(x, k) }'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([2]), "k"))
    model = ir.from_proto(proto)
    Half()(model)
    np.testing.assert_array_equal(run(model, x=np.float32([1]), k=np.float32([5]))[0], [5])


def test_a_large_constant_node_reaches_its_kept_reader_whole():
    text = """g (float[n] x) => (float[n] y) {
        r = Relu(x)  c = Constant <value_floats = [1000000.0, 1.0]> ()  y = Mul(r, c) }"""
    model = model_from(text)
    Half()(model)
    np.testing.assert_array_equal(run(model, x=np.ones(2, np.float32))[0], [1e6, 1])


GUARDS = {
    "maximum": "g = Max(r, tiny)  y = Div(r, g)",
    "sum": "g = Add(r, tiny)  y = Div(r, g)",
    "clip": "g = Clip(r, tiny)  e = Identity(g)  y = Div(r, e)",
    "root": "q = Mul(r, r)  g = Add(q, tiny)  e = Sqrt(g)  y = Div(r, e)",
    "reciprocal": "g = Add(r, tiny)  e = Reciprocal(g)  y = Mul(r, e)",
    "two": "g = Max(r, tiny)  h = Max(x, tiny)  e = Mul(g, h)  y = Div(r, e)",
    "expanded": "s = Shape(r)  t = Expand(tiny, s)  g = Max(r, t)  y = Div(r, g)",
    "filled": "s = Shape(r)  t = ConstantOfShape <value = float[1] {1e-12}> (s)  g = Max(r, t)  y = Div(r, g)",
    "constant": "t = Constant <value_float = 1e-12> ()  g = Max(r, t)  y = Div(r, g)",
    "divisor": "z = Mul(r, r)  y = Div(z, tiny)",
    "few": "g = Max(r, few)  y = Div(r, g)",
}


@pytest.mark.parametrize("guard", sorted(GUARDS))
@pytest.mark.parametrize("tiny", [1e-12, 1e-6])
def test_what_guards_a_division_guards_it_in_half_precision_too(guard, tiny):
    text = f"g (float[2] x) => (float[2] n) {{ r = Relu(x)  {GUARDS[guard]}  n = Neg(y) }}"
    model = model_from(text, tiny=np.float32(tiny), few=np.float32([tiny, tiny]))
    result = Half()(model)
    assert "a constant is too small for float16" in {decision.reason for decision in result.decisions}
    (found,) = run(model, x=np.float32([0, 0]))
    np.testing.assert_array_equal(found, [0, 0])
    dtypes = {node.op_type: node.outputs[0].dtype for node in model.graph}
    assert dtypes["Relu"] == F16
    assert dtypes["Neg"] == F16 or guard == "divisor"
    assert not Half()(model).modified


def test_a_small_bias_guards_nothing():
    model = model_from(
        "g (float[n, 32] x) => (float[n, 32] y) { m = MatMul(x, w)  y = Add(m, b) }",
        w=normal(32, 32),
        b=np.full(32, 1e-5, np.float32),
    )
    assert reasons(Half()(model)) == []


def test_names_that_the_model_has_already_are_not_used_again():
    text = """g (float[n, 32] x) => (float[n, 16] y, float[n, 24] s) {
        h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, k)  s = Exp(r) }"""
    plain = model_from(text, w=normal(32, 24), k=normal(24, 16))
    for node, name in zip(plain.graph, ["w/half", "x/float16"], strict=False):
        node.outputs[0].name = name
    for node, name in zip(plain.graph, ["x/Cast_float16", "y/Cast_output", "a", "b"], strict=True):
        node.name = name
    model = plain.clone()
    model.graph.initializers["k"].name = "y/half"
    assert Half()(model).modified
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)]
    for items in (values, list(model.graph)):
        names = [item.name for item in items]
        assert len(set(names)) == len(names)
    x = normal(5, 32) / 10
    np.testing.assert_allclose(run(model, x=x)[0], run(plain, x=x)[0], atol=0.05)


def tiny_bert(folder):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    size |= {"vocab_size": 20, "max_position_embeddings": 8}
    norms = ["embeddings", "encoder.layer.0.attention.output", "encoder.layer.0.output"]
    layers = [f"attention.self.{part}" for part in ("query", "key", "value")] + ["attention.output.dense"]
    shapes = {f"embeddings.{kind}_embeddings.weight": (n, 16) for kind, n in
              (("word", 20), ("position", 8), ("token_type", 2))}  # fmt: skip
    shapes |= {f"{scope}.LayerNorm.{part}": (16,) for scope in norms for part in ("weight", "bias")}
    linears = dict.fromkeys(layers, (16, 16)) | {"intermediate.dense": (32, 16), "output.dense": (16, 32)}
    for name, shape in linears.items():
        shapes |= {f"encoder.layer.0.{name}.weight": shape, f"encoder.layer.0.{name}.bias": shape[:1]}
    save_file({name: normal(*shape) / 4 for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "layer_norm_eps": 1e-12} | size))
    return load_model(folder)


def test_the_pooling_of_bert_survives_a_sentence_of_padding(tmp_path):
    model = tiny_bert(tmp_path)
    ids = np.arange(8).reshape(2, 4)
    feeds = {"input_ids": ids, "attention_mask": np.array([[1, 1, 1, 0], [0, 0, 0, 0]]), "token_type_ids": 0 * ids}
    _, before = run(model, **feeds)
    assert Half()(model).modified
    _, after = run(model, **feeds)
    np.testing.assert_array_equal(after[1], 0)
    np.testing.assert_allclose(after[0], before[0], atol=5e-3)
    assert sum(node.outputs[0].dtype == F16 for node in model.graph if node.op_type == "MatMul") == 8


def test_a_quantizer_reads_halves_straight_from_what_makes_them():
    model = mlp()
    for value in (model.graph.inputs[0], model.graph[1].outputs[0]):
        value.meta[RANGE_KEY] = Range(-4.0, 4.0)
    Quantize(min_sqnr=0)(model)
    Half()(model)
    of_input, of_hidden = (node for node in model.graph if node.op_type == "QuantizeLinear")
    assert of_input.inputs[0] is model.graph.inputs[0]  # float32 as the caller gives it
    assert [value.dtype for value in of_hidden.inputs[:2]] == [ir.DataType.FLOAT16] * 2
    assert of_hidden.inputs[0].producer().op_type != "Cast"


def test_a_cache_becomes_short_at_both_ends_and_is_never_copied():
    model = ShapeInferencePass()(cached_models.portable(cached_models.Tiny())).model
    assert Half()(model).modified
    writes = [node for node in model.graph if node.op_type == "TensorScatter"]
    assert len(writes) == 4
    for node in writes:
        past, present = node.inputs[0], node.outputs[0]
        assert past.is_graph_input()
        assert present.is_graph_output()
        assert past.dtype == present.dtype == F16
        assert present.name == past.name.replace("past_key_values", "present")
    (logits,) = (value for value in model.graph.outputs if value.name == "logits")
    assert logits.dtype == F32
    assert not any(node.op_type == "Cast" and node.inputs[0].is_graph_input() for node in model.graph)
    ids = np.random.default_rng(3).integers(0, cached_models.VOCABULARY, (1, 12))
    found = Decoder(cached_models.serialized(model)).extend(ids)[0]
    truth = cached_models.forward(cached_models.Tiny(), ids[0])
    assert np.abs(found - truth).max() < 2e-2 * np.abs(truth).max()
