"""Numbers that tell sizes: which of them a cut changes, where they are stored, and who computes with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.folding.axes import Ids
from qexport.passes.match import array, dims
from qexport.passes.pruning.labels import Blocked, Spec, lift, varying
from qexport.passes.pruning.operators import ROWS, spec_of
from qexport.passes.pruning.relations import padding, window

COMPUTED = "a size that would change is computed"
MOVES = ("Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Cast", "Identity", "Reshape")


@dataclass(frozen=True, slots=True)
class Size:
    """One entry of a computed shape: the size of one axis of a value."""

    value: ir.Value
    axis: int


Entry = int | Size | None
"""A number, a size that is read at run time, or something else."""


class Kept:
    """Which positions of every axis stay, once it is known which units do."""

    def __init__(self, values: Mapping[ir.Value, Ids], keep: NDArray[np.bool_]) -> None:
        self.values, self.mask = values, np.append(keep, True)  # FREE is -1, the last one

    def along(self, value: ir.Value, axis: int) -> NDArray[np.bool_]:
        """Which positions of an axis stay, ``[size]``; the axis must be one that units run along."""
        return along(self.mask, self.values[value], axis)

    def count(self, value: ir.Value, axis: int, start: int = 0, stop: int | None = None) -> int:
        """How many positions of a stretch of an axis stay."""
        return int(self.along(value, axis)[start:stop].sum())


def along(mask: NDArray[np.bool_], ids: Ids, axis: int) -> NDArray[np.bool_]:
    """Which positions of one axis have anything that stays, by the units that stay and one True for ``FREE``."""
    rows = np.moveaxis(mask[ids], axis, 0).reshape(ids.shape[axis], -1)
    return np.asarray(rows.any(axis=1))


@dataclass(frozen=True, slots=True, eq=False)
class Number:
    """One number that a cut may change.

    Attributes:
        node: Whose it is.
        where: The input that holds it, or the name of an attribute.
        position: Its place in there; ``None`` for an attribute that is one number.
        count: What it becomes.
    """

    node: ir.Node
    where: int | str
    position: int | None
    count: Callable[[Kept], int]


def numbers(node: ir.Node, values: Mapping[ir.Value, Ids]) -> list[Number]:
    """The numbers of one node that change with the sizes of ``values``.

    Raises:
        Blocked: One of them is computed.
    """
    row = TOLD.get(node.op_type) if node.domain == "" else None
    if row is not None:
        return list(row(node, values))
    return list(_attributes(node, spec_of(node), values)) if (node.domain, node.op_type) in ROWS else []


def _attributes(node: ir.Node, spec: Spec, values: Mapping[ir.Value, Ids]) -> Iterator[Number]:
    """Numbers of heads and groups."""
    ports = {("in", i): value for i, value in enumerate(node.inputs)} | {
        ("out", i): v for i, v in enumerate(node.outputs)
    }
    for name, labels in spec.counts.items():
        if name not in node.attributes or node.attributes.get_int(name, 0) == 0:
            continue

        def count(kept: Kept, labels: tuple[str, ...] = labels) -> int:
            total = 1
            for label in labels:
                sizes = [
                    lift(spec, port, ids)
                    for port, value in ports.items()
                    if value is not None and port in spec.ports and (ids := kept.values.get(value)) is not None
                ]
                place = spec.order.index(label)
                masks = [along(kept.mask, ids, place) for ids in sizes]
                total *= min((int(m.sum()) for m in masks if m.size > 1), default=spec.sizes.get(label, 1))
            return total

        yield Number(node, name, None, count)


def _sized(value: ir.Value, axis: int, start: int = 0, stop: int | None = None) -> Callable[[Kept], int]:
    return lambda kept: kept.count(value, axis, start, stop)


def _shape(node: ir.Node, values: Mapping[ir.Value, Ids]) -> Iterator[Number]:
    """The target of a Reshape or Expand."""
    result, source = node.outputs[0], node.inputs[0]
    ids = values.get(result)
    told = entries(node.inputs[1])
    cut = set() if ids is None else set(varying(ids))
    rank = 0 if ids is None else ids.ndim
    if told is None:
        if cut:
            raise Blocked(COMPUTED)
        return
    for position, entry in enumerate(told):
        axis = position + (rank - len(told) if ids is not None else 0)
        if entry == 0 and node.op_type == "Reshape" and source is not None:
            entry = Size(source, position)  # zero copies the size of the input
        if isinstance(entry, Size):
            if _runs(values, entry.value, entry.axis) != (_runs(values, result, axis) if axis in cut else ()):
                raise Blocked(COMPUTED)
        elif axis in cut and entry is None:
            raise Blocked(COMPUTED)
        elif axis in cut and entry != -1 and not (entry == 1 and node.op_type == "Expand"):
            yield Number(node, 1, position, _sized(result, axis))


def _runs(values: Mapping[ir.Value, Ids], value: ir.Value, axis: int) -> tuple[int, ...]:
    """The units along one axis of a value; empty where there are none."""
    ids = values.get(value)
    if ids is None or ids.shape[axis] == 1:
        return ()
    if len(varying(ids)) > 1:
        raise Blocked(COMPUTED)
    return tuple(ids.reshape(-1).tolist())


def _split(node: ir.Node, values: Mapping[ir.Value, Ids]) -> Iterator[Number]:
    whole, axis = node.inputs[0], node.attributes.get_int("axis", 0)
    ids = None if whole is None else values.get(whole)
    if ids is None or whole is None or ids.shape[axis] == 1:
        return
    axis, start = axis % ids.ndim, 0
    stored = len(node.inputs) > 1 and node.inputs[1] is not None
    if stored and array(node.inputs[1]) is None:
        raise Blocked(COMPUTED)
    if not stored and "split" not in node.attributes:
        _demand_equal(node, ids, axis)
        return
    for position, piece in enumerate(node.outputs):
        size = (dims(piece) or (None,) * ids.ndim)[axis]
        assert isinstance(size, int)
        yield Number(node, 1 if stored else "split", position, _sized(whole, axis, start, start + size))
        start += size


def _demand_equal(node: ir.Node, ids: Ids, axis: int) -> None:
    """Raise ``Blocked`` where the parts of a Split that tells no sizes would not stay equal."""
    parts = np.moveaxis(ids, axis, 0)
    count = len(node.outputs)
    if len(parts) % count == 0:
        parts = np.sort(parts.reshape(count, len(parts) // count, -1), axis=1)
        if (parts == parts[:1]).all():
            return
    raise Blocked("a Split cuts into equal parts, which would differ")


def _slice(node: ir.Node, values: Mapping[ir.Value, Ids]) -> Iterator[Number]:
    whole = node.inputs[0]
    ids = None if whole is None else values.get(whole)
    for axis in () if ids is None else varying(ids):
        found = window(node, axis, ids.shape[axis]) if ids is not None else None
        if found is None or whole is None:
            continue
        axes = array(node.inputs[3]) if len(node.inputs) > 3 else None
        told = [int(a) % len(dims(whole) or ()) for a in np.asarray(axes).reshape(-1)] if axes is not None else None
        position = axis if told is None else told.index(axis)
        for where, bound in zip((1, 2), found, strict=True):
            yield Number(node, where, position, _sized(whole, axis, 0, bound))


def _pad(node: ir.Node, values: Mapping[ir.Value, Ids]) -> Iterator[Number]:
    whole = node.outputs[0]
    ids = values.get(whole)
    if ids is None:
        return
    for axis in varying(ids):
        before, behind = padding(node, axis)
        if not before and not behind:
            continue
        axes = array(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else np.arange(ids.ndim)
        told = [int(a) % ids.ndim for a in np.asarray(axes).reshape(-1)]
        where: int | str = 1 if len(node.inputs) > 1 else "pads"
        place, size = told.index(axis), ids.shape[axis]
        yield Number(node, where, place, _sized(whole, axis, 0, before))
        yield Number(node, where, place + len(told), _sized(whole, axis, size - behind))


TOLD: dict[str, Callable[[ir.Node, Mapping[ir.Value, Ids]], Iterator[Number]]] = {
    "Reshape": _shape,
    "Expand": _shape,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
}


def entries(value: ir.Value | None) -> list[Entry] | None:
    """The entries of a shape that is computed; ``None`` where not even their number is known."""
    told, node = array(value), None if value is None else value.producer()
    if told is not None:
        return [int(number) for number in np.asarray(told).reshape(-1)]
    row = ENTRIES.get(node.op_type) if node is not None and node.domain == "" else None
    found = row(node) if row is not None and node is not None else None
    if found is not None:
        return found
    shape = dims(value)
    size = 1 if shape == () else shape[0] if shape is not None and len(shape) == 1 else None
    return [None] * size if isinstance(size, int) else None


def _of_shape(node: ir.Node) -> list[Entry] | None:
    value, shape = node.inputs[0], dims(node.inputs[0])
    if value is None or shape is None:
        return None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape))
    return [Size(value, axis) for axis in range(len(shape))[start:end]]


def _of_concat(node: ir.Node) -> list[Entry] | None:
    parts = [entries(value) for value in node.inputs]
    return None if None in parts else [entry for part in parts for entry in part or ()]


def _of_gather(node: ir.Node) -> list[Entry] | None:
    data, where = entries(node.inputs[0]), array(node.inputs[1])
    if data is None or where is None or any(not -len(data) <= i < len(data) for i in where.reshape(-1).tolist()):
        return None
    return [data[i] for i in where.reshape(-1).tolist()]


def _of_slice(node: ir.Node) -> list[Entry] | None:
    data = entries(node.inputs[0])
    try:
        found = None if data is None else window(node, 0, len(data))
    except Blocked:
        return None
    return data if found is None or data is None else data[found[0] : found[1]]


def _same(node: ir.Node) -> list[Entry] | None:
    return entries(node.inputs[0])


ENTRIES: dict[str, Callable[[ir.Node], list[Entry] | None]] = {
    "Shape": _of_shape,
    "Concat": _of_concat,
    "Gather": _of_gather,
    "Slice": _of_slice,
    **dict.fromkeys(("Squeeze", "Unsqueeze", "Cast", "Identity", "Reshape"), _same),
}


def demand_traced(values: Mapping[ir.Value, Ids]) -> None:
    """Raise ``Blocked`` where a size that the cut changes is read for anything but a shape that follows."""
    todo = [node.outputs[0] for value in values for node in value.consumers() if node.op_type == "Shape"]
    seen: set[ir.Value] = set()
    while todo:
        value = todo.pop()
        if value in seen or _harmless(value, values):
            continue
        seen.add(value)
        if value.is_graph_output():
            raise Blocked(COMPUTED)
        for node, index in value.uses():
            follows = node.op_type in ("Reshape", "Expand") and index == 1 and node.outputs[0] in values
            if follows and None not in (entries(value) or [None]):
                continue
            if node.domain != "" or node.op_type not in MOVES or (index != 0 and node.op_type != "Concat"):
                raise Blocked(COMPUTED)
            todo.append(node.outputs[0])


def _harmless(value: ir.Value, values: Mapping[ir.Value, Ids]) -> bool:
    """Whether no entry of a shape is one that the cut changes."""
    told = entries(value)
    return told is not None and all(
        entry is not None
        and not (isinstance(entry, Size) and entry.value in values and values[entry.value].shape[entry.axis] > 1)
        for entry in told
    )
