"""Float against result on the same samples: how close the outputs are, what the task says, which layer loses most."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.reading.batching import batches
from qexport.calibration.reading.data import Dataset, Sample, input_specs
from qexport.calibration.reading.spec import static_batch
from qexport.calibration.reading.tasks import Fold, Metric
from qexport.calibration.running.execute import open_model
from qexport.errors import DataInvalid, GateFailed, QexportError
from qexport.exporter.outcome.result import LayerQuality, OutputQuality, Quality, SampleQuality, TaskScore
from qexport.exporter.proof.layout import Feeds, Layout, Vectors, fill, find_layout
from qexport.exporter.proof.marks import without_marks
from qexport.passes.match import constant
from qexport.passes.placement import CHANNEL_AXIS
from qexport.passes.target import Target
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.session import SessionOptions

LAYER_SAMPLES = 16
TIMED_BATCH = 8
TIMED_SAMPLES = 256
WORST = 8
FOLLOWED = 4  # operators between a layer and the first value that both models name alike


@dataclass(frozen=True, slots=True)
class Judge:
    """What to compare on.

    Attributes:
        data: The samples.
        task: The metric that its labels, or running text, define; if any.
        held_out: Whether calibration has not seen them.
    """

    data: Dataset
    task: Metric | None
    held_out: bool

    def typical_batch(self, static: int | None = None) -> Feeds:
        """A batch of up to 8 samples around the median length, of ``static`` ones where the model wants that."""
        groups = list(batches(islice(self.data, TIMED_SAMPLES), static or TIMED_BATCH))
        return fill(groups[len(groups) // 2][1], static)


@dataclass(slots=True)
class _Tally:
    """Running sums of one output over batches, marks left out, and the folds of a task for both models."""

    folds: tuple[Fold, Fold] | None
    cosines: dict[int, float] = field(default_factory=dict)
    signal: float = 0.0
    noise: float = 0.0
    max_error: float = 0.0

    def add(self, indices: list[int], feeds: Feeds, a: Vectors, b: Vectors) -> None:
        one, other = without_marks(a, b)
        gap = one - other
        self.signal += float(np.square(one).sum())
        self.noise += float(np.square(gap).sum())
        self.max_error = max(self.max_error, float(np.abs(gap).max(initial=0.0)))
        self.cosines.update(zip(indices, cosine(one, other).tolist(), strict=True))
        for fold, vectors in zip(self.folds or (), (a, b), strict=False):
            fold.add(indices, feeds, vectors)

    def summary(self) -> OutputQuality:
        cosines = np.array([self.cosines[i] for i in sorted(self.cosines)])
        return OutputQuality(
            cosine_mean=float(cosines.mean()),
            cosine_worst=float(cosines.min()),
            worst_sample=int(cosines.argmin()),
            sqnr=decibel(self.signal, self.noise),
            max_error=self.max_error,
        )

    def spread(self) -> tuple[tuple[SampleQuality, ...], tuple[float, ...]]:
        """The worst samples, and the deciles of all cosines."""
        worst = sorted(self.cosines, key=lambda index: (self.cosines[index], index))[:WORST]
        deciles = np.quantile(list(self.cosines.values()), np.linspace(0, 1, 11))
        return tuple(SampleQuality(index=i, cosine=self.cosines[i]) for i in worst), tuple(map(float, deciles))


def compare(
    reference: ir.Model, result: ir.Model, judge: Judge, target: Target, advance: Callable[[int], None] = lambda n: None
) -> Quality:
    """Run both models over all samples, in padded batches of 16, and compare every output that has a row per sample.

    The main output is the first vector. Where the result leaves that one alone and changes others, it is the worst of
    those. Files for engines run with their Q/DQ nodes taken literally, which is what an engine is built from.

    Raises:
        DataInvalid: The main output of the float model holds NaN or infinity for a sample; other outputs are compared
            where they are finite. Or the labels want vectors, and samples have outputs of different sizes.
        GateFailed: The result holds NaN or infinity where the float model does not.
    """
    left, right = open_model(reference), open_model(result, _as_built(target))
    task, static = judge.task, static_batch(input_specs(reference))
    layout = find_layout(left, next(iter(judge.data)), static, task.output if task is not None else None)
    tallies = {name: _Tally(_folds(task, layout, name)) for name in layout.ranks}
    for indices, feeds in batches(judge.data, layout.samples):
        for name, (a, b) in _run_both(left, right, layout, indices, feeds).items():
            tallies[name].add(indices, feeds, a, b)
        advance(len(indices))
    outputs = {name: tally.summary() for name, tally in tallies.items()}
    main = _main(layout, tallies, outputs)
    worst, deciles = tallies[main].spread()
    return Quality(
        data=judge.data.name,
        held_out=judge.held_out,
        samples=len(tallies[main].cosines),
        output=main,
        **outputs[main].model_dump(),
        task=None if task is None else _score(task, tallies[main]),
        outputs=outputs,
        worst=worst,
        deciles=deciles,
    )


def _folds(task: Metric | None, layout: Layout, name: str) -> tuple[Fold, Fold] | None:
    """A task judges the output it names, or else the vectors and the main output: any of them may be the worst."""
    judged = {layout.main} if task is None or task.output is not None else {*layout.vectors, layout.main}
    return None if task is None or name not in judged else (task.fold(), task.fold())


def _as_built(target: Target) -> SessionOptions:
    return SessionOptions(literal=target.engine is not None)


def _run_both(
    left: OrtSession, right: OrtSession, layout: Layout, indices: list[int], feeds: Feeds
) -> dict[str, tuple[Vectors, Vectors]]:
    """Rows of both models by output; what is not finite in the float model is zero in both."""
    truth, found = (layout.run(session, feeds, len(indices)) for session in (left, right))
    pairs = {}
    for name, a in truth.items():
        b, finite = found[name], np.isfinite(a)
        if name == layout.main:
            _demand(finite, indices, DataInvalid, f"output {name!r} of the float model")
        _demand(np.isfinite(b) | ~finite, indices, GateFailed, f"output {name!r} of the result")
        pairs[name] = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
    return pairs


def _demand(finite: NDArray[np.bool_], indices: list[int], failure: type[QexportError], whose: str) -> None:
    bad = [i for i, row in zip(indices, finite, strict=True) if not row.all()]
    if bad:
        raise failure(f"{whose} holds NaN or infinity", where=f"sample {bad[0]}")


def _main(layout: Layout, tallies: dict[str, _Tally], outputs: dict[str, OutputQuality]) -> str:
    """The layout's main output; where it did not change at all, the worst of those that did, if any."""
    first = tallies[layout.main]
    alike = [name for name, tally in tallies.items() if (tally.folds is None) == (first.folds is None)]
    changed = [name for name in alike if tallies[name].noise > 0]
    if first.noise > 0 or not changed:
        return layout.main
    return min(changed, key=lambda name: outputs[name].cosine_worst)


