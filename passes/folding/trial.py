"""How well a static 8-bit quantizer would do on what products read, if each channel had another scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from qexport.passes.folding.activation import Activation
from qexport.passes.numbers.formats import FORMATS, Format, Kind

Rule = Callable[[NDArray[np.float32]], NDArray[np.float64]]
"""The largest magnitude of each channel -> its scale, ``[K]``."""

ROWS = 256  # that are tried, where more are known
TAIL = 0.02  # share of the rows that count as the worst
CLIPS = (1.0, 0.85, 0.7, 0.55)  # shares of the range that the quantizer may choose from, besides what its steps allow


class Trial:
    """One value and the kernels that read it.

    Args:
        known: What was seen of the value.
        weights: Kernels, each ``[K, N]``.
        headroom: How far beyond the rows it is taken from the range reaches.
        kind: The numbers of the value, symmetric ones; they say what those of the kernels are.
    """

    def __init__(
        self, known: Activation, weights: Sequence[NDArray[np.float32]], headroom: float, kind: Kind = "int8"
    ) -> None:
        rows = known.rows[:: max(1, len(known.rows) // ROWS)]
        self._halves = rows[::2], rows[1::2]
        self._weights = weights
        self._headroom = headroom
        self._numbers = FORMATS[kind]
        self._truths = [[half @ w for w in weights] for half in self._halves]
        self._power = [max(float(np.square(y).sum(axis=1).mean()), 1e-30) for y in map(np.hstack, self._truths)]

    def error(self, rule: Rule) -> float:
        """Relative squared output error over rows that neither scales nor range were taken from.

        Mean plus mean of the worst. ``rule`` makes the scales from the largest magnitude of each channel; it is given
        that of one half of the rows and judged by the other, so that what suits the rows it saw only does not count.
        """
        total, even = 0.0, len(self._numbers.stretches) == 1
        for one, other in ((0, 1), (1, 0)):
            magnitudes = np.abs(self._halves[one])
            s = rule(magnitudes.max(axis=0, initial=0.0)).astype(np.float32)
            reach = float((magnitudes / s).max(initial=1e-30)) * self._headroom
            stored = [_rounded(w * s[:, None], FORMATS[self._numbers.weight]) for w in self._weights]
            best = np.inf
            for clip in (*CLIPS, *self._numbers.stretches[1:]):
                found = self._clipped(self._halves[other] / s, reach * clip, stored, other)
                if even and not found < best:
                    break  # clipping more only gets worse from here
                best = min(best, found)
            total += best
        return total / 2

    def _clipped(self, x: NDArray[np.float32], reach: float, stored: list[NDArray[np.float32]], half: int) -> float:
        step = np.float32(reach / self._numbers.reach)
        rounded = np.clip(self._numbers.nearest(x / step), *self._numbers.limits) * step
        noise = np.zeros(len(x))
        for w, truth in zip(stored, self._truths[half], strict=True):
            noise += np.square(rounded @ w - truth).sum(axis=1)
        worst = np.sort(noise)[-max(1, int(TAIL * len(noise))) :]
        return float((noise.mean() + worst.mean()) / self._power[half])


def _rounded(w: NDArray[np.float32], numbers: Format) -> NDArray[np.float32]:
    """A kernel with the absmax scale of each column; to search that too takes eight times as long and tells no more."""
    most = np.abs(w).max(axis=0, initial=0.0) / np.float32(numbers.reach)
    steps = np.where(most > 0, most, np.float32(1.0))
    return np.asarray(numbers.nearest(w / steps) * steps, np.float32)
