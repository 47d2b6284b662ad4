"""Results in notebooks: small HTML without script that takes its colours from the notebook, light or dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from qexport.exporter.outcome.result import Result
from qexport.exporter.outcome.summary import growth, human_bytes, task_change
from qexport.exporter.report.html.words import count, fixed, name, number
from qexport.exporter.report.verdict import verdict

if TYPE_CHECKING:
    from qexport.exporter.outcome.export_result import ExportResult
    from qexport.exporter.precision.plan import Plan
    from qexport.exporter.precision.sensitivity import Sensitivity

ROWS = 200
"""Most rows of a table; a notebook keeps what it shows in its file."""
_FRAME = "border-left:3px solid currentColor;padding:2px 0 2px 14px;max-width:960px;line-height:1.5"
_CELL = "text-align:{};padding:2px 12px 2px 0;font-variant-numeric:tabular-nums;vertical-align:top"
_LEFT, _RIGHT = (_CELL.format(side) for side in ("left", "right"))


def fragment(result: Result) -> str:
    """A build: the verdict, what it is about, numbers before and after, warnings, and where the files are."""
    judged = verdict(result)
    recipe = f"{result.recipe.get('name', '?')} for {result.target}"
    warnings = "".join(f"<div>▲ {_text(warning)}</div>" for warning in result.warnings[:10])
    return (
        f'<div style="{_FRAME}"><div><b>{_text(result.source.path)}</b>, {_text(recipe)}: <b>{judged.word}</b></div>'
        f"<div>{_text(judged.sentence)}</div>{table_html(('', 'float:', 'result:', ''), _rows(result))}{warnings}"
        f"<div>{_text(result.directory)}: report.html has plots, and the reason for every choice</div></div>"
    )


def table_html(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of anything; columns whose title ends in ``:`` are aligned right, and rows after ``ROWS`` are counted."""
    sides = [_RIGHT if title.endswith(":") else _LEFT for title in header]
    head = "".join(
        f'<th style="{side}">{_text(title.removesuffix(":"))}</th>' for side, title in zip(sides, header, strict=True)
    )
    lines: list[str] = []
    left_out = 0
    for row in rows:
        if len(lines) == ROWS:
            left_out += 1
            continue
        cells = (f'<td style="{side}">{_text(_words(cell))}</td>' for side, cell in zip(sides, row, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    more = f"<div>{count(left_out)} more rows</div>" if left_out else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>{more}"


def titled(title: str, warnings: Sequence[str], header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table under a title, with what is doubtful below it."""
    doubts = "".join(f"<div>▲ {_text(warning)}</div>" for warning in warnings)
    return f'<div style="{_FRAME}"><div><b>{_text(title)}</b></div>{table_html(header, rows)}{doubts}</div>'


def _rows(result: Result) -> list[tuple[str, str, str, str]]:
    found = []
    quality, latency = result.quality, result.latency
    if quality is not None and (task := quality.task) is not None:
        found.append((task.name, fixed(task.reference, 2), fixed(task.result, 2), task_change(task)))
    if quality is not None:
        found.append(("cosine, mean", "", fixed(quality.least_mean, 4), f"worst {fixed(quality.least, 4)}"))
    ratio = number(result.bytes_before / max(result.bytes_after, 1), 2)
    change = {-1: f"{ratio}× smaller", 0: "as large", 1: "LARGER"}[growth(result)]
    found.append(("size", human_bytes(result.bytes_before), human_bytes(result.bytes_after), change))
    if latency is not None:
        note = (
            "not the target's speed" if latency.foreign else f"{latency.speedup_low:.2f} to {latency.speedup_high:.2f}×"
        )
        found.append(("ms", number(latency.reference_ms), number(latency.result_ms), note))
    return found


def export_html(result: ExportResult) -> str:
    """An export: what was written, and how far its outputs are from the source's."""
    proof = result.verification
    title = f"{result.source.path} as {', '.join(result.parts)} in {result.directory}, held against {proof.reference}"
    header = ("run", "output", "largest error:", "allowed:", "RMS:", "allowed:")
    rows = ((c.what, c.output, c.error, c.allowed_error, c.rms, c.allowed_rms) for c in proof.checks)
    return titled(title, result.warnings, header, rows)


def plan_html(plan: Plan) -> str:
    """A plan: every point on the way from all int8 to all float, the chosen one marked."""
    title = f"{plan.model} for {plan.target}: {len(plan.keep)} layers stay in float"
    header = ("", "quantized:", "in float:", f"loss of {plan.task or 'cosine'}:", "size:", "ms:", "speed:", "in budget")
    rows = (
        (
            "▶" if place == plan.chosen else "",
            point.quantized,
            point.kept,
            point.costs[0],
            human_bytes(point.bytes),
            point.milliseconds,
            point.speedup,
            point.fits,
        )
        for place, point in enumerate(plan.points)
    )
    return titled(title, plan.warnings, header, rows)


def sensitivity_html(found: Sensitivity) -> str:
    """A sensitivity analysis: every layer alone in few bits, the most sensitive first."""
    title = f"{found.model} for {found.target}: each layer alone, on {found.samples} samples of {found.data}"
    header = ("node", "operator", "error:", "estimate:", "SQNR, dB:", "cosine, worst:", f"loss of {found.task or '-'}:")
    rows = ((r.node, r.op, r.error, r.estimate, r.sqnr, r.cosine_worst, r.drop) for r in found.layers)
    return titled(title, found.warnings, header, rows)


def _words(cell: object) -> object:
    if cell is None or isinstance(cell, bool):
        return "" if cell is None else ("yes" if cell else "no")
    return number(cell, 4) if isinstance(cell, float) else cell


def _text(value: object) -> str:
    return escape(name(value, 400))
