"""A few samples to look at layers with: spread over the data, with the labels that are theirs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qexport.calibration.reading.batching import batches
from qexport.calibration.reading.data import Sample
from qexport.calibration.reading.tasks import Metric, Perplexity, Spearman, Top1
from qexport.exporter.proof.layout import Feeds
from qexport.exporter.proof.quality import Judge

BATCH = 8  # samples that run together: what layers read is held for as many


@dataclass(frozen=True, slots=True)
class Excerpt:
    """Some samples of a judge's data.

    Attributes:
        samples: The samples.
        task: The task of their labels, if there is one that can be judged on a part.
        static: The batch size that the model fixes, if it does.
    """

    samples: tuple[Sample, ...]
    task: Metric | None
    static: int | None = None

    @property
    def output(self) -> str | None:
        """Name of the output that the task judges, where it says so."""
        return None if self.task is None else self.task.output

    def batches(self) -> Iterator[tuple[list[int], Feeds]]:
        """Samples of alike lengths together, padded, with their positions."""
        return batches(self.samples, self.static or BATCH)


def take_excerpt(judge: Judge, count: int, static: int | None = None) -> Excerpt:
    """Return about ``count`` samples, evenly spread; pairs stay together."""
    task = judge.task
    if isinstance(task, Spearman):
        pairs = len(task.scores)
        chosen = _spread(pairs, count // 2)
        scores = task.scores[chosen]
        ranked = Spearman(scores) if np.ptp(scores) > 0 else None
        return Excerpt(_read(judge, np.concatenate([chosen, chosen + pairs])), ranked, static)
    wanted = _spread(len(judge.data), count)
    part: Metric | None = task if isinstance(task, Perplexity) else None
    return Excerpt(_read(judge, wanted), Top1(task.labels[wanted]) if isinstance(task, Top1) else part, static)


def _spread(size: int, count: int) -> NDArray[np.intp]:
    return np.unique(np.linspace(0, size - 1, min(size, max(count, 1))).round().astype(np.intp))


def _read(judge: Judge, wanted: NDArray[np.intp]) -> tuple[Sample, ...]:
    """The samples at the wanted positions, in that order, in one pass."""
    places = set(wanted.tolist())
    found = {i: sample for i, sample in enumerate(judge.data) if i in places}
    return tuple(found[i] for i in wanted.tolist())
