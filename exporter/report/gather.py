"""Everything that a report shows, from what a build has at its end; only the machine's peaks are measured for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from qexport.errors import QexportError
from qexport.exporter.load import Source
from qexport.exporter.outcome.result import Result
from qexport.exporter.precision.bench import BuildBench
from qexport.exporter.precision.costs import Kernels
from qexport.exporter.precision.tried import constant_bytes
from qexport.exporter.product import Product
from qexport.exporter.report.activations import activation_rows
from qexport.exporter.report.nodes import Graphs, node_rows
from qexport.exporter.report.points import points
from qexport.exporter.report.roofline import roofline
from qexport.exporter.report.samples import worst_samples
from qexport.exporter.report.values import Report, Roofline, Sample
from qexport.exporter.report.verdict import verdict
from qexport.exporter.report.weights import weight_rows
from qexport.exporter.samples import Samples
from qexport.passes.target import Target
from qexport.safe_io import Cache

Row = TypeVar("Row")

UNJUDGED = "quality was not measured: no data was given"
EMPTY = {
    "sqnr": "no quantized layer was compared with float",
    "tornado": "no layer was quantized alone in this build: qexport sensitivity does that",
    "pareto": UNJUDGED,
    "activations": "no activation was calibrated",
    "weights": "no weight was quantized",
    "samples": UNJUDGED,
}


@dataclass(frozen=True, slots=True)
class Material:
    """What a build has at its end.

    Attributes:
        source: The model as it came.
        target: Where the result runs.
        product: What is published.
        result: What is known of it.
        samples: The data.
        bench: What measured.
        cache: Where the machine's peaks are kept.
        show_samples: Whether samples may be shown.
    """

    source: Source
    target: Target
    product: Product
    result: Result
    samples: Samples
    bench: BuildBench
    cache: Cache
    show_samples: bool = True


def gather(material: Material) -> Report:
    """Return the report. A panel that fails with a ``QexportError`` stays empty and says why."""
    m, missing = material, dict[str, str]()
    plain = m.product.plain if m.product.snapshot is None else m.product.snapshot.model
    kernels = m.bench.kernels(m.product)

    def panel(name: str, rows: Callable[[], tuple[Row, ...]]) -> tuple[Row, ...]:
        found: tuple[Row, ...] = ()
        try:
            found = rows()
        except QexportError as error:
            missing[name] = error.what
        if not found:
            missing.setdefault(name, EMPTY[name])
        return found

    nodes = node_rows(Graphs(m.source.model, plain, m.product.model), m.result, kernels)
    quantized = {node.name for node in nodes if node.state != "float"}
    quality = m.result.quality
    panel("sqnr", lambda: tuple(n for n in nodes if n.sqnr is not None or n.sqnr_own is not None))
    panel("tornado", lambda: tuple(node for node in nodes if node.error is not None))
    return Report(
        verdict=verdict(m.result),
        nodes=nodes,
        activations=panel("activations", lambda: activation_rows(plain, m.target)),
        weights=panel("weights", lambda: weight_rows(plain, quantized)),
        points=panel("pareto", lambda: points(m.result, nodes, constant_bytes(m.product.model))),
        roofline=_roofline(m, kernels, missing),
        samples=panel("samples", lambda: _samples(m, missing)),
        deciles=() if quality is None else quality.deciles,
        missing=missing,
    )


def _roofline(m: Material, kernels: Kernels | None, missing: dict[str, str]) -> Roofline | None:
    latency = m.result.latency
    if latency is not None and latency.foreign:
        missing["roofline"] = f"the file is for {m.target.name}, which did not run here"
    elif kernels is None or m.product.snapshot is None:
        missing["roofline"] = "the operators of this result were not timed one by one"
    else:
        try:
            return roofline(m.product.snapshot.model, m.product.model, kernels, m.cache)
        except QexportError as error:
            missing["roofline"] = error.what
    return None


def _samples(m: Material, missing: dict[str, str]) -> tuple[Sample, ...]:
    quality, judge = m.result.quality, m.samples.judge
    if quality is None or judge is None:
        return ()
    if not m.show_samples:
        missing["samples"] = "left out by the recipe: [data] report_samples"
        return ()
    return worst_samples(quality.worst, judge.data, m.source.tokenizer)
