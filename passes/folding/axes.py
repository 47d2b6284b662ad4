"""Where channels lie in a value, and where they go when a value is reshaped, transposed, split or joined.

Channels are followed as an array of *ids* with the rank of the value: ``ids[...]`` broadcasts against the value and
names the channel of each element, ``FREE`` where an element belongs to none. An axis along which nothing changes has
size 1, so sizes that are not known do no harm as long as no channel runs along them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.match import Dims, array, dims, perm

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


def tied(count: int, pairs: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> NDArray[np.int64]:
    """For each of ``count`` channels the smallest one that pairs, of arrays of the same size, connect it with."""
    known, found = list(pairs), np.arange(count)
    while True:
        before = found.copy()
        for one, other in known:
            least = np.minimum(found[one], found[other])
            np.minimum.at(found, one, least)
            np.minimum.at(found, other, least)
        found = found[found]
        if np.array_equal(before, found):
            return found


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


def _reshaped(node: ir.Node) -> tuple[Dims | None, Dims | None]:
    """Shapes of a Reshape's or Flatten's input and output; a size that is copied has the same name in both."""
    source, target = dims(node.inputs[0]), dims(node.outputs[0])
    told = array(node.inputs[1]) if node.op_type == "Reshape" else None
    if source is None or told is None:
        return source, target
    before, after = list(source), [int(size) if size > 0 else None for size in np.asarray(told).reshape(-1)]
    known = target if target is not None and len(target) == len(after) else (None,) * len(after)
    made: list[int | str | None] = [size or other for size, other in zip(after, known, strict=True)]
    for axis, size in enumerate(np.asarray(told).reshape(-1)):
        if size == 0 and axis < len(before) and node.attributes.get_int("allowzero", 0) == 0:
            before[axis] = made[axis] = before[axis] or made[axis] or f"\0{axis}"
    return tuple(before), tuple(made)


def regroup(ids: Ids, source: Dims | None, target: Dims | None) -> Ids | None:
    """Ids behind a reshape from ``source`` to ``target``.

    Axes are matched from both ends, in groups of known sizes with equal products; between them, no channel may run
    along any axis.
    """
    if source is None or target is None or ids.ndim != len(source):
        return None
    wide, made = [1] * len(source), [1] * len(target)
    for a, b in _groups(source, target):
        if max(ids.shape[a]) > 1 and isinstance(source[a.start], str):
            wide[a] = made[b] = ids.shape[a]
        elif max(ids.shape[a]) > 1:
            wide[a], made[b] = _integers(source[a]), _integers(target[b])
    if any(size > most for size, most in zip(ids.shape, wide, strict=True)):
        return None
    return np.broadcast_to(ids, wide).reshape(made)


def _integers(sizes: Dims) -> list[int]:
    return [size for size in sizes if isinstance(size, int)]


def _groups(source: Dims, target: Dims) -> list[tuple[slice, slice]]:
    """Axes that correspond to one another, as few at a time as possible: from the last one, then from the first."""
    found = []
    i, j, k, m = len(source), len(target), 0, 0
    while group := _group(source[:i], target[:j]):
        a, b = group
        found.append((slice(i - a, i), slice(j - b, j)))
        i, j = i - a, j - b
    while group := _group(source[k:i][::-1], target[m:j][::-1]):
        a, b = group
        found.append((slice(k, k + a), slice(m, m + b)))
        k, m = k + a, m + b
    return found


def _group(source: Dims, target: Dims) -> tuple[int, int] | None:
    """How many of the last axes of either shape have the same product, as few as possible."""
    if source and target and source[-1] is not None and source[-1] == target[-1]:
        return 1, 1
    taken, products, ends = [0, 0], [1, 1], (source, target)
    while products[0] != products[1] or 0 in taken:
        side = 0 if products[0] < products[1] or not taken[0] else 1
        taken[side] += 1
        size = ends[side][-taken[side]] if taken[side] <= len(ends[side]) else None
        if not isinstance(size, int) or size == 0:
            return None
        products[side] *= size
    return taken[0], taken[1]


def _reshape_down(node: ir.Node, _: int, ids: Ids) -> Ids | None:
    source, target = _reshaped(node)
    return regroup(ids, source, target)


def _reshape_up(node: ir.Node, _: int, ids: Ids) -> Ids | None:
    source, target = _reshaped(node)
    return regroup(ids, target, source)


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
