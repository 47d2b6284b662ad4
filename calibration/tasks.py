"""Task metrics, in points: what a model's outputs are worth, judged by labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qexport.errors import BuildFailed, DataInvalid


class Task(Protocol):
    """Judges the outputs of all samples of an evaluation, in their order."""

    @property
    def name(self) -> str:
        """What a report calls the metric."""

    def score(self, outputs: NDArray[Any]) -> float:
        """Return the metric in points, 100 the best; ``outputs`` is ``[samples, ...]``."""

    def predictions(self, outputs: NDArray[Any]) -> NDArray[np.int64] | None:
        """Return one decision per sample, or ``None`` where the task makes none."""


@dataclass(frozen=True, eq=False)
class Spearman:
    """Rank correlation between human scores and the cosine of two sentence embeddings, times 100.

    Attributes:
        scores: One score per pair; the samples are all first sentences, then all second ones.
    """

    scores: NDArray[np.float64]
    name: str = "spearman"

    def score(self, outputs: NDArray[Any]) -> float:
        """Correlate; 0 where all cosines are equal. A zero embedding has cosine 0 with everything."""
        vectors = _rows(outputs, 2 * len(self.scores))
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        units = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
        first, second = np.split(units, 2)
        return 100 * spearman((first * second).sum(axis=1), self.scores)

    def predictions(self, outputs: NDArray[Any]) -> None:
        """Decide nothing."""
        return


@dataclass(frozen=True, eq=False)
class Top1:
    """Share of samples whose largest output is at the label, times 100.

    Attributes:
        labels: Class index per sample.
    """

    labels: NDArray[np.int64]
    name: str = "top1"

    def score(self, outputs: NDArray[Any]) -> float:
        """Count the right ones; ``outputs`` is ``[samples, classes]``, further axes of size 1 are ignored.

        Raises:
            DataInvalid: A label is not one of the classes.
        """
        classes = _rows(outputs, len(self.labels)).shape[1]
        if self.labels.max() >= classes:
            raise DataInvalid(f"label {self.labels.max()} does not exist, the model has {classes} classes")
        return 100 * float(np.mean(self.predictions(outputs) == self.labels))

    def predictions(self, outputs: NDArray[Any]) -> NDArray[np.int64]:
        """Return the class with the largest output, the first one of equals."""
        best: NDArray[np.int64] = _rows(outputs, len(self.labels)).argmax(axis=1)
        return best


def spearman(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Spearman's rho: Pearson's correlation of average ranks; 0 where one side is constant."""
    a, b = (ranks - ranks.mean() for ranks in (average_ranks(one), average_ranks(other)))
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / spread if spread > 0 else 0.0


def average_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return ranks


def _rows(outputs: NDArray[Any], count: int) -> NDArray[np.float64]:
    """``[samples, features]`` in float64.

    Raises:
        DataInvalid: There is not one output per sample.
        BuildFailed: An output is NaN or Inf.
    """
    if outputs.ndim == 0 or len(outputs) != count:
        raise DataInvalid(f"expected {count} outputs, one per sample, found the shape {outputs.shape}")
    rows = outputs.reshape(count, -1).astype(np.float64)
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=1)).sum())
        raise BuildFailed(f"the outputs of {bad} of {count} samples hold NaN or Inf")
    return rows
