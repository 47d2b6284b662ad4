"""``report.html``: the story, the plots and the tables of a build in one file that needs nothing else.

The page may be sent around and opened anywhere, while its names come from a model that nobody has to trust: templates
escape everything, and a policy in the head lets run and load nothing but the style and the script written here.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from qexport.errors import printable
from qexport.exporter.outcome.result import Result
from qexport.exporter.outcome.summary import human_bytes
from qexport.exporter.proof.quality import LAYER_SAMPLES
from qexport.exporter.report.html import plots, plots_layers, table, words
from qexport.exporter.report.html.shown import FULL, SMALLER, Caps, Shown, choose
from qexport.exporter.report.html.tiles import tiles
from qexport.exporter.report.values import Point, Report

LIMIT = 6_000_000
"""Bytes that a page may have."""
SECTIONS = {
    "layers": "Layers",
    "pareto": "Pareto",
    "roofline": "Roofline",
    "activations": "Activations",
    "weights": "Weights",
    "samples": "Samples",
    "nodes": "Nodes",
    "steps": "Steps",
    "provenance": "Provenance",
}
"""Id and heading of what can be jumped to."""
WORDS = {
    "better": ("▲ better", "good"),
    "as good": ("● as good", "good"),
    "mixed": ("◆ mixed", "bad"),
    "worse": ("▼ worse", "bad"),
    "unmeasured": ("○ unmeasured", "open"),
}
"""How a verdict is written, and its tone."""
AT_ONCE = 12  # histograms and boxes that are not folded
LISTED, GROUPS, RECIPE = 30, 300, 20_000  # warnings and regions, groups of decisions, characters of the recipe
EXAMPLES = 4
PNG = "iVBORw0KGgo"  # what every PNG begins with, in base64


@dataclass(frozen=True, slots=True)
class Group:
    """Decisions that are alike, and the first nodes that they are about."""

    step: str
    action: str
    op: str
    reason: str
    nodes: tuple[str, ...]
    count: int


def render(result: Result, report: Report, *, caps: Caps = FULL) -> str:
    """The page; with fewer rows and plots where it would have more than ``LIMIT`` bytes, which it says itself.

    The same values give the same bytes.
    """
    page = ""
    for allowed in (caps, *SMALLER):
        page = _page(result, report, allowed)
        if len(page.encode()) <= LIMIT:
            break
    return page


@cache
def _text(name: str) -> str:
    return files("qexport.exporter.report.html").joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_text),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    used = (
        words.name,
        words.model_name,
        words.full_name,
        words.middle,
        words.number,
        words.fixed,
        words.percent,
        words.count,
        words.many,
        words.shape,
    )
    environment.filters.update({function.__name__: function for function in used} | {"bytes": human_bytes})
    return environment


def policy(style: str, script: str) -> str:
    """What a browser may do for this page: apply this style, run this script, show pictures that are in the page."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {digest(script)}; style-src {digest(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _page(result: Result, report: Report, caps: Caps) -> str:
    shown = choose(report, caps)
    style, script = _text("style.css"), _text("page.js")
    columns = table.columns(shown)
    values: dict[str, Any] = {
        "result": result,
        "report": report,
        "shown": shown,
        "caps": caps,
        "policy": policy(style, script),
        "style": Markup(style),
        "script": Markup(script),
        "sections": SECTIONS,
        "word": WORDS[report.verdict.word],
        "tiles": tiles(result, report),
        "columns": columns,
        "rows": table.rows(shown, columns),
        "states": table.states(shown),
        "glyphs": table.GLYPHS,
        "groups": _groups(result),
        "grouped": GROUPS,
        "recipe": _recipe(result),
        "listed": LISTED,
        "at_once": AT_ONCE,
        "layer_samples": LAYER_SAMPLES,
        "png": PNG,
    }
    return _environment().get_template("page.html.j2").render(values | _plots(result, report, shown, caps))


def _plots(result: Result, report: Report, shown: Shown, caps: Caps) -> dict[str, Any]:
    roof = report.roofline
    return {
        "sqnr": plots_layers.plot_sqnr(shown),
        "tornado": plots_layers.plot_tornado(shown),
        "pareto": _pareto(result, report),
        "pareto_legend": plots.pareto_legend(),
        "roofline": plots.plot_roofline(roof, shown.rows) if roof else Markup(""),
        "histograms": [(i, entry, plots_layers.plot_histogram(entry)) for i, entry in enumerate(shown.activations)],
        "boxes": [(i, entry, plots_layers.plot_boxes(entry, caps.channels)) for i, entry in enumerate(shown.weights)],
        "deciles": plots.plot_deciles(report.deciles),
    }


def _pareto(result: Result, report: Report) -> list[Markup]:
    """Size and latency for each unit of loss, that of the published point first."""
    groups: dict[str, list[Point]] = {}
    for point in sorted(report.points, key=lambda p: (not p.chosen, not p.measured)):
        groups.setdefault(point.unit, []).append(point)
    found = []
    for points in groups.values():
        task = any(point.chosen for point in points) and result.quality is not None and result.quality.task is not None
        gate = result.gates.get("max_drop") if task else None
        found += [plots.plot_pareto(points, cost, gate) for cost in plots.COSTS]
    return [plot for plot in found if plot]


def _groups(result: Result) -> list[Group]:
    """Decisions of all steps, those that are alike together, in the order in which they came."""
    found: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for step in result.steps:
        for decision in step.decisions:
            found[step.name, decision.action, decision.op, decision.reason].append(decision.node)
    return [Group(*key, nodes=tuple(nodes[:EXAMPLES]), count=len(nodes)) for key, nodes in found.items()]


def _recipe(result: Result) -> str:
    """The recipe as it was run, cut where it is very long."""
    text = json.dumps(result.recipe, indent=1, ensure_ascii=False, default=str)
    return printable(text[: RECIPE + 1], RECIPE)