def layer_quality(
    reference: ir.Model, result: ir.Model, nodes: Sequence[str], samples: Iterable[Sample], target: Target
) -> tuple[LayerQuality, ...]:
    """SQNR of the first output of each named node against the float model, noise of all earlier layers included.

    ``reference`` is the model before its numbers were changed; values that both models hold under the same name and in
    the same size are compared on a few samples, unpadded, with the result run as in ``compare``. Where the result has
    merged a layer with its bias and what follows, what that makes is compared. Layers that have lost units cannot be.
    """
    names = set(nodes)
    held = {value.name or "" for node in result.graph for value in node.outputs if _is_float(value)}
    found_at = {node.name or "": _named_alike(node, held) for node in reference.graph if node.name in names}
    outputs = {tensor: node for node, tensor in found_at.items() if tensor is not None}
    tensors = list(outputs)
    if not tensors:
        return ()
    rows = static_batch(input_specs(reference))
    sums = {name: [0.0, 0.0] for name in tensors}
    left, right = open_model(reference, taps=tensors), open_model(result, _as_built(target), tensors)
    for feeds in take(samples, LAYER_SAMPLES, rows):
        truth, found = left.run(feeds, tensors), right.run(feeds, tensors)
        sums = {name: sums[name] for name in sums if _alike(truth[name], found[name])}
        for name in sums:
            a, b = truth[name].astype(np.float64), found[name].astype(np.float64)
            sums[name][0] += float(np.square(a).sum())
            sums[name][1] += float(np.square(a - b).sum())
    return tuple(LayerQuality(node=outputs[name], tensor=name, sqnr=decibel(*sums[name])) for name in sums)


def _named_alike(node: ir.Node, held: Collection[str]) -> str | None:
    """The first value behind ``node``, its own output or what constants alone are joined with, that is in ``held``."""
    for _ in range(FOLLOWED):
        value = node.outputs[0]
        if value.name in held:
            return value.name
        users = set(value.consumers())
        if len(users) != 1 or value.is_graph_output():
            return None
        (node,) = users
        if node.op_type in CHANNEL_AXIS:
            return None
        if any(other is not value and other is not None and constant(other) is None for other in node.inputs):
            return None
    return None


def _alike(one: NDArray[Any], other: NDArray[Any]) -> bool:
    integers = {one.dtype.kind, other.dtype.kind} & set("iub")
    return one.shape == other.shape and not integers


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def take(samples: Iterable[Sample], count: int, rows: int | None = None) -> Iterator[Feeds]:
    """The first ``count`` samples, each as a batch of its own, of ``rows`` copies where the model wants that many."""
    for sample in islice(samples, count):
        yield fill({name: array[None] for name, array in sample.items()}, rows)


def cosine(a: Vectors, b: Vectors) -> Vectors:
    """Cosine of each row of ``a`` with the same row of ``b``; 1 for equal rows, of zero too; NaN where not finite."""
    equal = (a == b).all(axis=1).astype(np.float64)
    with np.errstate(invalid="ignore"):
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        products = (a * b).sum(axis=1)
        found: Vectors = np.where(norms > 0, products / np.where(norms > 0, norms, 1.0), equal)
    return found


def decibel(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``, within 200 either way."""
    if noise == np.inf:
        return -200.0
    return float(min(200.0, 10 * np.log10(max(signal, 1e-30) / max(noise, 1e-30))))


def _score(task: Metric, tally: _Tally) -> TaskScore:
    assert tally.folds is not None
    reference, result = tally.folds
    before, after = reference.score(), result.score()
    drop = before - after if task.better == "higher" else after - before
    one, other = reference.predictions(), result.predictions()
    unchanged = None if one is None else float(np.mean(one == other))
    return TaskScore(name=task.name, better=task.better, reference=before, result=after, drop=drop, unchanged=unchanged)
