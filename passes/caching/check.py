"""Run what lies between the ends of an attention with random numbers, and compare it with the formula.

So one check covers every way of writing repeated heads, scales, masks and guards against rows of NaN.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes import match
from qexport.passes.caching.calls import Call, Calls, UnknownValue
from qexport.passes.caching.parts import Cache, Ends, RefusalError

CALLS = ((2, 3), (0, 4), (5, 1))
"""Past and new tokens of the calls that are tried."""
HIDDEN = -1e3
"""Scores below are masked."""
FURTHEST = 1 << 26
"""Elements of the largest repeated cache that is made up to see whether a constant is a window."""
TOLERANCES = {4: 1e-4, 8: 1e-4, 2: 3e-2}
"""Relative to the largest number, by bytes of an element."""

Array: TypeAlias = NDArray[Any]


def measure(ends: Ends, calls: Calls) -> tuple[float, int | None]:
    """Return the scale of the scores and the window of the mask.

    Raises:
        RefusalError: The layer is something else than attention with a causal mask, maybe within a window.
    """
    if ends.keys.heads != ends.values.heads:
        raise RefusalError(ends.product, "not as many heads of keys as of values")
    try:
        return _fused(ends, calls) if ends.softmax is None else _spelt(ends, ends.softmax, calls)
    except UnknownValue as error:
        raise RefusalError(ends.product, f"the attention {error}") from error


def _spelt(ends: Ends, softmax: ir.Node, calls: Calls) -> tuple[float, int | None]:
    """Check the road to Softmax and the one behind it."""
    masked, chances = softmax.inputs[0], softmax.outputs[0]
    assert masked is not None
    heads = _heads(ends, calls)
    window = _window(ends, masked, heads, calls)
    scale = 0.0
    for call in (calls.at(*sizes) for sizes in CALLS):
        query, keys = _draw(ends.keys, heads, call.new), _draw(ends.keys, ends.keys.heads, call.total)
        (found,) = call.work_out([masked], {ends.query: query, ends.keys.present: keys})
        raw = (query @ _repeated(keys, heads).swapaxes(-1, -2))[0]
        if found.size != raw.size:
            raise RefusalError(softmax, "not one number for each query and key")
        shown = found.reshape(raw.shape)
        seen = np.broadcast_to(_visible(call, window), raw.shape)
        scale = scale or float(np.vdot(raw[seen], shown[seen]) / np.vdot(raw[seen], raw[seen]))
        _compare_scores(softmax, shown, scale * raw, seen)
        weights = np.random.default_rng(2).random(found.shape).astype(found.dtype)
        values = _draw(ends.values, ends.values.heads, call.total)
        (context,) = call.work_out([ends.context], {chances: weights, ends.values.present: values})
        expected = weights.reshape(1, heads, call.new, call.total) @ _repeated(values, heads)
        if not _alike(context, expected):
            raise RefusalError(ends.product, "the weights or values are changed before they are multiplied")
    if not scale > 0:
        raise RefusalError(softmax, "the scale is not positive")
    return scale, window


def _compare_scores(where: ir.Node, found: Array, expected: Array, seen: Array) -> None:
    shown = found > HIDDEN
    if (shown & ~seen).any():
        raise RefusalError(where, "the mask shows more than the past")
    if (seen & ~shown).any():
        raise RefusalError(where, "the mask hides some of the past, and is no window")
    if not _alike(found[seen], expected[seen]):
        raise RefusalError(where, "positions or a cap change the scores, besides a scale and a mask")


def _fused(ends: Ends, calls: Calls) -> tuple[float, int | None]:
    """Check an Attention node as a whole."""
    node = ends.product
    heads = (match.dims(ends.query) or (0, 0))[1]
    if not isinstance(heads, int) or heads % ends.keys.heads:
        raise RefusalError(node, "the number of heads is not known")
    scale = node.attributes.get_float("scale", ends.keys.dim**-0.5)
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    window = None if mask is None else _window(ends, mask, heads, calls)
    for call in (calls.at(*sizes) for sizes in CALLS):
        query = _draw(ends.keys, heads, call.new)
        keys, values = (_draw(cache, cache.heads, call.total) for cache in (ends.keys, ends.values))
        given = {ends.query: query}
        for cache, array in ((ends.keys, keys), (ends.values, values)):
            parts = {cache.past: array[:, :, : call.past], cache.new: array[:, :, call.past :]}
            given |= parts if cache.present.producer() is node else {cache.present: array}
        (found,) = call.work_out([ends.context], given)
        scores = scale * (query @ _repeated(keys, heads).swapaxes(-1, -2)).astype(np.float64)
        weights = np.exp(np.where(_visible(call, window), scores, -np.inf))
        expected = weights / weights.sum(-1, keepdims=True) @ _repeated(values, heads)
        if not _alike(found, expected):
            raise RefusalError(node, "no causal mask, or positions or a cap change the scores")
    return scale, window


def _heads(ends: Ends, calls: Calls) -> int:
    """How many heads the keys have when they are multiplied."""
    call = calls.at(*CALLS[0])
    keys = _draw(ends.keys, ends.keys.heads, call.total)
    repeated = ends.scores.inputs[1]
    assert repeated is not None
    (found,) = call.work_out([repeated], {ends.keys.present: keys})
    heads = int(found.size) // (call.total * ends.keys.dim)
    if heads % ends.keys.heads or found.size != heads * call.total * ends.keys.dim:
        raise RefusalError(ends.scores, "the keys are not repeated a whole number of times")
    return heads


def _window(ends: Ends, masked: ir.Value, heads: int, calls: Calls) -> int | None:
    """How far back a token sees: tried behind more tokens than any integer says from which the mask is computed."""
    call = calls.at(*CALLS[0])
    given = _plain(ends, heads, call)
    most = FURTHEST // (heads * ends.keys.dim)
    far = max((abs(n) for n in call.integers(masked, given) if CALLS[-1][0] < abs(n) <= most), default=0)
    if not far:
        return None
    call = calls.at(far + 2, 3)
    try:
        (found,) = call.work_out([masked], _plain(ends, heads, call))
    except UnknownValue:  # there are not so many positions
        return None
    seen = found if found.dtype == np.bool_ else found > HIDDEN
    counts = {int(count) for count in seen.reshape(-1, call.total).sum(-1)}
    return min(counts) if len(counts) == 1 and min(counts) <= call.past else None


def _plain(ends: Ends, heads: int, call: Call) -> dict[ir.Value, Array]:
    """Zeros as query and keys."""
    dtype = _draw(ends.keys, 1, 1).dtype
    query, keys = np.zeros((1, heads, call.new, ends.keys.dim), dtype), np.zeros((), dtype)
    return {
        ends.query: query,
        ends.keys.present: np.broadcast_to(keys, (1, ends.keys.heads, call.total, ends.keys.dim)),
    }


def _visible(call: Call, window: int | None) -> Array:
    back = np.arange(call.past, call.total)[:, None] - np.arange(call.total)
    return (back >= 0) & (back < (window or call.total))


def _draw(cache: Cache, heads: int, length: int) -> Array:
    """Random numbers [1, heads, length, size] of a cache's type, other ones for other sizes."""
    assert cache.past.dtype is not None
    rng = np.random.default_rng((heads, length, cache.dim))
    return rng.standard_normal((1, heads, length, cache.dim)).astype(cache.past.dtype.numpy())


def _repeated(array: Array, heads: int) -> Array:
    return np.repeat(array, heads // array.shape[1], 1)


def _alike(found: Array, expected: Array) -> bool:
    """Whether the numbers are equal but for rounding, in whatever shape."""
    if found.size != expected.size:
        return False
    one, other = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    limit = TOLERANCES[found.dtype.itemsize] * float(np.abs(other).max())
    return bool(np.abs(one - other).max() <= limit)  # a NaN is not
