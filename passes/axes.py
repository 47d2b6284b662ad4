"""Where channels lie in a value, and where they go when a value is reshaped, transposed, split or joined.

Channels are followed as an array of *ids* with the rank of the value: ``ids[...]`` broadcasts against the value and
names the channel of each element, ``FREE`` where an element belongs to none. An axis along which nothing changes has
size 1, so sizes that are not known do no harm as long as no channel runs along them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.match import array, dims, perm

Ids = NDArray[np.int64]
FREE = -1
Mapping = Callable[[ir.Node, int, Ids], Ids | None]
"""``(node, index of the input or output, ids) -> ids on the other side``; ``None`` where they cannot be followed."""


def channel_ids(rank: int, axis: int, count: int) -> Ids:
    """Ids of a value of ``rank`` whose ``axis`` holds ``count`` channels."""
    shape = [1] * rank
    shape[axis] = count
    return np.arange(count).reshape(shape)


def only_along(ids: Ids, axis: int) -> Ids | None:
    """The ids along one axis, ``[size]``; ``None`` where channels differ along another one too."""
    axis %= ids.ndim
    return ids.reshape(-1) if all(size == 1 for i, size in enumerate(ids.shape) if i != axis) else None


def spread(ids: Ids, shape: tuple[int, ...]) -> Ids | None:
    """Ids of a constant of ``shape`` that is combined element by element with a value: broadcast where it must grow."""
    kept = ids.reshape(ids.shape[_leading_ones(ids) :])
    try:
        return np.broadcast_to(kept, np.broadcast_shapes(kept.shape, shape))
    except ValueError:
        return None


def _leading_ones(ids: Ids) -> int:
    return next((i for i, size in enumerate(ids.shape) if size != 1), ids.ndim)


def _sizes(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """Known sizes of a value's axes; those that are not are ``None``."""
    shape = dims(value)
    return None if shape is None else tuple(size if isinstance(size, int) else None for size in shape)


def _input_sizes(node: ir.Node) -> tuple[int | None, ...] | None:
    return _sizes(node.inputs[0])


def _output_sizes(node: ir.Node) -> tuple[int | None, ...] | None:
    known = _sizes(node.outputs[0])
    told = array(node.inputs[1]) if node.op_type == "Reshape" else None
    if told is None:
        return known
    sizes = tuple(int(size) if size > 0 else None for size in np.asarray(told, np.int64).reshape(-1))
    return sizes if known is None else tuple(a or b for a, b in zip(sizes, known, strict=True))


def regroup(ids: Ids, source: tuple[int | None, ...] | None, target: tuple[int | None, ...] | None) -> Ids | None:
    """Ids behind a reshape from ``source`` to ``target``.

    Axes are matched from the last one, in groups of known sizes with equal products; in front of them, no channel may
    run along any axis.
    """
    if source is None or target is None or ids.ndim != len(source):
        return None
    i, j = len(source), len(target)
    wide: list[int] = []
    made: list[int] = []
    while i and j:
        group = _group(source[:i], target[:j])
        if group is None:
            break
        a, b = i - group[0], j - group[1]
        sizes = [size or 1 for size in source[a:i]]
        tracked = any(size > 1 for size in ids.shape[a:i])
        wide = (sizes if tracked else [1] * len(sizes)) + wide
        made = ([size or 1 for size in target[b:j]] if tracked else [1] * (j - b)) + made
        i, j = a, b
    if any(size > 1 for size in ids.shape[:i]):
        return None
    full = np.broadcast_to(ids, [1] * i + wide)
    return full.reshape([1] * j + made)


def _group(source: tuple[int | None, ...], target: tuple[int | None, ...]) -> tuple[int, int] | None:
    """How many of the last axes of either shape have the same product, as few as possible."""
    taken = [1, 1]
    ends = (source, target)
    products = [source[-1], target[-1]]
    while products[0] != products[1]:
        if None in products:
            return None
        side = 0 if (products[0] or 0) < (products[1] or 0) else 1
        if taken[side] == len(ends[side]):
            return None
        taken[side] += 1
        more = ends[side][-taken[side]]
        products[side] = None if more is None else (products[side] or 0) * more
    return None if products[0] is None else (taken[0], taken[1])


def _reshape_down(node: ir.Node, _: int, ids: Ids) -> Ids | None:
    return regroup(ids, _input_sizes(node), _output_sizes(node))


def _reshape_up(node: ir.Node, _: int, ids: Ids) -> Ids | None:
    return regroup(ids, _output_sizes(node), _input_sizes(node))


def _transpose_down(node: ir.Node, _: int, ids: Ids) -> Ids | None:
    return ids.transpose(perm(node) or None)


def _transpose_up(node: ir.Node, _: int, ids: Ids) -> Ids | None:
    order = perm(node)
    return ids.transpose(np.argsort(order) if order else None)


