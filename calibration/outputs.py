"""The range of a value that is quantized for what makes it, not for a product that reads it.

What reads it mostly normalizes each position by itself, as residual streams do, so each row counts by its own error.
Sentence encoders have a few rows with values a hundred times the others: a range that holds them leaves nothing of all
other rows (MiniLM's second products of feed-forward networks: 9 to 19 dB a row, and 12 to 24 dB as chosen here).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qexport.calibration.layers import sqnr
from qexport.calibration.statistics.collect import Statistics
from qexport.passes.numbers.formats import FORMATS, Kind
from qexport.passes.numbers.range import Range, integers_for

SHARES = np.geomspace(0.02, 1.0, 36)  # of the extremes; of neighbours the larger one is a ninth more
QUIET = 0.01  # share of the middle row's power that is added to every row's, so that rows of nothing do not decide
Floats = NDArray[np.float32]


def least_row_error(known: Statistics, kind: Kind) -> Range | None:
    """The range with the least mean relative error of rows, ``None`` where no row was kept."""
    rows = _rows(known)
    if not rows.size:
        return None
    low, high = known.histogram.low, known.histogram.high
    spans = [Range(low * share, high * share) for share in (*SHARES, *FORMATS[kind].stretches[1:])]
    return min(spans, key=lambda span: _error(rows, span, kind))


def signal(known: Statistics, span: Range, kind: Kind) -> float | None:
    """Mean signal over quantization noise of rows in dB, ``None`` where no row was kept."""
    rows = _rows(known)
    return sqnr(_error(rows, span, kind)) if rows.size else None


def _rows(known: Statistics) -> Floats:
    pieces = known.excerpts.stacked()
    return np.concatenate([piece.reshape(-1, piece.shape[-1]) for piece in pieces]) if pieces else np.zeros((0, 0), "f")


def _error(rows: Floats, span: Range, kind: Kind) -> float:
    power = np.square(rows, dtype=np.float64).sum(axis=1)
    error = np.square(integers_for(span, kind).apply(rows) - rows, dtype=np.float64).sum(axis=1)
    return float((error / (power + QUIET * np.median(power) + 1e-30)).mean())
