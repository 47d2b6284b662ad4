"""Residual additions: where a graph adds what went around some layers to what went through them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from qexport.passes.match import constant

FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, None}
SCORE_OPS = {"Add", "Sub", "Mul", "Div", "Where", "Cast", "Clip", "Max", "Min", "Tanh", "Reshape", "Identity"}
Sets = Mapping[ir.Value, int]  # value to the set of values that it is made of, as bits


@dataclass(frozen=True, slots=True)
class Residual:
    """An Add of two values that come from one.

    Attributes:
        node: The Add.
        skip: The operand that went around.
        branch: The operand that went through the layers.
        layers: The nodes between the point where both part and ``branch``.
    """

    node: ir.Node
    skip: ir.Value
    branch: ir.Value
    layers: tuple[ir.Node, ...]


def find_residuals(graph: ir.Graph) -> tuple[Residual, ...]:
    """Return the residual additions of ``graph`` in its order.

    Adding a mask or a position bias to attention scores is none: nothing but a Softmax reads the sum.
    """
    sets, places = _ancestors(graph)
    found = []
    for node in graph:
        pair = _pair(node, sets)
        if pair is not None:
            skip, branch = pair
            inside = sets[branch] & ~sets[skip]
            layers = [value.producer() for value, place in places.items() if inside >> place & 1]
            found.append(Residual(node, skip, branch, tuple(dict.fromkeys(n for n in layers if n is not None))))
    return tuple(found)


def levels(graph: ir.Graph) -> dict[ir.Node, int]:
    """Return how many residual additions lie, at most, between the inputs of ``graph`` and each node."""
    sets, _ = _ancestors(graph)
    after: dict[ir.Value | None, int] = {}
    found = {}
    for node in graph:
        found[node] = max((after.get(value, 0) for value in node.inputs), default=0)
        level = found[node] + (_pair(node, sets) is not None)
        after.update(dict.fromkeys(node.outputs, level))
    return found


def _pair(node: ir.Node, sets: Sets) -> tuple[ir.Value, ir.Value] | None:
    """The operands of a residual addition, the one that went around first."""
    if node.op_type != "Add" or node.domain != "" or len(node.inputs) != 2:
        return None
    one, other = node.inputs
    if one is None or other is None or not sets.get(one, 0) & sets.get(other, 0):
        return None
    if _only_for_softmax(node.outputs[0]):
        return None
    return (one, other) if sets[one].bit_count() <= sets[other].bit_count() else (other, one)


def _only_for_softmax(value: ir.Value) -> bool:
    """Whether all that becomes of ``value`` is scaled and masked scores."""
    users = value.consumers()
    return bool(users) and all(
        user.op_type == "Softmax" or (user.op_type in SCORE_OPS and all(map(_only_for_softmax, user.outputs)))
        for user in users
    )


def _ancestors(graph: ir.Graph) -> tuple[dict[ir.Value, int], dict[ir.Value, int]]:
    """Float values to the set of computed float values they are made of, themselves included, and to their bits."""
    sets: dict[ir.Value, int] = {}
    places: dict[ir.Value, int] = {}

    def add(value: ir.Value, behind: int) -> None:
        if value.dtype in FLOATS:
            places[value] = len(places)
            behind |= 1 << places[value]
        sets[value] = behind

    for value in graph.inputs:
        if not value.is_initializer():
            add(value, 0)
    for node in graph:
        inputs = [value for value in node.inputs if value is not None and value in sets]
        behind = 0
        for value in inputs:
            behind |= sets[value]
        if behind or any(constant(value) is None for value in node.inputs if value is not None):
            for output in node.outputs:
                add(output, behind)
    return sets, places
