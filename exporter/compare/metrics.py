"""The numbers of a side that can be held against another's, and when they cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qexport.exporter.compare.sides import DIGEST, Side
from qexport.exporter.load import count_parameters
from qexport.exporter.outcome.result import Latency, Quality, Result

TASKS = {"spearman": "points", "top1": "points", "perplexity": ""}
"""Metrics of tasks, which data with labels has, and their units."""


@dataclass(frozen=True)
class Metric:
    """One number: its unit, which way is good, and where it is."""

    unit: str
    better: Literal["higher", "lower", ""]
    of: Callable[[Side], float | None]


def _quality(read: Callable[[Quality], float | None]) -> Callable[[Side], float | None]:
    return lambda side: read(side.result.quality) if side.result is not None and side.result.quality else None


def _latency(read: Callable[[Latency], float]) -> Callable[[Side], float | None]:
    return lambda side: read(side.result.latency) if side.result is not None and side.result.latency else None


def _result(read: Callable[[Result], float]) -> Callable[[Side], float | None]:
    return lambda side: None if side.result is None else read(side.result)


def _engine(name: str) -> Callable[[Side], float | None]:
    def read(side: Side) -> float | None:
        found = None if side.engine is None else side.engine.get(name)
        return float(found) if isinstance(found, int | float) else None

    return read


def _nodes(side: Side) -> float | None:
    if side.model is not None:
        return sum(1 for _ in side.model.graph.all_nodes())
    return side.result.steps[-1].nodes if side.result is not None and side.result.steps else None


def _parameters(side: Side) -> float | None:
    if side.model is not None:
        return count_parameters(side.model)
    return side.result.steps[-1].parameters if side.result is not None and side.result.steps else None


METRICS: dict[str, Metric] = {
    "cosine_mean": Metric("", "higher", _quality(lambda q: q.cosine_mean)),
    "cosine_worst": Metric("", "higher", _quality(lambda q: q.cosine_worst)),
    "sqnr": Metric("dB", "higher", _quality(lambda q: q.sqnr)),
    "sqnr_worst_layer": Metric("dB", "higher", _quality(lambda q: min((x.sqnr for x in q.layers), default=None))),
    "max_error": Metric("", "lower", _quality(lambda q: q.max_error)),
    "latency": Metric("ms", "lower", _latency(lambda found: found.result_ms)),
    "speedup": Metric("x", "higher", _latency(lambda found: found.speedup)),
    "bytes": Metric("B", "lower", lambda side: side.bytes),
    "nodes": Metric("", "", _nodes),
    "parameters": Metric("", "", _parameters),
    "quantized": Metric("layers", "", _result(lambda result: result.quantized)),
    "backed_off": Metric("layers", "", _result(lambda result: sum(len(off.nodes) for off in result.backed_off))),
    "engine_bytes": Metric("B", "lower", _engine("bytes")),
    "engine_layers": Metric("", "", _engine("layers")),
}
"""Numbers by name, beside those of ``TASKS``."""

OF_OUTPUT = {"cosine_mean", "cosine_worst", "sqnr", "max_error"}
JUDGED = {"sqnr_worst_layer", *OF_OUTPUT, *TASKS}
ROUNDING = 1e-3  # share by which scores of one model on one evaluation may differ from machine to machine
TIMED = {"latency", "speedup"}


def task_of(name: str, side: Side) -> float | None:
    """The result's score in the task called ``name``, if that is its task."""
    quality = None if side.result is None else side.result.quality
    return (
        quality.task.result if quality is not None and quality.task is not None and quality.task.name == name else None
    )


def incomparable(name: str, a: Side, b: Side) -> str:
    """Why two numbers that were both measured say nothing about each other; empty where they do."""
    if a.result is None or b.result is None:
        return ""
    one, other = a.result, b.result
    if name in JUDGED and one.quality is not None and other.quality is not None:
        told = f"judged on different data: {_data_of(a, one.quality)}; {_data_of(b, other.quality)}"
        return told if _other_data(a, b) else _other_question(name, one, other)
    if name in TIMED and one.latency is not None and other.latency is not None:
        strange = [side.target for side in (one, other) if side.latency is not None and side.latency.foreign]
        if strange:
            return f"{strange[0]} did not run here: what was timed says nothing about its speed"
        timed = [f"{way.runtime}, {way.threads} threads, {way.shapes}" for way in (one.latency, other.latency)]
        return _unless_equal("timed in different ways", *timed)
    return ""


def _other_data(a: Side, b: Side) -> bool:
    """Whether the evaluations differ: by the digests of the samples where both tell, else by name and number."""
    known = [side.data.get("evaluation") for side in (a, b)]
    if all(known):
        return known[0] != known[1]
    seen = [side.result.quality for side in (a, b) if side.result is not None and side.result.quality is not None]
    return len({(quality.data, quality.samples) for quality in seen}) > 1


def _data_of(side: Side, quality: Quality) -> str:
    digest = side.data.get("evaluation", "")
    return f"{quality.data}, {quality.samples} samples{f', {digest[:DIGEST]}' if digest else ''}"


def _other_question(name: str, one: Result, other: Result) -> str:
    """Why the same samples were asked for something else: at another output, or by other labels.

    Labels are in no digest, but the float model scores otherwise with others.
    """
    assert one.quality is not None
    assert other.quality is not None
    if name in OF_OUTPUT:
        return _unless_equal("judged at different outputs", one.quality.output, other.quality.output)
    scores = [quality.task.reference for quality in (one.quality, other.quality) if quality.task is not None]
    same = one.source.digest == other.source.digest and len(scores) > 1
    if name in TASKS and same and abs(scores[0] - scores[1]) > ROUNDING * abs(scores[0]):
        return f"judged by different labels: the float model has {scores[0]:.6g}; {scores[1]:.6g}"
    return ""


def _unless_equal(what: str, one: str, other: str) -> str:
    return "" if one == other else f"{what}: {one}; {other}"