def _axes(node: ir.Node, rank: int) -> tuple[int, ...] | None:
    """The axes of a Squeeze or Unsqueeze, of the longer shape."""
    told = array(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get_ints("axes", None)
    return None if told is None else tuple(int(axis) % rank for axis in np.asarray(told).reshape(-1))


def _insert(node: ir.Node, _: int, ids: Ids) -> Ids | None:
    longer = _sizes(node.outputs[0] if node.op_type == "Unsqueeze" else node.inputs[0])
    axes = None if longer is None else _axes(node, len(longer))
    return None if axes is None else np.expand_dims(ids, axes)


def _remove(node: ir.Node, _: int, ids: Ids) -> Ids | None:
    axes = _axes(node, ids.ndim)
    return None if axes is None or any(ids.shape[axis] != 1 for axis in axes) else np.squeeze(ids, axes)


def _pieces(node: ir.Node) -> tuple[int, list[int]] | None:
    """The axis of a Split or Concat and where its pieces begin, the end included."""
    parts = node.outputs if node.op_type == "Split" else node.inputs
    shapes = [_sizes(value) for value in parts]
    rank = len(shapes[0] or ())
    axis = node.attributes.get_int("axis", 0)
    sizes = [shape[axis] if shape is not None and rank else None for shape in shapes]
    if None in sizes or not rank:
        return None
    return axis % rank, [0, *np.cumsum([size or 0 for size in sizes]).tolist()]


def _take_piece(node: ir.Node, index: int, ids: Ids) -> Ids | None:
    known = _pieces(node)
    if known is None:
        return None
    axis, starts = known
    return ids if ids.shape[axis] == 1 else np.take(ids, range(starts[index], starts[index + 1]), axis)


def _place_piece(node: ir.Node, index: int, ids: Ids) -> Ids | None:
    known = _pieces(node)
    if known is None:
        return None
    axis, starts = known
    return _place(ids, axis, np.arange(starts[index], starts[index + 1]), starts[-1])


def _place(ids: Ids, axis: int, where: NDArray[np.int64], size: int) -> Ids:
    """Ids at some positions of an axis of ``size``, the other positions free."""
    shape = list(ids.shape)
    shape[axis] = size
    placed = np.full(shape, FREE)
    at: list[slice | NDArray[np.int64]] = [slice(None)] * ids.ndim
    at[axis] = where
    placed[tuple(at)] = ids
    return placed


def _cut(node: ir.Node, axis: int, rank: int, size: int) -> NDArray[np.int64] | None:
    """The positions that a Slice takes of one axis of ``size``; ``None`` where they are computed."""
    told = [array(value) for value in node.inputs[1:] if value is not None]
    if len(told) != len(node.inputs) - 1 or any(numbers is None for numbers in told) or len(told) < 2:
        return None
    starts, ends = (np.asarray(numbers).reshape(-1).tolist() for numbers in told[:2])
    axes = np.asarray(told[2]).reshape(-1) % rank if len(told) > 2 else np.arange(len(starts))
    steps = np.asarray(told[3]).reshape(-1).tolist() if len(told) > 3 else [1] * len(starts)
    found = np.arange(size)
    for place, start, end, step in zip(axes, starts, ends, steps, strict=True):
        found = found[start:end:step] if place == axis else found
    return found


def _slice_down(node: ir.Node, _: int, ids: Ids) -> Ids | None:
    for axis, size in enumerate(ids.shape):
        where = np.zeros(1, np.int64) if size == 1 else _cut(node, axis, ids.ndim, size)
        if where is None:
            return None
        ids = np.take(ids, where, axis)
    return ids


def _slice_up(node: ir.Node, _: int, ids: Ids) -> Ids | None:
    """An axis that no channels run along and whose size is not known is taken as a whole."""
    shape = _input_sizes(node)
    if shape is None or len(shape) != ids.ndim:
        return None
    for axis, size in enumerate(shape):
        where = None if size is None else _cut(node, axis, ids.ndim, size)
        if size is None and ids.shape[axis] == 1:
            continue
        if where is None or size is None:
            return None
        if where.size != size or ids.shape[axis] > 1:
            ids = _place(ids, axis, where, size)
    return ids


def _gather_down(node: ir.Node, _: int, ids: Ids) -> Ids | None:
    axis, where = _gathered(node)
    if where is None or axis is None:
        return None
    return np.take(ids, where if ids.shape[axis] > 1 else np.zeros_like(where), axis)


def _gather_up(node: ir.Node, _: int, ids: Ids) -> Ids | None:
    axis, where = _gathered(node)
    shape = _input_sizes(node)
    if where is None or axis is None or shape is None or where.ndim > 1:
        return None
    size = shape[axis]
    if where.ndim == 0:
        ids, where = np.expand_dims(ids, axis), where.reshape(1)
    return None if size is None else _place(ids, axis, where % size, size)


def _gathered(node: ir.Node) -> tuple[int | None, NDArray[np.int64] | None]:
    shape, told = _input_sizes(node), array(node.inputs[1])
    if shape is None or told is None:
        return None, None
    return node.attributes.get_int("axis", 0) % len(shape), np.asarray(told, np.int64)


def _same(_: ir.Node, __: int, ids: Ids) -> Ids | None:
    return ids


DOWN: dict[str, Mapping] = {
    "Reshape": _reshape_down,
    "Flatten": _reshape_down,
    "Transpose": _transpose_down,
    "Unsqueeze": _insert,
    "Squeeze": _remove,
    "Slice": _slice_down,
    "Split": _take_piece,
    "Concat": _place_piece,
    "Gather": _gather_down,
    "Identity": _same,
    "Dropout": _same,
}
"""From the first input (a Concat: the input of that index) to the output (a Split: the output of that index)."""

UP: dict[str, Mapping] = {
    "Reshape": _reshape_up,
    "Flatten": _reshape_up,
    "Transpose": _transpose_up,
    "Unsqueeze": _remove,
    "Squeeze": _insert,
    "Slice": _slice_up,
    "Split": _place_piece,
    "Concat": _take_piece,
    "Gather": _gather_up,
    "Identity": _same,
    "Dropout": _same,
}
"""The same, the other way."""
