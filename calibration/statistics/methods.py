"""From a histogram to a range: each method is a function, the table gives them their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qexport.passes.numbers.formats import FORMATS, Kind
from qexport.passes.numbers.range import Range, integers_for


class Seen(Protocol):
    """The values of one tensor, counted: a ``Histogram`` or a ``Sketch``."""

    @property
    def low(self) -> float:
        """Smallest value seen, 0 if none was below it."""

    @property
    def high(self) -> float:
        """Largest value seen, 0 if none was above it."""

    def table(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Values in rising order, with their counts."""

    def magnitudes(self, count: int) -> NDArray[np.float64]:
        """How many have a magnitude in each of ``count`` equal bins up to the largest one; zeros may be left out."""


Method = Callable[[Seen, Kind], Range]

PERCENTILE = 99.999
LEVELS = 128  # about as many magnitudes as 8 bits tell apart
BINS = 2048


def minmax(histogram: Seen, kind: Kind) -> Range:
    """The extremes that were seen: nothing is clipped."""
    del kind
    return Range(histogram.low, histogram.high)


def percentile(histogram: Seen, kind: Kind) -> Range:
    """Clip the share of values beyond the 99.999th percentile, of magnitudes where there is no zero point."""
    values, counts = histogram.table()
    share = PERCENTILE / 100
    if not FORMATS[kind].affine:
        reach = _quantile(np.abs(values), counts, share)
        return Range(max(histogram.low, -reach), min(histogram.high, reach))
    return Range(min(0.0, -_quantile(-values, counts, share)), max(0.0, _quantile(values, counts, share)))


def entropy(histogram: Seen, kind: Kind) -> Range:
    """The clip with the least Kullback-Leibler divergence from float to 8 bits (Migacz 2017, "8-bit inference")."""
    top = max(-histogram.low, histogram.high)
    if top == 0.0:
        return minmax(histogram, kind)
    mass = histogram.magnitudes(BINS)
    mass[0] = mass[1]  # exact zeros are represented exactly at any clip and must not decide it
    edges = FORMATS[kind].edges
    tails = np.concatenate([np.cumsum(mass[::-1])[::-1], [0.0]])
    scores = {bins: _divergence(mass[:bins], tails[bins], edges) for bins in range(LEVELS, BINS + 1, LEVELS // 8)}
    reach = min(scores, key=lambda bins: scores[bins]) * top / BINS
    return Range(max(histogram.low, -reach), min(histogram.high, reach))


def mse(histogram: Seen, kind: Kind) -> Range:
    """The clip with the least squared error through the quantizer itself, rounding and clipping together.

    Floating numbers are also tried at ranges beyond the extremes, where they may fall better on their grid.
    """
    values, counts = histogram.table()
    stretches = FORMATS[kind].stretches

    def clipped(share: float) -> Range:
        return Range(histogram.low * share, histogram.high * share)

    def least(shares: NDArray[np.float64]) -> float:
        return float(min(shares, key=lambda share: squared_error(values, counts, clipped(share), kind)))

    coarse = least(np.concatenate([np.linspace(1.0, 0.2, 17), stretches[1:]]))
    return clipped(least(np.linspace(min(stretches[-1], coarse + 0.04), coarse - 0.04, 9)))


def squared_error(values: NDArray[np.float64], counts: NDArray[np.int64], span: Range, kind: Kind) -> float:
    """Sum over all values of the squared difference between ``x`` and its dequantized number."""
    return float(counts @ np.square(integers_for(span, kind).apply(values) - values))


METHODS: dict[str, Method] = {"minmax": minmax, "percentile": percentile, "entropy": entropy, "mse": mse}


def _quantile(values: NDArray[np.float64], counts: NDArray[np.int64], share: float) -> float:
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(counts[order]) >= share * counts.sum()
    return float(values[order][int(np.argmax(reached))])


def _divergence(kept: NDArray[np.float64], tail: float, shares: NDArray[np.float64]) -> float:
    """KL(P || Q): P is the clipped histogram with the tail in its last bin, Q the same through the levels."""
    reference = kept.copy()
    reference[-1] += tail
    edges = np.unique((shares * kept.size).astype(int))  # a level narrower than a bin is exact
    sums = np.add.reduceat(kept, edges[:-1])
    filled = np.add.reduceat((kept > 0).astype(float), edges[:-1])
    level = np.repeat(np.divide(sums, filled, out=np.zeros_like(sums), where=filled > 0), np.diff(edges))
    candidate = np.where(kept > 0, level, 0.0)
    p, q = reference / max(reference.sum(), 1.0), candidate / max(candidate.sum(), 1.0)
    known = p > 0
    return float(np.sum(p[known] * np.log(p[known] / np.maximum(q[known], 1e-12))))
