"""``qexport plan``: what a build would do; and with a budget, which layers to leave in float, as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from qexport.cli import flags
from qexport.cli.common import make_console, make_table, print_json, shared_flags
from qexport.cli.questions import Asked, question_about
from qexport.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from qexport.exporter.forecast.forecast import Forecast
    from qexport.exporter.precision.plan import Plan, Point


class PlanAsked(Asked):
    """The options of ``plan`` as click hands them over."""

    max_drop: float | None
    min_cosine: float | None
    nodes: bool


@click.command()
@click.argument("model", type=click.Path())
@flags.calib()
@flags.evaluation(help="Held-out data, with labels for --max-drop.")
@click.option("--max-drop", type=float, metavar="POINTS", help="How much of the task metric may be lost.")
@click.option("--min-cosine", type=float, metavar="COSINE", help="How close outputs must stay, without labels.")
@flags.recipe(default="int8", show_default=True, help="The recipe to extend.")
@flags.target()
@click.option("--samples", type=int, default=64, show_default=True, help="How many samples layers are measured on.")
@flags.output(metavar="FILE", help="Where the recipe of a budget goes; plan.toml when not given.")
@flags.cache_limit()
@click.option("--nodes", is_flag=True, help="List every node that would be quantized, or not and why.")
@shared_flags
def plan(model: str, **asked: Unpack[PlanAsked]) -> None:
    """Tell what a build of MODEL would do, or choose what stays in float.

    Without a budget this is a dry run: what would be quantized, and about how many bytes, seconds and how much memory
    that would take. It needs no data and writes nothing.

    With --max-drop or --min-cosine, layers are measured one by one; then mixtures of int8 and float are built, judged
    on all evaluation data and timed. The best one inside the budget is written as a recipe for qexport build --recipe.
    """
    dry = asked["max_drop"] is None and asked["min_cosine"] is None
    if dry and asked["output"] is not None:
        hint = "leave out -o, or give a budget: --max-drop POINTS or --min-cosine COSINE"
        raise UsageError("without a budget there is no recipe to write", where="--output", hint=hint)
    if asked["nodes"] and not dry:
        hint = "with one, the recipe names what stays in float"
        raise UsageError("nodes are listed without a budget alone", where="--nodes", hint=hint)

    question = question_about(model, asked)
    if dry:
        from qexport.exporter.forecast.forecast import forecast

        told = forecast(question)
        _tell(told, nodes=asked["nodes"], as_json=asked["as_json"])
        return

    from qexport.exporter.precision.plan import with_budget
    from qexport.exporter.precision.publish import publish_plan

    output = asked["output"] or Path("plan.toml")
    found = publish_plan(with_budget(question, asked["max_drop"], asked["min_cosine"]), output)
    if asked["as_json"]:
        print_json(found)
        return
    _print(make_console(), found, output)


def _tell(told: Forecast, *, nodes: bool, as_json: bool) -> None:
    from qexport.exporter.forecast.words import rows

    if as_json:
        print_json(told)
        return
    console = make_console()
    console.print(make_table(("a build would", ""), rows(told)))
    if nodes:
        lines = ((choice.node, choice.op, choice.action, choice.reason) for choice in told.decisions)
        console.print(make_table(("node", "operator", "", "why"), lines))
    for warning in told.warnings:
        console.print(f"warning: {warning}")


def _print(console: Console, found: Plan, output: Path) -> None:
    from qexport.exporter.outcome.summary import human_bytes

    lost = ("lost",) if found.task else ()
    rows = [
        (
            _name(point),
            *([_number(point.drop, "+.2f")] if found.task else []),
            _number(point.cosine_mean, ".4f"),
            _number(point.cosine_worst, ".4f"),
            human_bytes(point.bytes),
            f"{point.milliseconds:.3g} ms",
            "" if point.foreign else f"{point.speedup:.2f}x",
            "yes" if point.fits else "no",
            "*" if point.pareto else "",
            "<-" if number == found.chosen else "",
        )
        for number, point in enumerate(found.points)
    ]
    budget = ", ".join(f"{name} {value:g}" for name, value in found.budget.items())
    judged = f", {found.task} on {found.data}" if found.task else f" on {found.data}"
    console.print(f"budget: {budget}{judged}; * no other point is better in quality, size and time")
    header = ("layers", *lost, "cosine", "worst", "size", "latency", "speed", "fits", "", "")
    console.print(make_table(header, rows))
    if found.points[0].foreign:
        console.print(f"latency is onnxruntime's on this machine, which says nothing about {found.target}")
    for warning in found.warnings:
        console.print(f"warning: {warning}")
    console.print(f"next: qexport build MODEL --recipe {output}")


def _number(number: float | None, spec: str) -> str:
    return "not finite" if number is None else format(number, spec)


def _name(point: Point) -> str:
    if not point.kept:
        return f"all {point.quantized} in int8"
    return f"{point.quantized} in int8, {point.kept} in float" if point.quantized else "float"
