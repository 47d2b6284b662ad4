"""Each layer quantized alone: what that costs at the output, measured and estimated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import onnx_ir as ir

from qexport.calibration.reading.tasks import spearman
from qexport.exporter.precision.excerpt import Excerpt
from qexport.exporter.precision.fisher import fisher
from qexport.exporter.precision.probe import Error, Port, Probe, side_by_side
from qexport.exporter.precision.yardstick import Score, Tally
from qexport.exporter.product import Product
from qexport.exporter.proof.layout import Feeds, Vectors
from qexport.passes.match import constant
from qexport.passes.pipeline import run
from qexport.passes.target import Target

FISHER_BATCHES = 2
Groups = Sequence[Sequence[str]]


def only_quantized(product: Product) -> ir.Model:
    """The model with nothing but the quantizing passes run over it: what it loses by them alone."""
    assert product.snapshot is not None
    model, _ = run(product.snapshot.model, [step for step in product.snapshot.steps if step[1].quantizes])
    return model


def open_probe(product: Product, excerpt: Excerpt, target: Target) -> Probe:
    """A probe of every layer that the product's recipe quantizes."""
    assert product.snapshot is not None
    return Probe(product.snapshot.model, only_quantized(product), product.quantized, excerpt, target)


def measure_groups(probe: Probe, groups: Groups, advance: Callable[[int], None] = lambda n: None) -> list[Score]:
    """Return the score of each group of layers with the errors of these layers injected, and of no others.

    A group of one is exactly that layer quantized alone. In larger ones each layer's error is that of its float input,
    which leaves out what the layers of the group do to each other. Groups share no layer.
    """
    tallies = [Tally(probe.excerpt.task) for _ in groups]
    place = {node: number for number, group in enumerate(groups) for node in group}
    present = {place[port.node] for port in probe.ports if port.node in place}
    for indices, feeds in probe.batches():
        truth = probe.rows(feeds, len(indices))

        def run_one(
            job: tuple[int, dict[Port, Error]], feeds: Feeds = feeds, count: int = len(indices)
        ) -> tuple[int, Vectors]:
            return job[0], probe.rows(feeds, count, job[1])

        for number, found in side_by_side(run_one, _complete(probe, feeds, place)):
            tallies[number].add(indices, feeds, truth, found)
        for number in set(range(len(groups))) - present:  # nothing of these can be measured
            tallies[number].add(indices, feeds, truth, truth)
        advance(len(indices))
    return [tally.score() for tally in tallies]


def _complete(probe: Probe, feeds: Feeds, place: Mapping[str, int]) -> Iterator[tuple[int, dict[Port, Error]]]:
    """Yield each group with its errors as soon as they are all known."""
    missing = Counter(place[port.node] for port in probe.ports if port.node in place)
    waiting: dict[int, dict[Port, Error]] = {}
    for port, error in probe.errors(feeds):
        if port.node in place:
            number = place[port.node]
            waiting.setdefault(number, {})[port] = error
            missing[number] -= 1
            if not missing[number]:
                yield number, waiting.pop(number)


def estimate(probe: Probe) -> dict[str, float]:
    """Fisher estimates from a few batches."""
    return fisher(probe, islice(probe.batches(), FISHER_BATCHES))


def correlation(measured: Mapping[str, float], estimated: Mapping[str, float]) -> float | None:
    """Spearman's rank correlation over the layers that have both; ``None`` for fewer than three."""
    both = [name for name in measured if name in estimated]
    if len(both) < 3:
        return None
    return spearman(np.array([measured[name] for name in both]), np.array([estimated[name] for name in both]))


def weight_bytes(model: ir.Model, names: Sequence[str]) -> dict[str, int]:
    """Bytes of the constants that each named node multiplies by or looks up, as they are before quantization."""
    found = {}
    for node in model.graph:
        if node.name in names:
            tensors = (constant(value) for value in node.inputs if value is not None)
            found[node.name or ""] = sum(t.nbytes for t in tensors if t is not None and len(t.shape) > 1)
    return found
