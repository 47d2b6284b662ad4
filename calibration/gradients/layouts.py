"""Gradients of operators that put elements elsewhere: they go back to where the elements came from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qexport.calibration.gradients.tape import Rule, Tape, Value, operand, optional, rank_of, refuse
from qexport.passes.match import array, dims, perm


def _reshaped(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    return [t.reshape(g, t.shape(operand(node, 0)))]


def _transposed(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    order = perm(node) or tuple(reversed(range(rank_of(node, operand(node, 0)))))
    return [t.transpose(g, [int(axis) for axis in np.argsort(order)])]


def _concatenated(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    axis = node.attributes.get_int("axis", 0)
    pieces = [operand(node, index) for index in range(len(node.inputs))]
    if len(pieces) == 1:
        return [g]
    shapes = [dims(piece) for piece in pieces]
    known = [shape[axis] if shape is not None else None for shape in shapes]
    if all(isinstance(size, int) for size in known):
        sizes = t.constant([int(size) for size in known if isinstance(size, int)])
    else:
        at = t.constant([axis])
        sizes = t.op("Concat", *(t.op("Gather", t.shape(x), at) for x in pieces), attributes={"axis": 0})
    return t.ops("Split", [g, sizes], {"axis": axis}, len(pieces))


def split(t: Tape, node: ir.Node, grads: Sequence[Value | None]) -> Sequence[Value | None]:
    """Of all pieces together; zeros of those that nobody needs."""
    pieces = [t.zeros(t.shape(y), y) if g is None else g for g, y in zip(grads, node.outputs, strict=True)]
    return [t.op("Concat", *pieces, attributes={"axis": node.attributes.get_int("axis", 0)})]


def _routed(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    """Send the position of every element through the node, and add each gradient at the position that arrives."""
    x = operand(node, 0)
    count = t.op("Size", x)
    places = t.reshape(t.op("Range", t.constant(0), count, t.constant(1)), t.shape(x))
    moved = t.op(node.op_type, places, *node.inputs[1:], attributes=dict(node.attributes))
    flat = t.zeros(t.reshape(count, [1]), g)
    added = {"axis": 0, "reduction": "add"}
    total = t.op("ScatterElements", flat, t.reshape(moved, [-1]), t.reshape(g, [-1]), attributes=added)
    return [t.reshape(total, t.shape(x))]


def _sliced(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    """Zeros around it, where the bounds and the sizes are known and no element is left out between."""
    x = operand(node, 0)
    shape, (starts, ends, axes, steps) = dims(x), (array(optional(node, index)) for index in range(1, 5))
    if shape is None or starts is None or ends is None or (optional(node, 3) is not None and axes is None):
        return _routed(t, node, g)
    if optional(node, 4) is not None and (steps is None or (steps != 1).any()):
        return _routed(t, node, g)
    before, behind = np.zeros(len(shape), np.int64), np.zeros(len(shape), np.int64)
    for at, start, end in zip(np.arange(len(starts)) if axes is None else axes, starts, ends, strict=True):
        size = shape[int(at)]
        if not isinstance(size, int):
            return _routed(t, node, g)
        first, last, _ = slice(int(start), int(end)).indices(size)
        before[at], behind[at] = first, size - max(first, last)
    return [t.op("Pad", g, t.constant([*before, *behind]))]


def _gathered(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    """Rows of a table are added where they were read; anything else goes by position."""
    x, indices = operand(node, 0), operand(node, 1)
    if node.attributes.get_int("axis", 0) != 0:
        return _routed(t, node, g)
    places = t.op("Cast", t.op("Unsqueeze", indices, t.constant([-1])), attributes={"to": ir.DataType.INT64})
    table = t.zeros(t.shape(x), g)
    return [t.op("ScatterND", table, places, g, attributes={"reduction": "add"})]


def _padded(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    """What was added is cut off again; where elements were repeated, each position gets the sum."""
    if node.attributes.get_string("mode", "constant") == "constant":
        back = t.op("Neg", operand(node, 1))
        inputs = [g, back] if optional(node, 3) is None else [g, back, None, node.inputs[3]]
        return [t.op("Pad", *inputs)]
    return _routed(t, node, g)


def _triangle(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    return [t.op("Trilu", g, *node.inputs[1:], attributes=dict(node.attributes))]


def _depth(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    if node.attributes.get_string("mode", "DCR") != "DCR":
        raise refuse(node, "its channels are ordered as in pixel shuffling")
    inverse = "DepthToSpace" if node.op_type == "SpaceToDepth" else "SpaceToDepth"
    return [t.op(inverse, g, attributes={"blocksize": node.attributes.get_int("blocksize", 1)})]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Flatten"), _reshaped),
    **dict.fromkeys(("GatherElements", "GatherND", "Compress", "Tile"), _routed),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _depth),
    "Concat": _concatenated,
    "Gather": _gathered,
    "Pad": _padded,
    "Slice": _sliced,
    "Transpose": _transposed,
    "Trilu": _triangle,
}
