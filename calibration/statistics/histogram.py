"""A streaming histogram on a logarithmic grid: integer counts, one pass, bounded memory, mergeable in any order.

A float32 is counted in the bucket named by its sign, its exponent and the first 10 bits of its mantissa, so buckets are
at most 1/1024 of the value wide (an int8 step at the top of a range is 8 buckets). Magnitudes more than 14 octaves
below the largest one count as zero: they are under 1/100 of the smallest int8 step. Which values those are depends
only on the final maximum, so the result is a function of the multiset of values, not of batching, order or shards.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qexport.errors import DataInvalid

MANTISSA_BITS = 10
OCTAVES = 14
_SHIFT = 23 - MANTISSA_BITS
_PER_OCTAVE = 1 << MANTISSA_BITS
_SIZE = OCTAVES * _PER_OCTAVE

Counts = NDArray[np.int64]  # [2, OCTAVES * 1024]: row 0 magnitudes of positive values, row 1 of negative ones


def _empty() -> Counts:
    return np.zeros((2, _SIZE), np.int64)


@dataclass(slots=True)
class Histogram:
    """Counts of one tensor's values over all samples.

    Attributes:
        low: Smallest value seen, 0 if none was below it.
        high: Largest value seen, 0 if none was above it.
        zeros: Count of values that are zero or too small to matter.
        top: Biased exponent of the highest octave held.
        counts: Occupied buckets, ``[2, 14 * 1024]``.
    """

    low: float = 0.0
    high: float = 0.0
    zeros: int = 0
    top: int = OCTAVES  # the lowest window begins at the smallest normal number: denormals count as zero
    counts: Counts = field(default_factory=_empty)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count ``values`` of any shape; raise ``DataInvalid`` on NaN or infinity."""
        flat = np.ascontiguousarray(values, np.float32).ravel()
        if flat.size == 0:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise DataInvalid("activation is NaN or infinite", hint="look for overflow in the model or in the sample")
        self.low, self.high = min(self.low, low), max(self.high, high)
        bits = flat.view(np.uint32)
        keys = ((bits & np.uint32(0x7FFFFFFF)) >> np.uint32(_SHIFT)).astype(np.int32)
        self._raise_top(int(keys.max()) >> MANTISSA_BITS)
        keys -= self._floor()
        kept = keys >= 0
        self.zeros += int(flat.size - np.count_nonzero(kept))
        negative = (bits >> np.uint32(31)).astype(np.int32)
        merged = (keys + negative * _SIZE)[kept]
        self.counts += np.bincount(merged, minlength=2 * _SIZE).reshape(2, _SIZE)

    def merge(self, other: Histogram) -> None:
        """Add another histogram's counts to this one."""
        theirs = Histogram(other.low, other.high, other.zeros, other.top, other.counts.copy())
        top = max(self.top, theirs.top)
        self._raise_top(top)
        theirs._raise_top(top)
        self.low, self.high = min(self.low, theirs.low), max(self.high, theirs.high)
        self.zeros += theirs.zeros
        self.counts += theirs.counts

    def table(self) -> tuple[NDArray[np.float64], Counts]:
        """Return bucket centres in rising order, with their counts; empty buckets are left out."""
        keys = np.arange(_SIZE, dtype=np.int64) + self._floor()
        edges = (keys.astype(np.uint32) << np.uint32(_SHIFT)) + np.uint32(1 << (_SHIFT - 1))
        magnitude = edges.view(np.float32).astype(np.float64)
        values = np.concatenate([-magnitude[::-1], [0.0], magnitude])
        counts = np.concatenate([self.counts[1, ::-1], [self.zeros], self.counts[0]])
        held = counts > 0
        return np.clip(values[held], self.low, self.high), counts[held]

    def magnitudes(self, count: int) -> NDArray[np.float64]:
        """How many values, zeros included, have a magnitude in each of ``count`` equal bins up to the largest one."""
        values, counts = self.table()
        top = max(-self.low, self.high)
        mass, _ = np.histogram(np.abs(values), bins=count, range=(0.0, top), weights=counts)
        return mass.astype(np.float64)

    @property
    def total(self) -> int:
        """Number of values counted."""
        return int(self.counts.sum()) + self.zeros

    def _floor(self) -> int:
        return (self.top - OCTAVES + 1) * _PER_OCTAVE

    def _raise_top(self, top: int) -> None:
        """Move the window up; what falls out at the bottom counts as zero."""
        octaves = min(top - self.top, OCTAVES)
        if octaves <= 0:
            return
        lost = octaves * _PER_OCTAVE
        self.zeros += int(self.counts[:, :lost].sum())
        self.counts[:, : _SIZE - lost] = self.counts[:, lost:].copy()
        self.counts[:, _SIZE - lost :] = 0
        self.top = top
