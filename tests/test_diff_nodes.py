"""Graphs compared node by node: a model against itself is empty, a change that is planted is the only line."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import qexport
from qexport.exporter.compare.nodes import compare_nodes
from qexport.exporter.compare.sides import Side
from qexport.exporter.options import BuildOptions

RNG = np.random.default_rng(0)
WEIGHT = RNG.integers(-127, 127, (32, 32)).astype(np.int8)


def numbers(**changed):
    """The constants of the model below."""
    return {
        "s": np.float32(0.02),
        "z": np.uint8(120),
        "w": WEIGHT,
        "ws": np.linspace(0.01, 0.05, 32, dtype=np.float32),
        "wz": np.zeros(32, np.int8),
        "bias": np.arange(32, dtype=np.float32),
        **changed,
    }


def nodes():
    """A quantized product with its bias, a Softmax, a difference."""
    return [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantizer"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dequantizer"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], name="weights", axis=1),
        helper.make_node("MatMul", ["d", "wd"], ["h"], name="product"),
        helper.make_node("Add", ["h", "bias"], ["b"], name="sum"),
        helper.make_node("Softmax", ["b"], ["p"], name="soft", axis=-1),
        helper.make_node("Sub", ["p", "b"], ["y"], name="difference"),
    ]


def proto(made=None, constants=None, output="float"):
    kind = {"float": TensorProto.FLOAT, "double": TensorProto.DOUBLE}[output]
    graph = helper.make_graph(
        nodes() if made is None else made,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])],
        [helper.make_tensor_value_info("y", kind, ["n", 32])],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in (constants or numbers()).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def model(*args, **kwargs):
    return ir.from_proto(proto(*args, **kwargs))


def edited(name, **fields):
    """The nodes, one of them changed: ``op``, ``inputs``, or an attribute."""
    made = nodes()
    node = next(node for node in made if node.name == name)
    if "op" in fields:
        node.op_type = fields.pop("op")
        del node.attribute[:]
    if "inputs" in fields:
        del node.input[:]
        node.input.extend(fields.pop("inputs"))
    for key, value in fields.items():
        del node.attribute[:]
        node.attribute.append(helper.make_attribute(key, value))
    return made


def without(name):
    """The nodes without one, whose reader reads what it read."""
    made = nodes()
    gone = next(node for node in made if node.name == name)
    made.remove(gone)
    for node in made:
        node.input[:] = [gone.input[0] if entry == gone.output[0] else entry for entry in node.input]
    return made


def with_negation():
    made = edited("difference", inputs=["m", "b"])
    made.insert(-1, helper.make_node("Neg", ["p"], ["m"], name="negation"))
    return made


def changed_at(array, index, value):
    copy = np.array(array)
    copy[index] = value
    return copy


def own_quantizer():
    """The first quantizer with a scale of its own."""
    return edited("quantizer", inputs=["x", "s2", "z"])


BASE = model()
PLANTED = {
    "a scale": (model(constants=numbers(s=np.float32(0.03))), "product", "scale"),
    "the scale of the quantizer alone": (
        model(own_quantizer(), {**numbers(), "s2": np.float32(0.03)}),
        "product",
        "scale",
    ),
    "a zero point": (model(constants=numbers(z=np.uint8(121))), "product", "scale"),
    "one scale of many": (model(constants=numbers(ws=changed_at(numbers()["ws"], 7, 1.0))), "product", "scale"),
    "a bit of a weight": (
        model(constants=numbers(w=changed_at(WEIGHT, (3, 4), WEIGHT[3, 4] ^ 1))),
        "product",
        "weights",
    ),
    "a number of a bias": (model(constants=numbers(bias=changed_at(numbers()["bias"], 0, 9.0))), "sum", "weights"),
    "the type of an activation": (
        model(constants=numbers(z=np.int8(0))),
        "product",
        "precision",
    ),
    "an attribute": (model(edited("soft", axis=0)), "soft", "attributes"),
    "an operator": (model(edited("soft", op="Sigmoid")), "soft", "operator"),
    "the order of inputs": (model(edited("difference", inputs=["b", "p"])), "difference", "wiring"),
    "a node less": (model(without("soft")), "soft", "removed"),
    "a node more": (model(with_negation()), "negation", "added"),
    "the type of an output": (model(output="double"), "output y", "precision"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_change_is_found_and_nothing_else(what):
    other, name, kind = PLANTED[what]
    found = {(change.name, change.kind) for change in compare_nodes(BASE, other)}
    assert found == {(name, kind)}
    back = {"added": "removed", "removed": "added"}.get(kind, kind)
    assert {(change.name, change.kind) for change in compare_nodes(other, BASE)} == {(name, back)}


def test_one_change_is_one_line_in_words_that_say_how_much():
    def line(what):
        (change,) = compare_nodes(BASE, PLANTED[what][0])
        return change.a, change.b

    assert line("a scale") == ("input 0: 0.02, zero point 120", "input 0: 0.03, zero point 120 (1.5x)")
    assert line("one scale of many")[1].startswith("input 1, axis 1: 1[7], zero point 0 (")
    assert line("one scale of many")[1].endswith("x, 1 of 32)")
    assert line("a bit of a weight")[1].endswith(" (1 of 1024 numbers)")
    assert line("the type of an activation") == ("uint8 x int8", "int8 x int8")
    assert line("an attribute") == ("axis=-1", "axis=0")


def test_what_becomes_quantized_is_one_line_for_the_layer():
    made = [node for node in edited("product", inputs=["x", "w"]) if "quantizer" not in node.name]
    made = [node for node in made if node.name != "weights"]
    constants = {"w": WEIGHT.astype(np.float32), "bias": numbers()["bias"]}
    (change,) = compare_nodes(model(made, constants), BASE)
    assert (change.name, change.kind, change.b) == ("product", "precision", "uint8 x int8")


def test_neither_model_is_changed_by_being_compared():
    one, other = model(), PLANTED["a scale"][0]
    before = [ir.to_proto(side).SerializeToString() for side in (one, other)]
    list(compare_nodes(one, other))
    assert [ir.to_proto(side).SerializeToString() for side in (one, other)] == before


def test_nodes_in_subgraphs_and_nodes_without_names_are_compared_too():
    def branch(name, number):
        constant = helper.make_node("Constant", [], [f"c{name}"], value_floats=[number])
        made = [constant, helper.make_node("Identity", [f"c{name}"], [f"o{name}"])]
        return helper.make_graph(made, name, [], [helper.make_tensor_value_info(f"o{name}", TensorProto.FLOAT, [1])])

    def conditional(number):
        node = helper.make_node("If", ["c"], ["r"], then_branch=branch("t", 1.0), else_branch=branch("e", number))
        inputs = [helper.make_tensor_value_info("c", TensorProto.BOOL, [])]
        graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("r", TensorProto.FLOAT, [1])])
        return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))

    assert list(compare_nodes(conditional(2.0), conditional(2.0))) == []
    (change,) = compare_nodes(conditional(2.0), conditional(3.0))
    assert change.kind == "weights"
    assert change.name == "Identity of oe"


OPS = {"Relu": 1, "Neg": 1, "Add": 2, "MatMul": 2, "Sub": 2, "QuantizeLinear": 0}


@st.composite
def chains(draw):
    """A chain of operators on [n, 4], constants at the second input, some values between quantizers."""
    made, constants, last = [], {}, "x"
    for number, op in enumerate(draw(st.lists(st.sampled_from(sorted(OPS)), min_size=1, max_size=8))):
        out = f"v{number}"
        named = draw(st.sampled_from([f"n{number}", "", "twin"]))
        if op == "QuantizeLinear":
            constants[f"s{number}"] = np.float32(draw(st.floats(2**-10, 1, width=32)))
            constants[f"z{number}"] = np.int8(draw(st.integers(-5, 5)))
            inner = [f"s{number}", f"z{number}"]
            made.append(helper.make_node(op, [last, *inner], [f"q{number}"]))
            made.append(helper.make_node("DequantizeLinear", [f"q{number}", *inner], [out]))
        elif OPS[op] == 2:
            constants[f"c{number}"] = np.full((4, 4), draw(st.floats(-2, 2, width=32)), np.float32)
            made.append(helper.make_node(op, [last, f"c{number}"], [out], name=named))
        else:
            made.append(helper.make_node(op, [last], [out], name=named))
        last = out
    ports = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4])] for name in ("x", last)]
    weights = [numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()]
    graph = helper.make_graph(made, "g", *ports, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@settings(max_examples=60, deadline=None)
@given(chains())
def test_a_model_against_itself_is_empty(chain):
    one = ir.from_proto(chain)
    other = ir.from_proto(onnx.ModelProto.FromString(ir.to_proto(one).SerializeToString()))
    assert list(compare_nodes(one, other)) == []
    assert qexport.diff(Side("a", model=one), Side("b", model=other)).same


@settings(max_examples=60, deadline=None)
@given(chains(), st.data())
def test_every_bit_of_every_constant_counts(chain, data):
    if not chain.graph.initializer:
        return
    other = onnx.ModelProto.FromString(chain.SerializeToString())
    tensor = other.graph.initializer[data.draw(st.integers(0, len(other.graph.initializer) - 1))]
    place = data.draw(st.integers(0, 8 * len(tensor.raw_data) - 1))
    raw = bytearray(tensor.raw_data)
    raw[place // 8] ^= 1 << (place % 8)
    tensor.raw_data = bytes(raw)
    found = list(compare_nodes(ir.from_proto(chain), ir.from_proto(other)))
    assert found
    assert {change.kind for change in found} == {"weights" if tensor.name[0] == "c" else "scale"}


@pytest.mark.parametrize("recipe", ["int8", "int8-qlinear", "int4-weights", "nf4-weights"])
def test_every_constant_of_a_build_counts_and_scales_are_told_from_weights(tmp_path, recipe):
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[n, 64] x) => (float[n, 64] y) { h = MatMul(x, w)
        r = Relu(h)
        y = MatMul(r, v) }"""
    source = onnx.parser.parse_model(text)
    for name in "wv":
        array = RNG.standard_normal((64, 64)).astype(np.float32)
        source.graph.initializer.append(numpy_helper.from_array(array, name))
    (tmp_path / "model.onnx").write_bytes(source.SerializeToString())
    np.savez(tmp_path / "x.npz", x=RNG.standard_normal((32, 64)).astype(np.float32))
    steps = ("weight-only.group=32",) if recipe == "int4-weights" else ()
    options = BuildOptions(output=tmp_path / "out", set=("export.never_worse=false", *steps))
    qexport.build(tmp_path / "model.onnx", recipe=recipe, calib=tmp_path / "x.npz", target="ort-cpu", options=options)
    result = onnx.load(tmp_path / "out/model.onnx")
    first, kinds = ir.from_proto(result), set()
    for number, tensor in enumerate(result.graph.initializer):
        other = onnx.ModelProto.FromString(result.SerializeToString())
        array = numpy_helper.to_array(tensor)
        if array.dtype.kind != "f" or array.size == 0:
            continue
        other.graph.initializer[number].CopyFrom(numpy_helper.from_array(array * array.dtype.type(1.5), tensor.name))
        found = list(compare_nodes(first, ir.from_proto(other)))
        if array.any():
            assert found, tensor.name
        kinds |= {change.kind for change in found}
    assert "scale" in kinds
    assert kinds <= {"scale", "weights"}
