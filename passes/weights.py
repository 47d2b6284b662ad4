"""Weights as integers: the scales of their channels, and when these are too coarse or too large for float16."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qexport.passes.range import LARGEST_SCALE, SMALLEST_FLOAT32, SMALLEST_SCALE, half_precision

MIN_CHANNEL_SQNR = 20.0  # dB; an int8 channel with a scale of its own has about 40
MAX_COARSE = 0.25  # share of channels
ZERO_IN_HALF = 2.0**-25  # what float16 rounds to zero


def quantize_weight(
    weight: NDArray[np.generic], axis: int, *, half: bool = False
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric absmax int8 along ``axis``: integers in [-127, 127] of the same shape, scales ``[channels]``.

    With ``half``, the scales are normal float16 numbers; :func:`misfit` says whether that is good enough.
    """
    w = np.asarray(weight, np.float32)
    others = _others(w, axis)
    wanted = _wanted(w, axis)
    scale = (
        half_precision(wanted) if half else np.where(wanted == 0, SMALLEST_SCALE, np.maximum(wanted, SMALLEST_FLOAT32))
    )
    wide = np.expand_dims(scale, others)
    return np.clip(np.rint(w / wide), -127, 127).astype(np.int8), np.asarray(scale, np.float32)


def misfit(weight: NDArray[np.generic], axis: int, *, half: bool) -> str | None:
    """Why ``weight`` cannot be stored with one scale for each channel of ``axis``, if it cannot.

    With ``half``, a channel keeps ``MIN_CHANNEL_SQNR`` if its scale need not be raised to what float16 allows. A few
    channels may fall short, as those do that a batch normalization has switched off and was folded into; more than
    ``MAX_COARSE`` of them hold something. A channel that is zero in float16 as well has nothing to lose.
    """
    w = np.asarray(weight, np.float32)
    wanted = _wanted(w, axis)
    if not np.isfinite(wanted).all():
        return "weights are not finite"
    if half and wanted.max(initial=0.0) > LARGEST_SCALE:
        return "weights too large for float16 scales"
    raised = half & (wanted < SMALLEST_SCALE) & (wanted * 127 > ZERO_IN_HALF)
    if not raised.any():
        return None
    small = np.compress(raised, w, axis)
    integers, scale = quantize_weight(small, axis, half=True)
    others = _others(small, axis)
    noise = np.square(integers * np.expand_dims(scale.astype(np.float64), others) - small).sum(axis=others)
    power = np.square(small.astype(np.float64)).sum(axis=others)
    coarse = noise > power * 10 ** (-MIN_CHANNEL_SQNR / 10)
    return "weights too small for float16 scales" if coarse.sum() > MAX_COARSE * wanted.size else None


def _others(w: NDArray[np.float32], axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(w.ndim) if i != axis)


def _wanted(w: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """The largest magnitude of each channel, over 127."""
    return np.asarray(np.abs(w).max(axis=_others(w, axis), initial=0.0) / 127, np.float32)
