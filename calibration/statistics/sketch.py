"""A histogram small enough to stay on the value it is of until the report: a sixteenth of the detail.

Sixteen buckets of a ``Histogram`` become one, so a bucket is at most 1/64 of its value wide. Ranges are never chosen
from it, and it is dropped with the range that was measured along with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.statistics.histogram import MANTISSA_BITS, OCTAVES, Histogram
from qexport.passes.numbers.notes import SKETCH_KEY

_KEPT_BITS = 6
_PARTS = 1 << _KEPT_BITS  # buckets of an octave
_MERGED = 1 << (MANTISSA_BITS - _KEPT_BITS)
_BIAS = 127  # of float32 exponents


@dataclass(frozen=True, slots=True, eq=False)
class Sketch:
    """What is kept of one tensor's histogram, some 20 kB at most.

    Attributes:
        low: Smallest value seen, 0 if none was below it.
        high: Largest value seen, 0 if none was above it.
        zeros: Count of values that are zero or too small to matter.
        centres: Of the occupied buckets, rising, without zero.
        counts: Of each.
    """

    low: float
    high: float
    zeros: int
    centres: NDArray[np.float32]
    counts: NDArray[np.int64]

    @property
    def total(self) -> int:
        """Number of values counted."""
        return int(self.counts.sum()) + self.zeros

    def table(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Bucket centres in rising order, zero among them if there was one, with their counts; as of a histogram."""
        centres = self.centres.astype(np.float64)
        if not self.zeros:
            return np.clip(centres, self.low, self.high), self.counts
        place = int(np.searchsorted(centres, 0.0))
        values = np.insert(centres, place, 0.0)
        return np.clip(values, self.low, self.high), np.insert(self.counts, place, self.zeros)

    def clipped(self, low: float, high: float) -> float:
        """The share of all values outside ``low`` to ``high``; a bucket that an end cuts counts in proportion."""
        if not self.total:
            return 0.0
        under, over = self._below(np.array([low, high]))
        under = under if low > self.low else 0.0
        outside = under + (self.counts.sum() - over if high < self.high else 0.0)
        return float(np.clip(outside / self.total, 0.0, 1.0))

    def bins(self, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Edges of ``count`` equal bins between the extremes, and how many values but zeros each holds.

        The counts of a bucket are spread evenly over its width; they are whole and sum up to what there was.
        """
        edges = np.linspace(self.low, self.high, count + 1)
        below = np.rint(self._below(edges)).astype(np.int64)
        below[0], below[-1] = 0, int(self.counts.sum())
        return edges, np.diff(np.maximum.accumulate(below))

    def magnitudes(self, count: int) -> NDArray[np.float64]:
        """How many values but zeros have a magnitude in each of ``count`` equal bins up to the largest one."""
        top = max(-self.low, self.high)
        edges = np.linspace(0.0, top, count + 1)
        both = np.rint(self._below(edges) - self._below(-edges))  # whole: one value is in one bin
        both[-1] = self.counts.sum()
        return np.diff(np.maximum.accumulate(both))

    def _below(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """How many values but zeros lie below each point."""
        if not self.counts.size:
            return np.zeros(len(points))
        centres = self.centres.astype(np.float64)
        half = np.ldexp(0.5 / _PARTS, np.frexp(centres)[1] - 1)
        starts, ends = np.clip(centres - half, self.low, self.high), np.clip(centres + half, self.low, self.high)
        known = np.stack([starts, ends], axis=1).reshape(-1)
        sums = np.cumsum(self.counts, dtype=np.float64)
        levels = np.stack([sums - self.counts, sums], axis=1).reshape(-1)
        return np.asarray(np.interp(points, known, levels))


def sketch(histogram: Histogram) -> Sketch:
    """Reduce a histogram."""
    merged = histogram.counts.reshape(2, OCTAVES, _PARTS, _MERGED).sum(axis=3)
    exponents = np.arange(OCTAVES) + histogram.top - OCTAVES + 1 - _BIAS
    middles = 1 + (np.arange(_PARTS) + 0.5) / _PARTS
    magnitudes = np.ldexp(middles[None, :], exponents[:, None]).reshape(-1)
    counts = merged.reshape(2, -1)
    values = np.concatenate([-magnitudes[::-1], magnitudes])
    held = np.concatenate([counts[1, ::-1], counts[0]])
    kept = held > 0
    return Sketch(histogram.low, histogram.high, histogram.zeros, values[kept].astype(np.float32), held[kept])


def sketch_of(value: ir.Value) -> Sketch | None:
    """The sketch that calibration left on ``value``, if it did."""
    found = value.meta.get(SKETCH_KEY)
    return found if isinstance(found, Sketch) else None
