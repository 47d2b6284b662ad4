"""A forecast in words."""

from __future__ import annotations

from collections.abc import Iterator

from qexport.exporter.forecast.forecast import Forecast
from qexport.exporter.outcome.summary import counts, human_bytes


def rows(told: Forecast) -> Iterator[tuple[str, str]]:
    """What a build would do, and how much, a line each."""
    yield "run", f"{told.recipe} for {told.target}"
    yield "quantize", f"{told.quantized} nodes" + (f": {counts(told.forms)}" if told.forms else "")
    if told.skipped:
        yield "skip", f"{sum(told.skipped.values())} nodes: {counts(told.skipped)}"
    yield "write a model of", f"{human_bytes(told.bytes)} ({human_bytes(told.bytes_before)} before), {told.nodes} nodes"
    if told.engine_bytes is not None:
        yield "write an engine of", f"about {human_bytes(told.engine_bytes)}"
    yield "take", f"about {_seconds(sum(told.seconds.values()))}: {_stages(told)}"
    if told.cached:
        yield "recall", f"{', '.join(told.cached)}, as an equal build has left them"
    yield "take on disk", f"about {human_bytes(told.disk)}"
    yield "take in memory", f"about {human_bytes(told.memory)}"


def _stages(told: Forecast) -> str:
    return ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in told.seconds.items() if seconds >= 0.5)


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
