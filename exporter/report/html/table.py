"""The table of nodes: its columns, its rows, and what else is written about a node."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qexport.exporter.outcome.summary import human_bytes
from qexport.exporter.report.html.shown import Shown
from qexport.exporter.report.html.words import BLANK, fixed, name, number
from qexport.exporter.report.values import Choice, Node

PROFILED = "by the runtime's profile; blank where the runtime ran it as part of another one"
GLYPHS = {"quantized": "●", "float": "○", "kept": "◆", "backed off": "◇", "gone": "×"}
"""A shape for each state, so that colour is never all that tells them apart."""
DECISIVE = {"quantized", "skipped", "kept", "pruned"}
"""Actions that explain a node best: the last of them leads, else the last of all."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of numbers; ``more`` is written small below the number."""

    label: str
    title: str
    value: Callable[[Node], float | None]
    words: Callable[[float], str]
    more: Callable[[Node], str] = lambda node: BLANK


@dataclass(frozen=True, slots=True)
class Cell:
    """A number as it is sorted and as it is written."""

    value: str
    words: str
    more: str


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table; ``head`` and ``leaf`` are the two parts of the name."""

    number: int
    node: Node
    head: str
    leaf: str
    precision: str
    cells: tuple[Cell, ...]
    lead: Choice | None
    others: tuple[Choice, ...]
    activation: int | None
    weight: int | None


def _weight_scale(node: Node) -> str:
    if node.weight_scale is None:
        return BLANK
    return f"w {number(node.weight_scale[1], 2)}"


def _bytes(value: float) -> str:
    return human_bytes(int(value))


def _stored(count: int) -> float | None:
    return count or None


COLUMNS = (
    Column(
        "scale",
        "Step of the activation; w: of the weight, the largest of its channels",
        lambda n: n.scale,
        number,
        _weight_scale,
    ),
    Column("zero", "Zero point of the activation", lambda n: n.zero_point, lambda v: fixed(v, 0)),
    Column(
        "SQNR alone",
        "Signal over the noise of this layer alone, on excerpts of the calibration data, dB",
        lambda n: n.sqnr_own,
        lambda v: fixed(v, 1),
    ),
    Column(
        "SQNR",
        "Signal over the noise of this layer and all before it, on a few evaluation samples, dB",
        lambda n: n.sqnr,
        lambda v: fixed(v, 1),
    ),
    Column(
        "error",
        "Relative squared error of the model's output, this layer alone in few bits, on a few samples",
        lambda n: n.error,
        lambda v: number(v, 2),
    ),
    Column(
        "ms float",
        f"Milliseconds of one call in the float model, {PROFILED}",
        lambda n: n.ms_before or None,
        lambda v: fixed(v, 3),
    ),
    Column(
        "ms result",
        f"Milliseconds of one call in the result, {PROFILED}",
        lambda n: n.ms_after or None,
        lambda v: fixed(v, 3),
    ),
    Column("bytes float", "Bytes of its weights in the float model", lambda n: _stored(n.bytes_before), _bytes),
    Column("bytes result", "Bytes of its weights in the result", lambda n: _stored(n.bytes_after), _bytes),
)


def columns(shown: Shown) -> tuple[Column, ...]:
    """Those of the columns in which any row has something."""
    return tuple(c for c in COLUMNS if any(c.value(node) is not None or c.more(node) for _, node in shown.nodes))


def rows(shown: Shown, given: Sequence[Column]) -> Iterator[Row]:
    """The rows with the cells of these columns."""
    for place, node in shown.nodes:
        text, block = name(node.name), name(node.block)
        cut = len(block) if text.startswith(block) else 0
        lead = next((c for c in reversed(node.why) if c.action in DECISIVE), node.why[-1] if node.why else None)
        yield Row(
            number=place,
            node=node,
            head=text[:cut],
            leaf=text[cut:],
            precision=" × ".join(kind for kind in (node.activation, node.weight) if kind),
            cells=tuple(_cell(column, node) for column in given),
            lead=lead,
            others=tuple(choice for choice in node.why if choice is not lead),
            activation=shown.activation_of.get(place),
            weight=shown.weight_of.get(place),
        )


def _cell(column: Column, node: Node) -> Cell:
    value, more = column.value(node), column.more(node)
    if value is None or not math.isfinite(value):
        return Cell(BLANK, BLANK, more)
    return Cell(f"{value:.6g}", column.words(value), more)


def states(shown: Shown) -> dict[str, int]:
    """How many rows are in each state, in the order of ``GLYPHS``."""
    found = dict.fromkeys(GLYPHS, 0)
    for _, node in shown.nodes:
        found[node.state] += 1
    return {state: count for state, count in found.items() if count}
