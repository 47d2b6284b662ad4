"""Float against result on the same samples: how close the outputs are, what the task says, which layer loses most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.batching import batches
from qexport.calibration.data import Dataset, Sample
from qexport.calibration.execute import open_model
from qexport.calibration.spec import MASK
from qexport.calibration.tasks import Task
from qexport.errors import DataInvalid, GateFailed, QexportError
from qexport.exporter.result import LayerQuality, Quality, TaskScore
from qexport.passes.target import Target
from qexport.runtime.session import SessionOptions

BATCH = 32
LAYER_SAMPLES = 16
TIMED_BATCH = 8
TIMED_SAMPLES = 256
NOT_FINITE: dict[str, type[QexportError]] = {"float model": DataInvalid, "result": GateFailed}
Vectors = NDArray[np.float64]  # [samples of a batch, everything else flattened]


@dataclass(frozen=True, slots=True)
class Judge:
    """What to compare on.

    Attributes:
        data: The samples.
        task: The metric its labels define, if any.
        held_out: Whether calibration has not seen them.
    """

    data: Dataset
    task: Task | None
    held_out: bool

    def typical_batch(self) -> dict[str, NDArray[Any]]:
        """A batch of up to 8 samples around the median length."""
        groups = list(batches(islice(self.data, TIMED_SAMPLES), TIMED_BATCH))
        return groups[len(groups) // 2][1]


@dataclass(slots=True)
class _Tally:
    """Running sums over batches; outputs themselves are kept only for a task."""

    cosines: dict[int, float] = field(default_factory=dict)
    signal: float = 0.0
    noise: float = 0.0
    max_error: float = 0.0

    def add(self, indices: list[int], a: Vectors, b: Vectors) -> None:
        gap = a - b
        self.signal += float(np.square(a).sum())
        self.noise += float(np.square(gap).sum())
        self.max_error = float(np.maximum(self.max_error, np.abs(gap).max(initial=0.0)))  # NaN stays NaN
        self.cosines.update(zip(indices, cosine(a, b).tolist(), strict=True))


def compare(
    reference: ir.Model, result: ir.Model, judge: Judge, target: Target, advance: Callable[[int], None] = lambda n: None
) -> Quality:
    """Run both models over all samples, padded batches of 32, and compare the main output.

    Files for engines run with their Q/DQ nodes taken literally, which is what an engine is built from.

    Raises:
        DataInvalid: The float model itself yields NaN or infinity for a sample.
        GateFailed: The result does.
    """
    output = main_output(reference)
    left, right = open_model(reference), open_model(result, SessionOptions(literal=target.engine is not None))
    tally = _Tally()
    kept: tuple[dict[int, Vectors], dict[int, Vectors]] = ({}, {})
    for indices, feeds in batches(judge.data, BATCH):
        pair = [_vectors(session.run(feeds, [output])[output], feeds) for session in (left, right)]
        for vectors, (whose, failure) in zip(pair, NOT_FINITE.items(), strict=True):
            bad = [i for i, row in zip(indices, vectors, strict=True) if not np.isfinite(row).all()]
            if bad:
                raise failure(f"output {output!r} of the {whose} holds NaN or infinity", where=f"sample {bad[0]}")
        tally.add(indices, pair[0], pair[1])
        if judge.task is not None:
            for store, vectors in zip(kept, pair, strict=True):
                store.update(zip(indices, vectors, strict=True))
        advance(len(indices))
    cosines = np.array([tally.cosines[i] for i in sorted(tally.cosines)])
    return Quality(
        data=judge.data.name,
        held_out=judge.held_out,
        samples=len(cosines),
        output=output,
        cosine_mean=float(cosines.mean()),
        cosine_worst=float(cosines.min()),
        worst_sample=int(cosines.argmin()),
        sqnr=decibel(tally.signal, tally.noise),
        max_error=tally.max_error,
        task=None if judge.task is None else _score(judge.task, *map(_stack, kept)),
    )


def layer_quality(
    reference: ir.Model, result: ir.Model, nodes: Sequence[str], samples: Iterable[Sample]
) -> tuple[LayerQuality, ...]:
    """SQNR of the first output of each named node against the float model, noise of all earlier layers included.

    ``reference`` is the model before its numbers were changed; values that both models hold under the same name are
    compared on a few samples, unpadded.
    """
    names = set(nodes)
    outputs = {node.outputs[0].name or "": node.name or "" for node in reference.graph if node.name in names}
    held = {value.name for node in result.graph for value in node.outputs}
    tensors = [name for name in outputs if name in held]
    if not tensors:
        return ()
    sums = {name: [0.0, 0.0] for name in tensors}
    left, right = open_model(reference, taps=tensors), open_model(result, taps=tensors)
    for feeds in take(samples, LAYER_SAMPLES):
        truth, found = left.run(feeds, tensors), right.run(feeds, tensors)
        for name in tensors:
            a, b = truth[name].astype(np.float64), found[name].astype(np.float64)
            sums[name][0] += float(np.square(a).sum())
            sums[name][1] += float(np.square(a - b).sum())
    return tuple(LayerQuality(node=outputs[name], tensor=name, sqnr=decibel(*sums[name])) for name in tensors)


def main_output(model: ir.Model) -> str:
    """The output to judge by: the first one with two axes, such as an embedding or logits, else the first."""
    for value in model.graph.outputs:
        if value.shape is not None and len(value.shape) == 2:
            return value.name or ""
    return model.graph.outputs[0].name or ""


def take(samples: Iterable[Sample], count: int) -> Iterator[dict[str, NDArray[Any]]]:
    """The first ``count`` samples as batches of one."""
    for _, sample in zip(range(count), samples, strict=False):
        yield {name: array[None] for name, array in sample.items()}


def cosine(a: Vectors, b: Vectors) -> Vectors:
    """Cosine of each row of ``a`` with the same row of ``b``; equal rows give 1, also two zero rows."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products = (a * b).sum(axis=1)
    equal = (a == b).all(axis=1).astype(np.float64)
    found: Vectors = np.where(norms > 0, products / np.where(norms > 0, norms, 1.0), equal)
    return found


def decibel(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``, at most 200."""
    return float(min(200.0, 10 * np.log10(max(signal, 1e-30) / max(noise, 1e-30))))


def _vectors(output: NDArray[Any], feeds: Mapping[str, NDArray[Any]]) -> Vectors:
    """Flatten all but the batch axis; positions that the attention mask hides are set to zero."""
    values = np.asarray(output, np.float64)
    mask = feeds.get(MASK)
    if mask is not None and values.ndim >= 3 and values.shape[:2] == mask.shape:
        values = values * mask.reshape(*mask.shape, *[1] * (values.ndim - 2))
    return values.reshape(values.shape[0], -1)


def _stack(rows: dict[int, Vectors]) -> Vectors:
    return np.stack([rows[i] for i in sorted(rows)])


def _score(task: Task, reference: Vectors, result: Vectors) -> TaskScore:
    before, after = task.score(reference), task.score(result)
    choices = task.predictions(reference), task.predictions(result)
    unchanged = None if choices[0] is None else float(np.mean(choices[0] == choices[1]))
    return TaskScore(name=task.name, reference=before, result=after, drop=before - after, unchanged=unchanged)
