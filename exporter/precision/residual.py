"""Residual additions: where a graph adds what went around some layers to what went through them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
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
    places: list[ir.Value] = []
    scores, found = _scores(graph), []
    for node, sets in _ancestors(graph, places, every=True):
        pair = _pair(node, sets, scores)
        if pair is not None:
            skip, branch = sorted(pair, key=lambda value: sets[value].bit_count())
            layers = [places[place].producer() for place in _bits(sets[branch] & ~sets[skip])]
            found.append(Residual(node, skip, branch, tuple(dict.fromkeys(n for n in layers if n is not None))))
    return tuple(found)


def levels(graph: ir.Graph) -> dict[ir.Node, int]:
    """Return how many residual additions lie, at most, between the inputs of ``graph`` and each node."""
    after: dict[ir.Value | None, int] = {}
    scores, found = _scores(graph), {}
    for node, sets in _ancestors(graph, [], every=False):
        found[node] = max((after.get(value, 0) for value in node.inputs), default=0)
        level = found[node] + (_pair(node, sets, scores) is not None)
        after.update(dict.fromkeys(node.outputs, level))
    return found


def _pair(node: ir.Node, sets: Sets, scores: Collection[ir.Value]) -> tuple[ir.Value, ir.Value] | None:
    """The operands of a residual addition."""
    if node.op_type != "Add" or node.domain != "" or len(node.inputs) != 2 or node.outputs[0] in scores:
        return None
    one, other = node.inputs
    return (one, other) if one and other and sets.get(one, 0) & sets.get(other, 0) else None


def _scores(graph: ir.Graph) -> set[ir.Value]:
    """The values of which nothing becomes but scaled and masked scores."""
    found: set[ir.Value] = set()
    for node in ir.traversal.RecursiveGraphIterator(graph, reverse=True):
        for value in node.outputs:
            users = value.consumers()
            if users and all(
                user.op_type == "Softmax" or (user.op_type in SCORE_OPS and found.issuperset(user.outputs))
                for user in users
            ):
                found.add(value)
    return found


def _ancestors(graph: ir.Graph, places: list[ir.Value], *, every: bool) -> Iterator[tuple[ir.Node, Sets]]:
    """Yield each node with the sets of computed float values that its inputs are made of, themselves included.

    A set is the bits of its members' places in ``places``, which grows. Where not ``every`` value is asked for, sets
    hold those alone that are made of no others: two values share one of these if they share any. A set goes when its
    last reader has been here, so that there are no more than there are values at a time.
    """
    done = _last_read(graph)
    sets: dict[ir.Value, int] = {}

    def add(value: ir.Value, behind: int) -> None:
        if value.dtype in FLOATS and (every or not behind):
            behind |= 1 << len(places)
            places.append(value)
        if value.uses():
            sets[value] = behind

    for value in graph.inputs:
        if not value.is_initializer():
            add(value, 0)
    for node in graph:
        yield node, sets
        inputs = [value for value in node.inputs if value is not None]
        behind = functools.reduce(operator.or_, (sets.get(value, 0) for value in inputs), 0)
        if behind or any(constant(value) is None for value in inputs):
            for output in node.outputs:
                add(output, behind)
        for value in done.get(node, ()):
            sets.pop(value, None)


def _last_read(graph: ir.Graph) -> dict[ir.Node, list[ir.Value]]:
    """What each node is the last to read."""
    found: dict[ir.Node, list[ir.Value]] = {}
    last = {value: node for node in graph for value in node.inputs if value is not None}
    for value, reader in last.items():
        found.setdefault(reader, []).append(value)
    return found


def _bits(number: int) -> list[int]:
    """The places of the bits that are set, in order."""
    octets = np.frombuffer(number.to_bytes(-(-number.bit_length() // 8), "little"), np.uint8)
    places: list[int] = np.unpackbits(octets, bitorder="little").nonzero()[0].tolist()
    return places
