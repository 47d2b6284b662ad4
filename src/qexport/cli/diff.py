"""``qexport diff``: what differs between two models or builds, and whether it is more than it may."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from qexport.cli.common import make_console, make_table, print_json, shared_flags
from qexport.errors import GateFailed, printable

if TYPE_CHECKING:
    from rich.console import Console

    from qexport.exporter.compare.changes import Change, Diff

_WIDE = 80  # characters of a value in a table


@click.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option(
    "--fail-if",
    "conditions",
    multiple=True,
    metavar="CONDITION",
    help="Exit by 7 where B minus A is such, as in 'spearman<-0.2' or 'latency>+3%'; repeatable.",
)
@click.option("--nodes", is_flag=True, help="List every node that differs.")
@shared_flags
def diff(a: str, b: str, *, conditions: tuple[str, ...], nodes: bool, as_json: bool) -> None:
    """Compare A and B: quality, latency, size, and node by node.

    A and B are folders that build or export wrote, .onnx files, or files called result.json. Nothing is run: quality
    and latency are those that the builds measured. Graphs are compared by the names of their nodes: precision, scales,
    weights, attributes, wiring.
    """
    from qexport.exporter.compare.changes import diff as find_changes
    from qexport.exporter.compare.conditions import check, hold, parse

    asked = [parse(text) for text in conditions]
    found = find_changes(a, b)
    if as_json:
        found = hold(found, asked)
        print_json(found)
        if found.failed:
            raise click.exceptions.Exit(GateFailed.exit_code)
        return
    _print(make_console(), found, nodes=nodes)
    check(found, asked)


def _print(console: Console, found: Diff, *, nodes: bool) -> None:
    console.print(printable(f"A: {found.a}"))
    console.print(printable(f"B: {found.b}"))
    if found.metrics:
        rows = [(c.name, _number(c.a), _number(c.b), c.unit, *_change(c)) for c in found.metrics]
        console.print(make_table(("", "A", "B", "", "change", "", ""), rows))
    for title, facts in (("made", found.made), ("engine", found.engine)):
        if facts:
            console.print(make_table((title, "A", "B"), ((fact.name, _cut(fact.a), _cut(fact.b)) for fact in facts)))
    if found.nodes and nodes:
        lines = [(change.name, change.kind, _cut(change.a), _cut(change.b)) for change in found.nodes]
        console.print(make_table(("node", "differs in", "A", "B"), lines))
    from qexport.exporter.compare.changes import NO_GRAPHS

    counts = Counter(change.kind for change in found.nodes)
    told = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    if told or NO_GRAPHS not in found.notes:
        console.print(f"nodes: {told}{'' if nodes else '; --nodes lists them'}" if told else "nodes: no difference")
    for note in found.notes:
        console.print(printable(f"note: {note}"))


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:.6g}" if abs(number) < 1e5 else f"{number:,.0f}"


def _change(change: Change) -> tuple[str, str, str]:
    """Difference, percent, and whether that is good."""
    if change.delta is None:
        return "not comparable" if change.note else "", "", ""
    percent = "" if change.percent is None or not change.delta else f"{change.percent:+.2f} %"
    if not change.delta:
        return "=", "", ""
    delta = ("+" if change.delta > 0 else "") + _number(change.delta)
    if not change.better:
        return delta, percent, ""
    return delta, percent, "better" if (change.delta > 0) == (change.better == "higher") else "worse"


def _cut(text: str) -> str:
    return text if len(text) <= _WIDE else f"{text[:_WIDE]}…"
