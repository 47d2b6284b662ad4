"""Held-out data with the task its labels define."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qexport.calibration.reading.arrays import read_labels
from qexport.calibration.reading.data import FileDataset, open_source, survey
from qexport.calibration.reading.given import Data, as_data, name_of
from qexport.calibration.reading.spec import DataSpec, InputSpec, Source
from qexport.calibration.reading.tasks import Metric, Perplexity, Spearman, Task, Top1
from qexport.calibration.reading.text import PAIR, SCORE, TextSource, first_record, read_scores
from qexport.calibration.reading.windows import WindowSource
from qexport.errors import DataInvalid


@dataclass(frozen=True)
class Evaluation:
    """Samples and, where they carry labels, the task that judges the outputs for them."""

    dataset: FileDataset
    task: Metric | None


def open_evaluation(
    path: Data, inputs: tuple[InputSpec, ...], spec: DataSpec, *, tokenizer: Path | None = None
) -> Evaluation:
    """Open evaluation data: every sample counts, equal ones too, and ``spec.max_samples`` does not.

    Pairs with a score become all first sentences, then all second ones, with ``Spearman``; arrays or pixels with
    ``labels`` have ``Top1``, windows of running text ``Perplexity``; everything else has no task. Arguments and errors
    are those of ``open_dataset``.
    """
    data = as_data(path)
    source = open_source(data, inputs, spec, tokenizer)
    dataset = survey(source, name_of(data), distinct=False)
    return Evaluation(dataset, _task(source, dataset))


def _task(source: Source, dataset: FileDataset) -> Metric | None:
    if isinstance(source, WindowSource):
        return Perplexity()
    return _pair_task(source) if isinstance(source, TextSource) else _class_task(source, dataset)


def _pair_task(source: TextSource) -> Task | None:
    path = source.files[0]
    if source.columns != PAIR or SCORE not in first_record(path):
        return None
    scores = read_scores(path)
    if scores.min() == scores.max():
        raise DataInvalid(f"all {len(scores)} scores are {scores[0]:g}, no rank can be told from them", where=str(path))
    return Spearman(scores)


def _class_task(source: Source, dataset: FileDataset) -> Task | None:
    labels = getattr(source, "labels", None)
    return None if labels is None else Top1(read_labels(labels, len(dataset), str(source.files[0])))
