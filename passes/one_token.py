"""Say of a portable decoder that it reads one token of each row, and drop what only moved that axis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qexport.passes import match
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.portable import IDS, LOGITS, POSITIONS


@dataclass(frozen=True)
class OneToken(Pass):
    """Fix the sequence of a decoder at one token; what it computes for one stays the same.

    1. Shapes are inferred anew from ``input_ids`` and ``position_ids`` [batch, 1].
    2. A Transpose that passes axes of size 1 over others, and nothing else, becomes a Reshape.
    3. Two Reshapes in a row become one.

    A Transpose of few numbers costs a runtime as much as any other node: some 0.5 microseconds.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Rewrite the main graph."""
        modified = _narrow(model)
        moved = [_reshape(node) for node in tuple(model.graph) if _stays(node)]
        for node in tuple(model.graph):
            if node.op_type == "Reshape" and node.domain == "":
                moved += _merge(node)
        return Outcome(model, modified or bool(moved), tuple(moved))


def _narrow(model: ir.Model) -> bool:
    """Write 1 where inputs and logits have the sequence, and infer all other shapes; whether that is news."""
    import onnx_ir.passes.common as common

    graph = model.graph
    ports = [value for value in graph.inputs if value.name in (IDS, POSITIONS)]
    ports += [value for value in graph.outputs if value.name == LOGITS]
    wide = [value for value in ports if value.shape is not None and value.shape[1] != 1]
    for value in wide:
        batch, _, *rest = match.dims(value) or ()
        value.shape = ir.Shape([batch, 1, *rest])
    if wide:
        for node in graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = None
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    return bool(wide)


def _stays(node: ir.Node) -> bool:
    """Whether a Transpose leaves all numbers where they are, and its result has a shape that Reshape can be told."""
    sizes = match.dims(node.inputs[0]) if node.op_type == "Transpose" and node.domain == "" else None
    order = match.perm(node)
    if sizes is None or len(order) != len(sizes):
        return False
    wide = [axis for axis in order if sizes[axis] != 1]
    known = all(isinstance(sizes[axis], int) or axis == place for place, axis in enumerate(order))
    return wide == sorted(wide) and known


def _reshape(node: ir.Node) -> Decision:
    """Put a Reshape in the place of a Transpose; 0 keeps the size of an axis."""
    source = node.inputs[0]
    sizes = match.dims(source)
    assert source is not None
    assert sizes is not None
    told = [size if isinstance(size, int) else 0 for size in (sizes[axis] for axis in match.perm(node))]
    _write(node, source, told)
    return Decision(node.name or "", "Transpose", "folded", "moves axes of size 1 only")


def _merge(node: ir.Node) -> list[Decision]:
    """Let a Reshape read what the Reshape before it read."""
    before = match.producer(node.inputs[0], "Reshape")
    shapes = [match.array(each.inputs[1]) for each in (before, node) if each is not None and not _literal(each)]
    if before is None or len(shapes) < 2 or shapes[0] is None or shapes[1] is None:
        return []
    first, second = shapes[0].tolist(), shapes[1].tolist()
    told = [size or first[axis] for axis, size in enumerate(second) if size or axis < len(first)]
    source = before.inputs[0]
    if source is None or len(told) < len(second) or told.count(-1) > 1:
        return []
    _write(node, source, told)
    return [Decision(before.name or "", "Reshape", "folded", "another one follows")]


def _literal(node: ir.Node) -> bool:
    """Whether 0 means no elements."""
    return bool(node.attributes.get_int("allowzero", 0))


def _write(node: ir.Node, source: ir.Value, shape: list[int]) -> None:
    assert node.graph is not None
    target = match.add_constant(node, f"{node.name}/shape", np.array(shape, np.int64))
    new = ir.node("Reshape", [source, target])
    new.outputs[0].type, new.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    match.replace([node], node.outputs[0], [new])
