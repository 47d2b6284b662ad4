"""Let units change places, so that the model computes the same: which orders are proven to, and where numbers go.

A tensor may hold a unit at several places: the columns of a head, a gate and the value it gates. The n-th place of a
unit then takes what was at the n-th place of another one, which is right where every operator keeps these numbers: for
all units alike it takes what it computes for their n-th place from the same places of its inputs. That is looked at
operator by operator, with a name for every place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.folding.axes import FREE, Ids
from qexport.passes.pruning.labels import Blocked, Port, lift, varying
from qexport.passes.pruning.operators import spec_of
from qexport.passes.pruning.relations import relate

if TYPE_CHECKING:
    from qexport.passes.pruning.cut import Cut

Order = NDArray[np.int64]  # [units]
APART = "units that go together would be parted"
ABSENT = "a unit has no place where the other one has"
UNEQUAL = "units lie differently"


def order_refusal(cut: Cut, order: Order) -> str | None:
    """Why units cannot take one another's places; ``None`` if they can."""
    if order.shape != (cut.count,) or not np.array_equal(np.sort(order), np.arange(cut.count)):
        return f"no order of {cut.count} units"
    if not np.array_equal(order[cut.ties], cut.ties[order]):
        return APART
    every = [*cut.values.values(), *(slot.ids for slot in cut.slots)]
    for ids in every:
        present = np.unique(ids[ids != FREE])
        if not np.array_equal(np.sort(order[present]), present):
            return ABSENT
        if np.unique(np.bincount(ids[ids != FREE])[present]).size > 1:
            return UNEQUAL
    try:
        return None if all(_alike(found) for found in _steps(cut)) else UNEQUAL
    except Blocked as blocked:
        return str(blocked)


def moved(numbers: NDArray[np.generic], ids: Ids, order: Order) -> NDArray[np.generic]:
    """The numbers of a constant with unit ``order[i]`` in the place of unit ``i``."""
    axes = varying(ids)
    flat = ids.reshape(-1)
    places = np.arange(flat.size)
    by_unit, inverse = _places(flat), np.append(order, FREE)
    for unit, own in by_unit.items():
        places[own] = by_unit[int(inverse[unit])]
    rows = np.moveaxis(numbers, axes, range(len(axes)))
    taken = rows.reshape(flat.size, -1)[places].reshape(rows.shape)
    return np.ascontiguousarray(np.moveaxis(taken, range(len(axes)), axes))


def _places(flat: Ids) -> dict[int, NDArray[np.int64]]:
    """The places of every unit, in their order."""
    ranked = np.argsort(flat, kind="stable")
    units, starts = np.unique(flat[ranked], return_index=True)
    parts = np.split(ranked, starts[1:])
    return {int(unit): part for unit, part in zip(units, parts, strict=True) if unit != FREE}


def _numbered(ids: Ids) -> Ids:
    """Which place of its unit every element is, ``FREE`` for no unit."""
    found = np.full(ids.size, FREE)
    for own in _places(ids.reshape(-1)).values():
        found[own] = np.arange(own.size)
    return found.reshape(ids.shape)


def _steps(cut: Cut) -> Iterator[NDArray[np.int64]]:
    """For every operator and two of its ports, ``[elements, 3]``: a unit, its place in one and in the other."""
    slots: dict[tuple[ir.Node, int], list[Ids]] = {}
    for slot in cut.slots:
        slots.setdefault((slot.node, slot.index), []).append(slot.ids)
    for value, ids in cut.values.items():
        numbered, names = _numbered(ids), np.where(ids == FREE, FREE, np.arange(ids.size).reshape(ids.shape))
        for node, port in _ends(value):
            if _along_one_label(node, port, ids):
                continue
            for other, reached in relate(node, port, names).ports.items():
                for end in _held(node, other, cut.values, slots):
                    yield from _compared(reached, numbered, end)


def _along_one_label(node: ir.Node, port: Port, ids: Ids) -> bool:
    """Whether units are what one named axis of an operator runs along: it does the same for all of them."""
    try:
        joint = lift(spec_of(node), port, ids)
    except Blocked:
        return False
    return len(varying(joint)) == 1 and np.unique(joint).size == joint.size and FREE not in joint


def _ends(value: ir.Value) -> Iterable[tuple[ir.Node, Port]]:
    node = value.producer()
    if node is not None:
        yield node, ("out", value.index() or 0)
    for reader, index in value.uses():
        if reader.op_type != "Shape" or reader.domain != "":
            yield reader, ("in", index)


def _held(
    node: ir.Node, port: Port, values: Mapping[ir.Value, Ids], slots: Mapping[tuple[ir.Node, int], list[Ids]]
) -> list[Ids]:
    """The units of what is at a port: one for each axis of a constant that has some."""
    side, index = port
    value = (node.inputs if side == "in" else node.outputs)[index]
    if value is not None and value in values:
        return [values[value]]
    return slots.get((node, index), []) if side == "in" else []


def _compared(reached: Ids, numbered: Ids, end: Ids) -> Iterator[NDArray[np.int64]]:
    """What two ports have in common, of names of places at the first one that have reached the second."""
    if any(axis in varying(reached) and size == 1 for axis, size in enumerate(end.shape)):
        return  # the units of another axis of a constant
    names, units, places = np.broadcast_arrays(reached, end, _numbered(end))
    both = (names != FREE) & (units != FREE)
    if both.any():
        yield np.stack([units[both], numbered.reshape(-1)[names[both]], places[both]], axis=1)


def _alike(found: NDArray[np.int64]) -> bool:
    """Whether every unit has the same pairs of places."""
    rows = np.unique(found, axis=0)
    counts = np.unique(rows[:, 0], return_counts=True)[1]
    if np.unique(counts).size > 1:
        return False
    pairs = rows[:, 1:].reshape(len(counts), -1)
    return bool((pairs == pairs[0]).all())
