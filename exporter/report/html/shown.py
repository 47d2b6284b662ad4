"""Which rows, histograms and boxes a page has room for, and where its links lead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qexport.exporter.report.values import Activation, Node, Report, Weights


@dataclass(frozen=True, slots=True)
class Caps:
    """Most rows of the table, most histograms and most layers of boxes, most channels of a layer."""

    rows: int
    panels: int
    channels: int = 32


FULL = Caps(2000, 48)
SMALLER = (Caps(500, 16), Caps(100, 4))
"""What a page is cut to, in turn, where it would be too large."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What is on the page.

    Attributes:
        nodes: Rows with their numbers, in the order of the graph; a number is a node's place among all nodes.
        rows: Name of a node to the number of its row.
        activations: Histograms, those of the noisiest readers first.
        weights: Boxes, the largest outliers first.
        activation_of: Number of a row to the place of the histogram that it reads.
        weight_of: The same of its boxes.
    """

    nodes: tuple[tuple[int, Node], ...]
    rows: dict[str, int]
    activations: tuple[Activation, ...]
    weights: tuple[Weights, ...]
    activation_of: dict[int, int]
    weight_of: dict[int, int]


def choose(report: Report, caps: Caps) -> Shown:
    """The rows of nodes that something was decided or measured about come first, then the others, up to the caps."""
    everything = list(enumerate(report.nodes))
    if len(everything) > caps.rows:
        everything = sorted(sorted(everything, key=_importance)[: caps.rows])
    rows: dict[str, int] = {}
    for number, node in everything:
        rows.setdefault(node.name, number)
    noise = {node.name: _noise(node) for node in report.nodes if node.sqnr_own is not None or node.sqnr is not None}
    activations = sorted(report.activations, key=lambda a: min((noise.get(r, 1e9) for r in a.readers), default=1e9))
    activations = activations[: caps.panels]
    weights = sorted(report.weights, key=lambda w: -w.outlier)[: caps.panels]
    return Shown(
        nodes=tuple(everything),
        rows=rows,
        activations=tuple(activations),
        weights=tuple(weights),
        activation_of=_places([a.readers for a in activations], rows),
        weight_of=_places([(w.node,) for w in weights], rows),
    )


def _importance(item: tuple[int, Node]) -> tuple[bool, bool, int]:
    number, node = item
    known = node.error is not None or node.sqnr is not None or node.sqnr_own is not None
    return node.state in {"float", "gone"}, not known, number


def _noise(node: Node) -> float:
    return min(value for value in (node.sqnr_own, node.sqnr) if value is not None)


def _places(readers: Sequence[Sequence[str]], rows: dict[str, int]) -> dict[int, int]:
    """Number of each row to the first entry that names it."""
    found: dict[int, int] = {}
    for place, names in enumerate(readers):
        for name in names:
            if name in rows:
                found.setdefault(rows[name], place)
    return found
