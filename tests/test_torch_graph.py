"""A graph as an exporter may leave it, with every name twice, brought to order; needs no torch."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import session

from qexport.errors import BuildFailed
from qexport.exporter.doors.inputs import parse_inputs
from qexport.exporter.doors.torch_modules.graph import tidy

INPUTS = parse_inputs(["w:float32[batch,s1]", "b:float32[batch]"])


def value(name, shape, kind=ir.DataType.FLOAT):
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))


def weight(name, array):
    return ir.Value(name=name, const_value=ir.tensor(array, name=name))


@pytest.fixture
def model():
    """Inputs ``x`` [s0, s1] and ``y`` [s0]; initializers share memory; outputs are inputs, weights and each other."""
    x, y = value("x", ["s0", "s1"]), value("y", ["s0"])
    numbers = np.arange(6, dtype=np.float32).reshape(3, 2)
    one, two = weight("inner.w", numbers), weight("inner.tied", numbers)
    other, idle = weight("inner.same", numbers.copy()), weight("idle", numbers.copy())
    nodes = [
        ir.node("Shape", [x], outputs=[value("b", [2], ir.DataType.INT64)], name="n"),
        ir.node("MatMul", [x, one], outputs=[value("out", ["s0", 2])], name="n"),
        ir.node("MatMul", [x, two], outputs=[value("m", ["s0", 2])], name="n"),
        ir.node("Add", [one, other], outputs=[value("sum", [3, 2])], name="n"),
    ]
    products = [node.outputs[0] for node in nodes[1:3]]
    nodes.insert(3, ir.node("Concat", products, {"axis": 0}, outputs=[value("held", ["2*s0", "u0"])]))
    scopes = "['', 'inner', 'inner.layer', 'matmul']"
    nodes[1].metadata_props.update({"pkg.torch.onnx.name_scopes": scopes, "pkg.torch.onnx.stack_trace": "File secret"})
    nodes[2].doc_string = "File secret"
    product = nodes[1].outputs[0]
    outputs = [x, product, product, one, nodes[0].outputs[0], nodes[3].outputs[0], nodes[4].outputs[0]]
    graph = ir.Graph([x, y], outputs, nodes=nodes, initializers=[one, two, other, idle], opset_imports={"": 24})
    graph.doc_string = "secret"
    graph.metadata_props["pkg.torch"] = "secret"
    x.metadata_props["pkg.torch"] = "secret"
    return ir.Model(graph, ir_version=10)


NAMES = ("w_out", "out", "inner.w", "y", "x", "held", "total")


def test_the_graph_is_in_order_and_computes_the_same(model):
    feeds = {"w": np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32), "b": np.ones(4, np.float32)}
    tidied = tidy(model, INPUTS, NAMES, "inner.")
    proto = ir.to_proto(tidied)
    onnx.checker.check_model(proto, full_check=True)
    found = dict(zip(NAMES, session(tidied).run(list(NAMES), feeds), strict=True))
    numbers = np.arange(6, dtype=np.float32).reshape(3, 2)
    product = feeds["w"] @ numbers
    truth = [feeds["w"], product, product, numbers, [4, 3], np.concatenate([product, product]), numbers * 2]
    for name, expected in zip(NAMES, truth, strict=True):
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)


def test_names_are_unique_and_places_name_nodes(model):
    graph = tidy(model, INPUTS, NAMES, "inner.").graph
    made = [out.name for node in graph for out in node.outputs]
    names = [*(one.name for one in graph.inputs), *graph.initializers, *made]
    assert len(set(names)) == len(names)
    assert [one.name for one in graph.inputs] == ["w", "b"]
    assert [one.name for one in graph.outputs] == list(NAMES)
    assert len(set(graph.outputs)) == len(NAMES)
    assert "layer/MatMul" in [node.name for node in graph]
    assert len({node.name for node in graph}) == len(graph)


def test_weights_in_the_same_memory_are_one_and_equal_ones_are_not(model):
    weights = tidy(model, INPUTS, NAMES, "inner.").graph.initializers
    assert len(weights) == 2
    assert "same" in weights


def test_dimensions_are_renamed_also_when_a_symbol_has_the_name(model):
    graph = tidy(model, INPUTS, NAMES, "inner.").graph
    shapes = {one.name: [str(dim) for dim in one.shape] for one in (*graph.inputs, *graph.outputs)}
    assert shapes["w"] == shapes["w_out"] == ["batch", "s1"]
    assert shapes["b"] == ["batch"]
    assert shapes["held"] == ["2*batch", "u0"]


def test_a_symbol_that_nobody_asked_for_gives_its_name_up(model):
    asked = parse_inputs(["w:float32[u0,k]", "b:float32[u0]"])
    graph = tidy(model, asked, NAMES, "inner.").graph
    assert [str(dim) for dim in graph.outputs[5].shape] == ["2*u0", "u0_"]


def test_notes_of_the_exporter_are_gone(model):
    tidied = tidy(model, INPUTS, NAMES, "inner.")
    assert b"secret" not in ir.to_proto(tidied).SerializeToString()
    assert tidied.ir_version == 11


@pytest.mark.parametrize(("inputs", "outputs"), [(INPUTS[:1], NAMES), (INPUTS, NAMES[:3])])
def test_a_graph_with_other_ends_is_refused(model, inputs, outputs):
    with pytest.raises(BuildFailed, match=r"made a graph of \d (in|out)puts of a module with \d"):
        tidy(model, inputs, outputs, "inner.")
