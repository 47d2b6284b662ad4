"""Find what a graph computes from the length of its caches or from the mask, and what stands for it instead.

Exporters spell positions as cumulative sums of the mask, as ranges behind the past, and in more ways; all of them are
integers that are equal to ``past, past + 1, ...`` in every call that is tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes import match
from qexport.passes.caching.calls import Call, Calls, UnknownValue
from qexport.passes.caching.check import CALLS

_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
_HEAVY = ("MatMul", "Gemm", "Conv", "Attention", "Softmax")
_RANK = 4


@dataclass(frozen=True, eq=False)
class Stand:
    """An inner value that inputs can stand for.

    Attributes:
        value: The inner value.
        axes: Where axes of size 1 have to be put into [batch, sequence] of the positions plus ``shift``; ``None``
            where the value is the number of new tokens.
        shift: See there.
        rank: Number of axes.
    """

    value: ir.Value
    axes: tuple[int, ...] | None
    shift: int
    rank: int


def find_stands(live: Sequence[ir.Node], forbidden: Sequence[ir.Value], calls: Calls) -> list[Stand]:
    """The values among what ``live`` nodes make that depend on ``forbidden`` ones, yet on no more than positions."""
    stands = []
    for value in _tainted(live, forbidden):
        try:
            found = [(call, call.work_out([value], {})[0]) for call in map(calls.at, CALLS)]
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
    shape = found[0][1].shape
    wide = [axis for axis, size in enumerate(shape) if size != 1]
    if len(wide) != 1 or not 1 <= wide[0] < _RANK:
        return None
    first = found[0][1].ravel()
    shift = int(first[0]) - found[0][0].past
    for call, array in found:
        expected = np.arange(call.past, call.total) + shift
        sizes = tuple(call.new if axis == wide[0] else 1 for axis in range(len(shape)))
        if array.shape != sizes or not np.array_equal(array.ravel(), expected):
            return None
    axes = tuple(axis for axis in range(1, len(shape)) if axis != wide[0])
    return Stand(value, axes, shift, len(shape))


def _count(value: ir.Value, found: Sequence[tuple[Call, NDArray[Any]]]) -> Stand | None:
    rank = found[0][1].ndim
    same = all(array.shape == (1,) * rank and array.item() == call.new for call, array in found)
    return Stand(value, None, 0, rank) if same and rank <= 1 else None


def live_nodes(ends: Sequence[ir.Value], hops: dict[ir.Value, tuple[ir.Value, ...]]) -> list[ir.Node]:
    """The nodes that ``ends`` depend on, where a value in ``hops`` depends on other ones than it says."""
    nodes, seen, todo = dict[ir.Node, None](), set[ir.Value](), list(ends)
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in hops:
            todo.extend(hops[value])
        elif (node := value.producer()) is not None:
            nodes[node] = None
            todo.extend(source for source in node.inputs if source is not None)
    return list(nodes)


def replacement(stand: Stand, positions: ir.Value, ids: ir.Value, before: ir.Node) -> list[ir.Node]:
    """Nodes, the last of which makes the same as ``stand`` from the inputs."""
    name, dtype = str(stand.value.name), stand.value.dtype
    nodes: list[ir.Node] = []
    value = positions
    if stand.axes is None:
        nodes.append(ir.node("Shape", [ids], {"start": 1, "end": 2}))
        if stand.rank == 0:
            nodes.append(ir.node("Squeeze", [nodes[-1].outputs[0]]))
        value = nodes[-1].outputs[0]
    elif stand.axes:
        axes = match.add_constant(before, f"{name}_axes", np.array(stand.axes, np.int64))
        nodes.append(ir.node("Unsqueeze", [value, axes]))
        value = nodes[-1].outputs[0]
    if stand.shift:
        shift = match.add_constant(before, f"{name}_shift", np.array(stand.shift, np.int64))
        nodes.append(ir.node("Add", [value, shift]))
        value = nodes[-1].outputs[0]
    if dtype != ir.DataType.INT64:
        nodes.append(ir.node("Cast", [value], {"to": dtype}))
    return nodes or [ir.node("Identity", [value])]
