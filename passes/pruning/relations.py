"""What units on one port of a node mean for its other ports: by the names of its axes, or by where it puts elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from qexport.passes.folding.axes import DOWN, FREE, UP, Ids
from qexport.passes.match import array, dims
from qexport.passes.pruning.labels import Blocked, Port, Relation, compact, follow, varying
from qexport.passes.pruning.operators import spec_of

MIXED = "a reshape mixes units with an axis of another or unknown size"
Layout = Callable[[ir.Node, Port, Ids], Mapping[Port, Ids | None]]


def relate(node: ir.Node, port: Port, ids: Ids) -> Relation:
    """What the units of one port of a node mean for all its others.

    Raises:
        Blocked: The node mixes units, or nothing is known of what it does with them.
    """
    layout = LAYOUTS.get(node.op_type) if node.domain == "" else None
    if layout is None:
        spec = spec_of(node)
        if port not in spec.ports:
            raise Blocked(f"{node.op_type} reads it as a parameter")
        return follow(spec, port, ids)
    if port[0] == "in" and port[1] > 0 and node.op_type != "Concat":
        raise Blocked(f"{node.op_type} reads it as a parameter")
    found = Relation()
    for other, moved in layout(node, port, ids).items():
        if moved is None:
            raise Blocked(MIXED)
        found.ports[other] = compact(moved)
    return found


def _moved(node: ir.Node, port: Port, ids: Ids) -> Mapping[Port, Ids | None]:
    if port[0] == "in":
        return {("out", 0): DOWN[node.op_type](node, 0, ids)}
    return {("in", 0): UP[node.op_type](node, 0, ids)}


def _concat(node: ir.Node, port: Port, ids: Ids) -> Mapping[Port, Ids | None]:
    pieces: list[Port] = [("in", index) for index in range(len(node.inputs))]
    return _joined(node, port, ids, (pieces, ("out", 0)))


def _split(node: ir.Node, port: Port, ids: Ids) -> Mapping[Port, Ids | None]:
    pieces: list[Port] = [("out", index) for index in range(len(node.outputs))]
    return _joined(node, port, ids, (pieces, ("in", 0)))


def _joined(node: ir.Node, port: Port, ids: Ids, ends: tuple[list[Port], Port]) -> Mapping[Port, Ids | None]:
    """Pieces and the whole: units along the axis of the pieces have their place, others are the same in all."""
    pieces, whole = ends
    if ids.shape[node.attributes.get_int("axis", 0)] == 1:
        return {other: ids for other in (*pieces, whole) if other != port}
    take, place = (UP, DOWN) if node.op_type == "Concat" else (DOWN, UP)
    if port == whole:
        return {piece: take[node.op_type](node, piece[1], ids) for piece in pieces}
    return {whole: place[node.op_type](node, port[1], ids)}


def window(node: ir.Node, axis: int, size: int) -> tuple[int, int] | None:
    """Where a Slice starts and ends along one axis of ``size``; ``None`` where it takes no part in it.

    Raises:
        Blocked: The bounds are computed, or take every other element.
    """
    told = [None if value is None else array(value) for value in (*node.inputs[1:], *(None,) * (5 - len(node.inputs)))]
    starts, ends, axes, steps = (None if numbers is None else np.asarray(numbers).reshape(-1) for numbers in told)
    rank = len(dims(node.inputs[0]) or ())
    if axes is None and len(node.inputs) > 3 and node.inputs[3] is not None:
        raise Blocked("the axes of a Slice are computed")
    if axes is None and starts is not None:
        axes = np.arange(len(starts))
    if axes is None:
        raise Blocked("a Slice takes places that are computed")
    at = [i for i, place in enumerate(axes) if int(place) % rank == axis]
    if not at:
        return None
    if starts is None or ends is None or len(at) > 1:
        raise Blocked("a Slice takes units that are computed")
    if len(node.inputs) > 4 and node.inputs[4] is not None and (steps is None or steps[at[0]] != 1):
        raise Blocked("a Slice takes every other unit")
    start, stop, _ = slice(int(starts[at[0]]), int(ends[at[0]])).indices(size)
    return start, max(start, stop)


def _slice(node: ir.Node, port: Port, ids: Ids) -> Mapping[Port, Ids | None]:
    shape = dims(node.inputs[0])
    if shape is None:
        return {("out", 0): None}
    for axis in varying(ids):
        size = shape[axis]
        if not isinstance(size, int):
            raise Blocked(MIXED)
        if (found := window(node, axis, size)) is not None:
            start, stop = found
            ids = ids.take(range(start, stop), axis) if port[0] == "in" else _padded(ids, axis, start, size - stop)
    return {("out" if port[0] == "in" else "in", 0): ids}


def padding(node: ir.Node, axis: int) -> tuple[int, int]:
    """How many elements a Pad adds before and behind along one axis.

    Raises:
        Blocked: The number is computed.
    """
    rank = len(dims(node.inputs[0]) or ())
    told = array(node.inputs[1]) if len(node.inputs) > 1 else np.asarray(node.attributes.get_ints("pads", ()))
    axes = array(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else np.arange(rank)
    if told is None or axes is None:
        raise Blocked("a Pad adds a number that is computed")
    at = [i for i, place in enumerate(np.asarray(axes).reshape(-1)) if int(place) % rank == axis]
    return (int(told[at[0]]), int(told[at[0] + told.size // 2])) if at else (0, 0)


def _pad(node: ir.Node, port: Port, ids: Ids) -> Mapping[Port, Ids | None]:
    """What is added belongs to units that come from elsewhere, or stays."""
    for axis in varying(ids):
        before, behind = padding(node, axis)
        if (before or behind) and node.attributes.get_string("mode", "constant") != "constant":
            raise Blocked("a Pad repeats units")
        if before < 0 or behind < 0:
            raise Blocked("a Pad removes units")
        size = ids.shape[axis]
        ids = _padded(ids, axis, before, behind) if port[0] == "in" else ids.take(range(before, size - behind), axis)
    return {("out" if port[0] == "in" else "in", 0): ids}


def _padded(ids: Ids, axis: int, before: int, behind: int) -> Ids:
    widths = [(before, behind) if i == axis else (0, 0) for i in range(ids.ndim)]
    return np.pad(ids, widths, constant_values=FREE)


LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"), _moved),
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
}
"""Operators that put elements elsewhere."""
