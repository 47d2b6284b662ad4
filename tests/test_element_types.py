"""Element types without shape inference: held against onnx's own, operator by operator and on whole models."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from qexport.exporter.load import load_model
from qexport.exporter.looking.element_types import element_types

HEAD = '<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1, "mine" : 1]>\n'
INPUTS = "float16[n, 32] x, float[n, 32] f, int64[2] s, int8[n, 32] i, bool c, float k"


def parse(body: str, opset: int = 21, more: str = "") -> ir.Model:
    """A model whose inner values carry no types."""
    text = f"{HEAD.format(opset=opset)} g ({INPUTS}) => (y) {{ {body} }} {more}"
    return ir.from_proto(onnx.parser.parse_model(text))


def found(model: ir.Model, name: str = "y") -> str | None:
    types = element_types(model)
    values = {value.name: value for node in model.graph.all_nodes() for value in node.outputs}
    dtype = types.of(values[name])
    return None if dtype is None else dtype.name


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("h = Relu(x) y = Add(h, h)", "FLOAT16"),
        ("h = Cast <to = 1> (x) y = Tanh(h)", "FLOAT"),
        ("h = CastLike(f, x) y = Tanh(h)", "FLOAT16"),
        ("y = Shape(x)", "INT64"),
        ("y = Greater(x, x)", "BOOL"),
        ("y, i2 = TopK(x, s)", "FLOAT16"),
        ("t, y = TopK(x, s)", "INT64"),
        ("y = ConstantOfShape(s)", "FLOAT"),
        ("y = ConstantOfShape <value = int32[1] {3}> (s)", "INT32"),
        ("y = Constant <value_ints = [1, 2]> ()", "INT64"),
        ("y = Constant <value_float = 1.0> ()", "FLOAT"),
        ("y = EyeLike(x)", "FLOAT16"),
        ("y = EyeLike <dtype = 6> (x)", "INT32"),
        ("y = RandomNormal <shape = [2]> ()", "FLOAT"),
        ("y = RandomNormalLike(x)", "FLOAT16"),
        ("y = HannWindow <output_datatype = 11> (s)", "DOUBLE"),
        ("y = QuantizeLinear(f, k)", "UINT8"),
        ("y = QuantizeLinear <output_dtype = 3> (f, k)", "INT8"),
        ("q = QuantizeLinear(f, k) y = DequantizeLinear(q, k)", "FLOAT"),
        ("y, sc, z = DynamicQuantizeLinear(f)", "UINT8"),
        ("q, y, z = DynamicQuantizeLinear(f)", "FLOAT"),
        ("y = Where(c, x, x)", "FLOAT16"),
        ("y = OneHot(s, s, f)", "FLOAT"),
        ("y = Concat <axis = 0> (x, x)", "FLOAT16"),
        ("l = SplitToSequence(x) y = SequenceAt(l, s)", "FLOAT16"),
        ("y = com.microsoft.MatMulIntegerToFloat(i, i, f, f)", "FLOAT"),
        ("y = com.microsoft.NobodyKnows(x)", None),
        ("y = If(c) <then_branch = t () => (a) { a = Relu(x) }, else_branch = e () => (b) { b = Neg(x) }>", "FLOAT16"),
    ],
)
def test_the_type_of_an_output_follows_from_operator_inputs_and_attributes(body, expected):
    assert found(parse(body)) == expected


def test_dequantized_values_have_the_type_of_their_scale_or_the_one_that_is_named():
    assert found(parse("y = DequantizeLinear(i, k)", opset=23)) == "FLOAT"
    assert found(parse("y = DequantizeLinear <output_dtype = 10> (i, k)", opset=23)) == "FLOAT16"


def test_bodies_of_loops_take_types_from_what_they_are_handed():
    body = """y = Loop(s, c, x) <body = b (int64 n, bool d, v) => (e, w) { e = Identity(d) w = Relu(v) }>"""
    model = parse(body)
    assert found(model) == found(model, "w") == "FLOAT16"
    assert found(model, "e") == "BOOL"


def test_functions_are_typed_by_their_calls():
    more = '<domain: "mine", opset_import: ["" : 21]> twice (a) => (b) { h = Relu(a) b = Add(h, h) }'
    assert found(parse("h = mine.twice(f) y = mine.twice(x)", more=more)) == "FLOAT16"
    assert found(parse("y0 = mine.twice(x) y = mine.twice(f)", more=more)) == "FLOAT"


def test_what_is_stored_is_seen_through_operators_that_move_data_alone():
    model = parse("d = DequantizeLinear(i, k) t = Transpose(d) y = Relu(t)")
    types = element_types(model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    names = {name: types.stored(value).name for name, value in values.items()}
    assert names == {"d": "INT8", "t": "INT8", "y": "FLOAT"}


def test_the_model_is_left_as_it_was():
    model = parse("h = Relu(x) y = Neg(h)")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    element_types(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_chain_of_a_hundred_thousand_nodes_needs_no_recursion():
    value = first = ir.Value(name="x", type=ir.TensorType(ir.DataType.INT8))
    nodes = []
    for _ in range(100_000):
        nodes.append(ir.Node("", "Identity", [value], num_outputs=1))
        value = nodes[-1].outputs[0]
    model = ir.Model(ir.Graph([first], [value], nodes=nodes, opset_imports={"": 21}), ir_version=10)
    assert element_types(model).of(value) == ir.DataType.INT8


@pytest.mark.parametrize("name", ["decoder/stories260k", "minilm"])
def test_whole_models_are_typed_as_shape_inference_types_them(name, request):
    path = request.getfixturevalue("minilm") if name == "minilm" else request.getfixturevalue("samples") / name
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(load_model(path)))
    told = {info.name: info.type.tensor_type.elem_type for info in proto.graph.value_info}
    del proto.graph.value_info[:]
    model = ir.from_proto(proto)
    types = element_types(model)
    values = {value.name: value for node in model.graph for value in node.outputs if value.name in told}
    assert len(values) > 50
    assert {name: int(types.of(value) or 0) for name, value in values.items()} == {name: told[name] for name in values}


def test_a_weight_that_is_missing_is_of_unknown_type():
    model = parse("y = MatMul(f, w)")
    assert element_types(model).of(model.graph[0].inputs[1]) is None
    assert element_types(model).stored(None) is None
