"""How far outputs are from those of float, on a few samples: what every comparison of layers is measured with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from qexport.calibration.tasks import Task
from qexport.exporter.layout import Vectors
from qexport.exporter.quality import cosine, decibel


@dataclass(frozen=True, slots=True)
class Score:
    """Outputs against those of float.

    Attributes:
        error: Squared error over squared signal.
        cosine_mean: Mean cosine over the samples.
        cosine_worst: The smallest.
        drop: Points of the task metric that are lost.
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
    """Running sums over batches; rows are kept for a task only.

    Attributes:
        task: The task to score by.
    """

    task: Task | None = None
    signal: float = 0.0
    noise: float = 0.0
    _cosines: list[float] = field(default_factory=list)
    _truth: dict[int, Vectors] = field(default_factory=dict)
    _found: dict[int, Vectors] = field(default_factory=dict)

    def add(self, indices: list[int], truth: Vectors, found: Vectors) -> None:
        """Take in one batch: rows of the float model and of what is measured."""
        self.signal += float(np.square(truth).sum())
        self.noise += float(np.square(found - truth).sum())
        self._cosines += cosine(truth, found).tolist()
        if self.task is not None:
            self._truth.update(zip(indices, truth, strict=True))
            self._found.update(zip(indices, found, strict=True))

    def score(self) -> Score:
        """The numbers of all batches."""
        error = self.noise / max(self.signal, 1e-30)
        drop = None
        if self.task is not None:
            drop = _points(self.task, self._truth) - _points(self.task, self._found)
        return Score(error, float(np.mean(self._cosines)), float(np.min(self._cosines)), drop)


def _points(task: Task, rows: Mapping[int, Vectors]) -> float:
    return task.score(np.stack([rows[i] for i in sorted(rows)]))
