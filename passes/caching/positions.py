"""Find what a graph computes from the length of its caches or from the mask, and what stands for it instead.

Exporters spell positions as cumulative sums of the mask, as ranges behind the past, and in more ways; all of them are
integers that are equal to ``past, past + 1, ...`` in every call that is tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes import match
from qexport.passes.caching.calls import Call, Calls, UnknownValue

CALLS = ((2, 3, 7), (0, 4, 1), (5, 1, 6))
"""Past tokens, new tokens and rows of the calls that are tried."""
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
_HEAVY = ("MatMul", "Gemm", "Conv", "Attention", "Softmax")


@dataclass(frozen=True, eq=False)
class Stand:
    """An inner value that inputs can stand for.

    Attributes:
        value: The inner value.
        axes: Where axes of size 1 are put into [batch, sequence]; with ``size``, the shape: () or (1,).
        shift: What is added to the positions.
        size: The axis of ``input_ids`` whose size the value is; ``None`` where it is something else.
        number: What the value always is; ``None`` where it is something else.
    """

    value: ir.Value
    axes: tuple[int, ...]
    shift: int = 0
    size: int | None = None
    number: int | None = None


def find_stands(live: Sequence[ir.Node], forbidden: Sequence[ir.Value], calls: Calls) -> list[Stand]:
    """The values among what ``live`` nodes make that depend on ``forbidden`` ones, yet on no more than positions."""
    stands = []
    for value in _tainted(live, forbidden):
        try:
            found = [(call, call.look_up(value)) for call in (calls.at(*sizes) for sizes in CALLS)]
        except UnknownValue:
            continue
        stand = _positions(value, found) or _count(value, found)
        if stand is not None:
            stands.append(stand)
    return stands


def _tainted(live: Sequence[ir.Node], forbidden: Sequence[ir.Value]) -> Iterator[ir.Value]:
    """Integers that follow from forbidden values without passing through layers."""
    tainted, inside = set(forbidden), set(live)
    todo = list(forbidden)
    while todo:
        for node in todo.pop().consumers():
            fresh = [value for value in node.outputs if value not in tainted]
            if not fresh or node.op_type in _HEAVY:
                continue
            tainted.update(fresh)
            todo.extend(fresh)
            if node in inside:
                yield from (value for value in fresh if value.dtype in _INTEGERS)


def _positions(value: ir.Value, found: Sequence[tuple[Call, NDArray[Any]]]) -> Stand | None:
    """[1 or batch, ..., sequence, ...], all other axes of size 1."""
    last, shape = found[-1][1], found[0][1].shape
    wide = [axis for axis, size in enumerate(shape) if axis and size != 1]
    if len(wide) != 1 or last.size == 0:
        return None
    shift = int(last.flat[0]) - found[-1][0].past
    for call, array in found:
        sizes = [call.new if axis == wide[0] else 1 for axis in range(len(shape))]
        expected = (np.arange(call.past, call.total) + shift).reshape(sizes)
        rows = array.shape[:1] in ((1,), (call.batch,)) and array.shape[1:] == expected.shape[1:]
        if not rows or (array != expected).any():
            return None
    return Stand(value, tuple(axis for axis in range(1, len(shape)) if axis != wide[0]), shift)


def _count(value: ir.Value, found: Sequence[tuple[Call, NDArray[Any]]]) -> Stand | None:
    """The number of rows or of new tokens or another size that is fixed, as a number or a list of one."""
    shape = found[0][1].shape
    for axis in (0, 1):
        if all(a.shape == shape in ((), (1,)) and a.item() == (c.batch, c.new)[axis] for c, a in found):
            return Stand(value, shape, size=axis)
    known = match.producer(value, "Gather")
    if known is None or match.producer(known.inputs[0], "Shape") is None or len({a.tobytes() for _, a in found}) > 1:
        return None
    return Stand(value, shape, number=int(found[0][1].item())) if shape in ((), (1,)) else None


def live_nodes(ends: Sequence[ir.Value], hops: Mapping[ir.Value, ir.Value]) -> list[ir.Node]:
    """The nodes that ``ends`` depend on, where a value in ``hops`` depends on another one than it says."""
    nodes, seen, todo = dict[ir.Node, None](), set[ir.Value](), list(ends)
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in hops:
            todo.append(hops[value])
        elif (node := value.producer()) is not None:
            nodes[node] = None
            todo.extend(source for source in node.inputs if source is not None)
    return list(nodes)


def replacement(stand: Stand, positions: ir.Value, ids: ir.Value, before: ir.Node) -> list[ir.Node]:
    """Nodes, the last of which makes the same as ``stand`` from the inputs."""
    name, dtype = str(stand.value.name), stand.value.dtype
    nodes: list[ir.Node] = []
    value = positions

    def op(op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        nodes.append(ir.node(op_type, inputs, attributes))
        return nodes[-1].outputs[0]

    if stand.number is not None:
        numbers = np.full(stand.axes, stand.number, np.int64)
        value = op("Identity", match.add_constant(before, f"{name}_size", numbers))
    elif stand.size is not None:
        value = op("Shape", ids, start=stand.size, end=stand.size + 1)
        value = value if stand.axes else op("Squeeze", value)
    elif stand.axes:
        value = op("Unsqueeze", value, match.add_constant(before, f"{name}_axes", np.array(stand.axes, np.int64)))
    if stand.shift:
        value = op("Add", value, match.add_constant(before, f"{name}_shift", np.array(stand.shift, np.int64)))
    if dtype != ir.DataType.INT64 or not nodes:
        op("Cast", value, to=int(dtype or ir.DataType.INT64))
    return nodes
