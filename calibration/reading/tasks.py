"""Task metrics: what a model's outputs are worth, judged by labels or by the text itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.errors import BuildFailed, DataInvalid
from qexport.passes.portable import IDS, LOGITS, MASK

Feeds: TypeAlias = Mapping[str, NDArray[Any]]  # input name to [batch, ...]
Better: TypeAlias = Literal["higher", "lower"]

MOST_NATS = 700.0  # mean loss beyond which its exponential is no number


class Fold(Protocol):
    """Takes in the outputs of one model batch by batch, and keeps no more of them than the metric needs."""

    def add(self, indices: Sequence[int], feeds: Feeds, outputs: NDArray[Any]) -> None:
        """Take in one batch: positions of the samples, what the model read, its output ``[samples, ...]``."""

    def score(self) -> float:
        """Return the metric over everything that was taken in."""

    def predictions(self) -> NDArray[np.int64] | None:
        """Return all decisions, in an order that follows from the batches; ``None`` where the task makes none."""


class Metric(Protocol):
    """Judges the outputs of a model on an evaluation."""

    @property
    def name(self) -> str:
        """What a report calls the metric."""

    @property
    def better(self) -> Better:
        """Which way it is better."""

    @property
    def output(self) -> str | None:
        """Name of the output it judges; ``None`` leaves the choice to the layout."""

    def fold(self) -> Fold:
        """Return an empty fold."""


class Task(Metric, Protocol):
    """A metric in points, 100 the best, of one row per sample."""

    def score(self, outputs: NDArray[Any]) -> float:
        """Return the metric; ``outputs`` is ``[samples, ...]``, all of them in their order."""

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
    better: Better = "higher"
    output: str | None = None

    def fold(self) -> Fold:
        """Keep the rows."""
        return Rows(self)

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
    better: Better = "higher"
    output: str | None = None

    def fold(self) -> Fold:
        """Keep the rows."""
        return Rows(self)

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


@dataclass(slots=True)
class Rows:
    """Keeps one row per sample for a task that judges them together.

    Attributes:
        task: The task.
        rows: Position of a sample to its row.
    """

    task: Task
    rows: dict[int, NDArray[Any]] = field(default_factory=dict)

    def add(self, indices: Sequence[int], _feeds: Feeds, outputs: NDArray[Any]) -> None:
        """Keep the rows of one batch."""
        self.rows.update(zip(indices, outputs, strict=True))

    def score(self) -> float:
        """Judge all rows in the order of the samples."""
        return self.task.score(self._stack())

    def predictions(self) -> NDArray[np.int64] | None:
        """One decision per sample, in their order."""
        return self.task.predictions(self._stack())

    def _stack(self) -> NDArray[Any]:
        sizes = {row.shape for row in self.rows.values()}
        if len(sizes) > 1:
            counts = [math.prod(size) for size in sizes]
            raise DataInvalid(
                f"the labels want one vector per sample, the output has from {min(counts)} to {max(counts)} numbers",
                hint="judge without labels, or export the model with an output of two axes",
            )
        return np.stack([self.rows[i] for i in sorted(self.rows)])


@dataclass(frozen=True, eq=False)
class Perplexity:
    """Exponential of the mean loss, in nats, of every token given those before it in its window (Jelinek et al. 1977).

    The first token of a window is not judged, and neither is what stands at a masked position or behind one.
    """

    name: str = "perplexity"
    better: Better = "lower"
    output: str | None = LOGITS

    def fold(self) -> Fold:
        """Keep running sums, and the best token of every position."""
        return Losses()


@dataclass(slots=True)
class Losses:
    """Sum of the losses of tokens.

    Attributes:
        total: In nats.
        count: How many tokens.
        best: Per batch, the token with the largest logit at every judged position.
    """

    total: float = 0.0
    count: int = 0
    best: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, indices: Sequence[int], feeds: Feeds, outputs: NDArray[Any]) -> None:
        """Take in ``outputs``, ``[samples, sequence * vocabulary]`` or with the last two axes apart.

        Raises:
            DataInvalid: They are no logits over a vocabulary that holds the tokens.
        """
        ids = np.asarray(feeds[IDS], np.int64)
        vocabulary, rest = divmod(outputs.size, ids.size)
        if rest or vocabulary <= ids.max() or len(indices) != len(ids):
            raise DataInvalid(
                f"{len(indices)} samples of {ids.shape[1]} tokens up to {ids.max()} have outputs {outputs.shape}, "
                "which are no logits over a vocabulary",
                hint="set data.windows to false to read texts line by line, without a task",
            )
        real = np.asarray(feeds.get(MASK, np.ones_like(ids))) != 0
        judged = real[:, 1:] & real[:, :-1]
        logits = outputs.reshape(*ids.shape, vocabulary)[:, :-1][judged].astype(np.float64, copy=False)
        losses = token_losses(logits, ids[:, 1:][judged])
        self.total, self.count = self.total + float(losses.sum()), self.count + losses.size
        self.best.append(logits.argmax(axis=-1))

    def score(self) -> float:
        """Perplexity, from 1 up.

        Raises:
            DataInvalid: No token was judged.
        """
        if not self.count:
            raise DataInvalid("no window has two tokens, perplexity judges from the second one on")
        return math.exp(min(self.total / self.count, MOST_NATS))

    def predictions(self) -> NDArray[np.int64]:
        """The token with the largest logit, of every judged position."""
        return np.concatenate(self.best)


def token_losses(logits: NDArray[np.float64], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """``-log softmax(logits)`` at the tokens, in nats: ``[n, vocabulary]`` and ``[n]`` to ``[n]``."""
    top = logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(logits, tokens[:, None], axis=-1)
    losses: NDArray[np.float64] = np.log(np.exp(logits - top).sum(axis=-1)) - (chosen - top)[:, 0]
    return losses


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
