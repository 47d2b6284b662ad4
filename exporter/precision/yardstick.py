"""How far outputs are from those of float, on a few samples: what every comparison of layers is measured with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from qexport.calibration.reading.tasks import Fold, Metric
from qexport.exporter.proof.layout import Feeds, Vectors
from qexport.exporter.proof.marks import without_marks
from qexport.exporter.proof.quality import cosine, decibel


@dataclass(frozen=True, slots=True)
class Score:
    """Outputs against those of float.

    Attributes:
        error: Squared error over squared signal; infinite where an output is not finite.
        cosine_mean: Mean cosine over the samples.
        cosine_worst: The smallest.
        drop: How much of the task metric is lost; NaN where an output is not finite.
    """

    error: float
    cosine_mean: float
    cosine_worst: float
    drop: float | None = None

    @property
    def sqnr(self) -> float:
        """Signal over noise of the output, dB."""
        return decibel(1.0, self.error)


@dataclass(slots=True)
class Tally:
    """Running sums over batches.

    Attributes:
        task: The metric to score by.
    """

    task: Metric | None = None
    signal: float = 0.0
    noise: float = 0.0
    _cosines: list[float] = field(default_factory=list)
    _folds: list[Fold] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.task is not None:
            self._folds = [self.task.fold(), self.task.fold()]

    def add(self, indices: list[int], feeds: Feeds, truth: Vectors, found: Vectors) -> None:
        """Take in one batch: rows of the float model and of what is measured."""
        one, other = without_marks(truth, found)
        self.signal += float(np.square(one).sum())
        self.noise += float(np.square(other - one).sum())
        self._cosines += cosine(one, other).tolist()
        for fold, rows in zip(self._folds, (truth, found), strict=False):
            fold.add(indices, feeds, rows)

    def score(self) -> Score:
        """The numbers of all batches."""
        error = self.noise / max(self.signal, 1e-30) if math.isfinite(self.noise) else math.inf
        drop = None if self.task is None or math.isfinite(error) else math.nan
        if self.task is not None and math.isfinite(error):
            reference, result = (fold.score() for fold in self._folds)
            drop = reference - result if self.task.better == "higher" else result - reference
        return Score(error, float(np.mean(self._cosines)), float(np.min(self._cosines)), drop)
