"""The last words of an export: what was written, what it was held against, how close it is."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from pathlib import PurePath

from qexport.errors import printable
from qexport.exporter.load import ONNX_FILE
from qexport.exporter.outcome.export_result import CheckInfo, ExportResult, PartInfo
from qexport.exporter.outcome.summary import human_bytes


def export_lines(result: ExportResult) -> list[str]:
    """Return a few lines of plain text, one fact each."""
    last = ("next", f"qexport build {shlex.quote(str(PurePath(result.directory) / ONNX_FILE))}")
    return [f"{label:<10} {' '.join(printable(text).split())}" for label, text in (*_facts(result), last)]


def _facts(result: ExportResult) -> Iterator[tuple[str, str]]:
    family = f"{result.family}, " if result.family else ""
    yield "source", f"{result.source.path} ({family}{human_bytes(result.source.bytes)}), by the door {result.door}"
    for name, part in result.parts.items():
        size = sum(info.bytes for file, info in result.files.items() if file.startswith(name))
        yield "written", f"{name}: {_told(part)}, {result.dtype}, {human_bytes(size)}"
    proven = result.verification
    numbers = sum(check.numbers for check in proven.checks)
    yield "verified", f"{numbers} numbers against {proven.reference}, on {proven.data}"
    worst = max(proven.checks, key=_strain)
    yield (
        "worst",
        f"{worst.what}, {worst.output}: {worst.error:.1e} of the spread (allowed {worst.allowed_error:.0e}), "
        f"{worst.rms:.1e} rms (allowed {worst.allowed_rms:.0e})",
    )
    scored = [check.argmax for check in proven.checks if check.argmax is not None]
    if scored:
        yield "argmax", same_share(min(scored))
    yield from (("warning", warning) for warning in result.warnings)
    yield "published", f"{result.directory}, after {result.seconds:.1f} s and {human_bytes(result.peak_rss_bytes)}"


def same_share(least: float) -> str:
    """At how many rows the largest number stands at the same place; rounded down, so that all is all."""
    return "the same at all rows" if least == 1 else f"the same at {math.floor(1000 * least) / 10}% of the rows or more"


def _strain(check: CheckInfo) -> float:
    """How much of what is allowed was needed."""
    return max(check.error / (check.allowed_error or 1.0), check.rms / (check.allowed_rms or 1.0))


def _told(part: PartInfo) -> str:
    return f"opset {part.opset}, {part.nodes} nodes, {part.parameters} parameters"
