"""Optimization profiles: the smallest, best and largest shape of every input that an engine is built for."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import accumulate

import onnx_ir as ir

from qexport.errors import DataInvalid, UsageError

Profile = dict[str, tuple[list[int], list[int], list[int]]]
"""Input name to smallest, best and largest shape, batch axis first."""

_Axis = int | str  # a size, or what the sizes of a dynamic axis are called
_Range = tuple[int, int, int]  # smallest, best, largest

_BEST_BATCH = 8
_STEP = 8
_BATCH = "\0batch"  # what unnamed first axes are called; no axis of a model has this name
_WRITE_ONE = "write it in the recipe: [export.profiles] with {name} = [smallest, best, largest shape]"


def derive_profile(
    inputs: Iterable[ir.Value],
    shapes: Iterable[Mapping[str, Sequence[int]]],
    *,
    limit: int | None = None,
    max_batch: int = 32,
    fixed: Mapping[str, int] | None = None,
) -> Profile:
    """Derive a profile for the inputs of a graph from the shapes of single samples.

    Axes of the same name get the same sizes in every input, and so do unnamed first axes. The first axis is the
    batch, ``1, 8, max_batch``. Another dynamic axis starts at the smallest size seen, is best at the median rounded
    up to a multiple of 8, and ends at the largest rounded up to a power of two; sizes that never varied stay. With
    a ``limit``, as for tokens, it starts at 1 and ends at the limit.

    Args:
        inputs: Graph inputs; those with an initializer are passed over.
        shapes: Per sample, input name to shape without the batch axis; read once, kept as counts.
        limit: Largest size of every dynamic axis but the batch.
        max_batch: Largest batch.
        fixed: Sizes of axes that the samples do not show, by the name of the axis.

    Raises:
        UsageError: An axis is dynamic and neither samples nor limit say how large it gets.
        DataInvalid: A sample has another number of axes than its input.
    """
    axes = _axes(inputs)
    seen = _count(axes, shapes)
    ranges: dict[str, _Range] = {key: (1, min(_BEST_BATCH, max_batch), max_batch) for key in _batches(axes)}
    ranges |= {axis: (size, size, size) for axis, size in (fixed or {}).items()}
    for name, shape in axes.items():
        for axis in shape:
            if isinstance(axis, str) and axis not in ranges:
                ranges[axis] = _range(seen.get(axis, Counter()), limit, name)
    return {name: _shapes(shape, ranges) for name, shape in axes.items()}


def check_profile(inputs: Iterable[ir.Value], given: Mapping[str, Sequence[Sequence[int]]]) -> Profile:
    """Check a profile that a person wrote; inputs without dynamic axes may be left out and are filled in.

    Raises:
        UsageError: An unknown or missing input; not three shapes; a wrong number of axes; a size below 1; not
            smallest <= best <= largest; another size than the model's; axes of one name with different sizes.
    """
    axes = _axes(inputs)
    for name in given:
        if name not in axes:
            near = get_close_matches(name, axes, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"inputs: {', '.join(axes)}"
            raise UsageError("the model has no such input", where=_where(name), hint=hint)
    ranges: dict[str, tuple[str, _Range]] = {}
    profile: Profile = {}
    for name, shape in axes.items():
        if name in given:
            _check_input(name, shape, given[name], ranges)
        elif any(isinstance(axis, str) for axis in shape):
            raise UsageError("the profile is missing", where=_where(name), hint=_WRITE_ONE.format(name=name))
        profile[name] = _listed(given[name]) if name in given else _shapes(shape, {})
    return profile


def _check_input(
    name: str, shape: tuple[_Axis, ...], given: Sequence[Sequence[int]], ranges: dict[str, tuple[str, _Range]]
) -> None:
    if len(given) != 3 or any(len(sizes) != len(shape) for sizes in given):
        expected = f"expected three shapes of {len(shape)} sizes: smallest, best, largest"
        raise UsageError(expected, where=_where(name))
    for index, axis in enumerate(shape):
        where = f"{_where(name)}, axis {index}"
        low, best, high = (sizes[index] for sizes in given)
        if not 1 <= low <= best <= high:
            raise UsageError(f"expected 1 <= smallest <= best <= largest, got {low}, {best}, {high}", where=where)
        if isinstance(axis, int):
            if (low, high) != (axis, axis):
                raise UsageError(f"the model says {axis}, the profile {low}, {best}, {high}", where=where)
            continue
        first, sizes = ranges.setdefault(axis, (where, (low, best, high)))
        if sizes != (low, best, high):
            what = f"the axis {_name(axis)} has sizes {low}, {best}, {high} here and {sizes} in the {first}"
            raise UsageError(what, where=where, hint="axes of one name have the same sizes")


def _axes(inputs: Iterable[ir.Value]) -> dict[str, tuple[_Axis, ...]]:
    """Name the axes of every input; same name, same size."""
    named: dict[str, tuple[_Axis, ...]] = {}
    for value in inputs:
        if value.is_initializer():
            continue
        name = value.name or ""
        if value.shape is None:
            raise UsageError("the model does not say how many axes it has", where=f"input {name!r}")
        named[name] = tuple(_axis(name, index, size) for index, size in enumerate(value.shape))
    return named


def _axis(name: str, index: int, size: int | ir.SymbolicDim) -> _Axis:
    if isinstance(size, int):
        return size
    return size.value or (_BATCH if index == 0 else f"\0{name}[{index}]")


def _name(axis: str) -> str:
    return repr(axis) if not axis.startswith("\0") else axis[1:]


def _batches(axes: Mapping[str, tuple[_Axis, ...]]) -> set[str]:
    return {shape[0] for shape in axes.values() if shape and isinstance(shape[0], str)}


def _count(
    axes: Mapping[str, tuple[_Axis, ...]], shapes: Iterable[Mapping[str, Sequence[int]]]
) -> dict[str, Counter[int]]:
    counts: dict[str, Counter[int]] = {
        axis: Counter() for shape in axes.values() for axis in shape[1:] if isinstance(axis, str)
    }
    for number, sample in enumerate(shapes):
        for name, sizes in sample.items():
            if name not in axes:
                continue
            expected = axes[name][1:]
            if len(sizes) != len(expected):
                what = f"sample {number} has the shape {tuple(sizes)}, expected {len(expected)} axes after the batch"
                raise DataInvalid(what, where=f"input {name!r}")
            for axis, size in zip(expected, sizes, strict=True):
                if isinstance(axis, str):
                    counts[axis][size] += 1
    return counts


def _range(seen: Counter[int], limit: int | None, name: str) -> _Range:
    if not seen:
        if limit is None:
            hint = _WRITE_ONE.format(name=name)
            raise UsageError(
                "an axis is dynamic and there is no data to see its sizes in", where=_where(name), hint=hint
            )
        return 1, limit, limit
    low, high = max(1, min(seen)), max(1, *seen)
    if limit is not None:
        low, largest = 1, max(limit, high)
    else:
        largest = high if low == high else 1 << (high - 1).bit_length()
    middle = -(-_median(seen) // _STEP) * _STEP
    best = high if low == high else min(max(middle, low), largest)
    return low, best, largest


def _median(counts: Counter[int]) -> int:
    """Return the smallest size that at least half of the samples do not exceed."""
    sizes = sorted(counts)
    totals = list(accumulate(counts[size] for size in sizes))
    return sizes[bisect_left(totals, -(-totals[-1] // 2))]


def _shapes(shape: tuple[_Axis, ...], ranges: Mapping[str, _Range]) -> tuple[list[int], list[int], list[int]]:
    spans = [(axis, axis, axis) if isinstance(axis, int) else ranges[axis] for axis in shape]
    return _listed([[span[place] for span in spans] for place in range(3)])


def _listed(shapes: Sequence[Sequence[int]]) -> tuple[list[int], list[int], list[int]]:
    low, best, high = (list(shape) for shape in shapes)
    return low, best, high


def _where(name: str) -> str:
    return f"profile of input {name!r}"
