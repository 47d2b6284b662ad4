"""Weights as 8-bit numbers: the scales of their channels, and when these are too coarse or too large for float16.

A pass may choose other numbers than the nearest and leave them on the weight; :func:`stored_numbers` takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.numbers.formats import FORMATS, Format, Kind
from qexport.passes.numbers.range import LARGEST_SCALE, SMALLEST_FLOAT32, SMALLEST_SCALE, half_precision

MIN_CHANNEL_SQNR = 20.0  # dB; a channel with a scale of its own has about 40 in int8, 32 in fp8
AT_ONCE = 1 << 20  # elements that are rounded together
MAX_COARSE = 0.25  # share of channels, or groups, that may lose by a scale which float16 raises
ZERO_IN_HALF = 2.0**-25  # what float16 rounds to zero
CHOSEN_KEY = "qexport.chosen"


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Integers that a pass chose for a weight, left on its value for whoever stores it.

    Attributes:
        numbers: Int8, of the weight's shape.
        scale: ``[channels]``, as :func:`quantize_weight` finds it.
        axis: Axis of the channels.
        half: Whether the scales are float16 numbers.
        tensor: The weight they were chosen for; for any other they are void.
    """

    numbers: NDArray[np.int8]
    scale: NDArray[np.float32]
    axis: int
    half: bool
    tensor: ir.TensorProtocol


def stored_numbers(
    value: ir.Value | None, tensor: ir.TensorProtocol, axis: int, *, half: bool = False, kind: Kind = "int8"
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """What ``value``, which holds ``tensor``, is stored as: the numbers chosen for it, or else the nearest."""
    found = chosen_for(value, tensor, axis, half=half)
    if found is not None and kind == "int8":
        return found.numbers, found.scale
    return quantize_weight(tensor.numpy(), axis, half=half, kind=kind)


def chosen_for(value: ir.Value | None, tensor: ir.TensorProtocol, axis: int, *, half: bool) -> Chosen | None:
    """The integers that another pass chose for a weight, if one did and they still hold."""
    found = None if value is None else value.meta.get(CHOSEN_KEY)
    if not isinstance(found, Chosen):
        return None
    return found if found.tensor is tensor and (found.axis, found.half) == (axis, half) else None


def quantize_weight(
    weight: NDArray[np.generic], axis: int, *, half: bool = False, kind: Kind = "int8"
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Symmetric numbers along ``axis``: of the same shape, at most 127 or 448 from zero, and scales ``[channels]``.

    Scales are absmax; where the format has stretches, each channel takes the one with the least squared error.
    With ``half``, the scales are normal float16 numbers; :func:`misfit` says whether that is good enough.
    """
    numbers = FORMATS[kind]
    w = np.asarray(weight, np.float32)
    wanted = _wanted(w, axis, numbers)
    scale = _scale(wanted, half)
    if len(numbers.stretches) > 1:
        scales = [_scale(wanted * np.float32(stretch), half) for stretch in numbers.stretches]
        noise = [_noise(w, numbers.encode(_steps(w, tried, axis)), tried, axis) for tried in scales]
        scale = np.take_along_axis(np.stack(scales), np.argmin(noise, axis=0)[None], axis=0)[0]
    return _encode(w, scale, axis, numbers), scale


def misfit(weight: NDArray[np.generic], axis: int, *, half: bool, kind: Kind = "int8") -> str | None:
    """Why ``weight`` cannot be stored with one scale for each channel of ``axis``, if it cannot.

    With ``half``, a channel keeps ``MIN_CHANNEL_SQNR`` if its scale need not be raised to what float16 allows. A few
    channels may fall short, as those do that a batch normalization has switched off and was folded into; more than
    ``MAX_COARSE`` of them hold something. A channel that is zero in float16 as well has nothing to lose.
    """
    w = np.asarray(weight, np.float32)
    numbers = FORMATS[kind]
    wanted = _wanted(w, axis, numbers)
    if not np.isfinite(wanted).all():
        return "weights are not finite"
    if half and wanted.max(initial=0.0) > LARGEST_SCALE:
        return "weights too large for float16 scales"
    raised = half & (wanted < SMALLEST_SCALE) & (wanted * np.float32(numbers.reach) > ZERO_IN_HALF)
    if not raised.any():
        return None
    small = np.compress(raised, w, axis)
    stored, scale = quantize_weight(small, axis, half=True, kind=kind)
    noise = _noise(small, stored, scale, axis)
    power = np.square(small.astype(np.float64)).sum(axis=_others(small, axis))
    coarse = noise > power * 10 ** (-MIN_CHANNEL_SQNR / 10)
    return "weights too small for float16 scales" if coarse.sum() > MAX_COARSE * wanted.size else None


def _others(w: NDArray[np.float32], axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(w.ndim) if i != axis)


def _wanted(w: NDArray[np.float32], axis: int, numbers: Format) -> NDArray[np.float32]:
    """The largest magnitude of each channel, over the largest number."""
    others = _others(w, axis)
    most = np.maximum(w.max(axis=others, initial=0.0), -w.min(axis=others, initial=0.0))
    return np.asarray(most / np.float32(numbers.reach), np.float32)


def _scale(wanted: NDArray[np.float32], half: bool) -> NDArray[np.float32]:
    if half:
        return half_precision(wanted)
    return np.asarray(np.where(wanted == 0, SMALLEST_SCALE, np.maximum(wanted, SMALLEST_FLOAT32)), np.float32)


def _encode(w: NDArray[np.float32], scale: NDArray[np.float32], axis: int, numbers: Format) -> NDArray[np.generic]:
    """The stored numbers, some channels at a time: a table of words would be held several times over at once."""
    stored = np.empty(w.shape, numbers.stored)
    rows, made = np.moveaxis(w, axis, 0), np.moveaxis(stored, axis, 0)
    count = max(1, AT_ONCE // max(1, rows[0].size if len(rows) else 1))
    for start in range(0, len(rows), count):
        part = slice(start, start + count)
        made[part] = numbers.encode(_steps(rows[part], scale[part], 0))
    return stored


def _steps(w: NDArray[np.float32], scale: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    return np.asarray(w / np.expand_dims(scale, _others(w, axis)), np.float32)


def _noise(w: NDArray[np.float32], stored: NDArray[Any], scale: NDArray[np.float32], axis: int) -> NDArray[np.float64]:
    """Sum of the squared errors of each channel."""
    others = _others(w, axis)
    back = stored.astype(np.float64) * np.expand_dims(scale.astype(np.float64), others)
    return np.asarray(np.square(back - w).sum(axis=others))
