"""What was tried on the way to a result: a bench that remembers what it judged and timed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from qexport.errors import GateFailed
from qexport.exporter.outcome.result import Latency, Quality, Tried
from qexport.exporter.product import Product
from qexport.exporter.proof.gates import check_gates
from qexport.exporter.recipe import GatesSpec

if TYPE_CHECKING:
    from qexport.exporter.precision.backoff import Bench
    from qexport.exporter.precision.costs import Cost
    from qexport.exporter.precision.regions import Region

POINTS, COSINE = "points", "1 - cosine"
"""Units of a loss: of a task's metric where higher is better, or how far the worst output's mean cosine is from 1."""


@dataclass(slots=True)
class _Seen:
    bytes: int
    quality: Quality | None = None
    latency: Latency | None = None
    failed: bool = False


class Remembering:
    """Hands everything on to another bench."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._seen: dict[tuple[str, ...], _Seen] = {}  # by the names of what was quantized

    def again(self, keep: Collection[str]) -> Product:
        """Run the recipe again with the nodes called ``keep`` in float."""
        return self._bench.again(keep)

    def judge(self, product: Product) -> Quality | None:
        """Compare with the model as it came, and remember."""
        seen = self._of(product)
        seen.failed = True
        seen.quality = self._bench.judge(product)
        seen.failed = False
        return seen.quality

    def time(self, product: Product) -> Latency | None:
        """Measure in turn with the model as it came, and remember."""
        seen = self._of(product)
        seen.latency = self._bench.time(product)
        return seen.latency

    def errors(self, regions: Sequence[Region]) -> list[float]:
        """The output error that each region causes when it alone is quantized."""
        return self._bench.errors(regions)

    def costs(self, product: Product, regions: Sequence[Region]) -> list[Cost]:
        """What each region takes in float and in the product."""
        return self._bench.costs(product, regions)

    def tried(self, first: Product, chosen: Product, gates: GatesSpec) -> tuple[Tried, ...]:
        """Everything but the chosen product, in the order in which it was tried."""
        others = [(names, seen) for names, seen in self._seen.items() if names != chosen.quantized]
        return tuple(_tried(len(first.quantized) - len(names), seen, gates) for names, seen in others)

    def _of(self, product: Product) -> _Seen:
        return self._seen.setdefault(product.quantized, _Seen(constant_bytes(product.model)))


def constant_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of the main graph."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def loss_of(quality: Quality | None) -> tuple[float | None, str]:
    """How much worse than float a result is, and in which unit; ``None`` where that was not measured."""
    if quality is None:
        return None, COSINE
    if quality.task is not None:
        return quality.task.drop, POINTS if quality.task.better == "higher" else quality.task.name
    return max(0.0, 1 - quality.least_mean), COSINE


def _tried(kept: int, seen: _Seen, gates: GatesSpec) -> Tried:
    loss, unit = loss_of(seen.quality)
    return Tried(
        kept=kept,
        loss=loss,
        unit=unit,
        bytes=seen.bytes,
        ms=None if seen.latency is None else seen.latency.result_ms,
        speedup=None if seen.latency is None else seen.latency.speedup,
        fits=not seen.failed and _holds(seen.quality, gates),
    )


def _holds(quality: Quality | None, gates: GatesSpec) -> bool:
    try:
        check_gates(quality, gates)
    except GateFailed:
        return False
    return True
