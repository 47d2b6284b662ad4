"""The range of a tensor and the 8-bit numbers that stand for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.numbers.formats import FORMATS, Kind

RANGE_KEY = "qexport.range"
SQNR_KEY = "qexport.sqnr"
SMALLEST_SCALE = 2.0**-14  # the smallest normal float16; a denormal scale is read as zero by some engines
LARGEST_SCALE = 65504.0  # the largest float16
SMALLEST_FLOAT32 = 2.0**-126  # the smallest normal float32
HALF_QUANTIZERS = 19  # first opset whose Q/DQ take float16


@dataclass(frozen=True, slots=True)
class Range:
    """What a tensor's values are clipped to; ``low <= 0 <= high``, so that zero is represented exactly."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.low) and np.isfinite(self.high) and self.low <= 0 <= self.high):
            raise ValueError(f"a range must be finite and contain zero, got [{self.low!r}, {self.high!r}]")


@dataclass(frozen=True, slots=True)
class Integers:
    """Scale and zero point of a quantizer: ``q = clip(round(x / scale) + zero_point)``, rounding as its kind does."""

    scale: float
    zero_point: int
    kind: Kind

    @property
    def zero(self) -> NDArray[np.generic]:
        """The zero point as QuantizeLinear takes it; its type is that of the result."""
        return np.array(self.zero_point, FORMATS[self.kind].stored)

    def apply(self, x: NDArray[np.floating]) -> NDArray[Any]:
        """Quantize and dequantize; returns float32 for float32, as a runtime computes it, and float64 for float64.

        The division is in float32 in any case, so that ties fall where a runtime lets them fall.
        """
        numbers, wide = FORMATS[self.kind], np.asarray(x).dtype == np.float64
        low, high = (limit - self.zero_point for limit in numbers.limits)
        with np.errstate(over="ignore"):  # what overflows saturates
            steps = np.asarray(numbers.nearest(np.asarray(x, np.float32) / np.float32(self.scale)))
            clipped = np.clip(steps, low, high, out=steps)
        return clipped.astype(np.float64) * self.scale if wide else np.multiply(clipped, np.float32(self.scale))


def half_precision(scale: NDArray[np.floating] | float) -> NDArray[np.float32]:
    """Round scales up to values that float16 holds too, so that a half-precision graph computes with the same ones.

    Scales outside the normal float16 numbers become the nearest one; callers refuse those that matter.
    """
    wanted = np.clip(np.asarray(scale, np.float64), SMALLEST_SCALE, LARGEST_SCALE)
    half = wanted.astype(np.float16)
    raised: NDArray[np.float16] = np.where(half < wanted, np.nextafter(half, np.float16(np.inf)), half)
    return np.asarray(raised, np.float32)


def integers_for(span: Range, kind: Kind, *, half: bool | None = None) -> Integers:
    """Scale and zero point for ``span``: absmax for int8 and fp8, affine for uint8.

    ``half`` asks for a scale that float16 holds; by default all but uint8 get one, since the targets that take them
    compute in half precision.
    """
    wanted, affine = _wanted(span, kind), FORMATS[kind].affine
    if not affine if half is None else half:
        scale = float(half_precision(wanted))
    else:
        scale = float(np.float32(max(wanted or SMALLEST_SCALE, SMALLEST_FLOAT32)))
    return Integers(scale, int(np.clip(np.rint(-span.low / scale), 0, 255)) if affine else 0, kind)


def beyond_half(span: Range, kind: Kind) -> str | None:
    """Why no float16 scale stands for ``span``, if none does."""
    wanted = _wanted(span, kind)
    if wanted > LARGEST_SCALE:
        return "its range is too large for a float16 scale"
    return "its range is too small for a float16 scale" if wanted * FORMATS[kind].slack < SMALLEST_SCALE else None


def _wanted(span: Range, kind: Kind) -> float:
    numbers = FORMATS[kind]
    return (span.high - span.low if numbers.affine else max(-span.low, span.high)) / numbers.reach


def range_of(value: ir.Value) -> Range | None:
    """The range that calibration left on ``value``, if it did."""
    found = value.meta.get(RANGE_KEY)
    return found if isinstance(found, Range) else None
