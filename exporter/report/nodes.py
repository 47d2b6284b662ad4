"""The rows of the table: every node of the result with what was decided about it, measured of it, and stored for it.

A row is a node that computes. Q/DQ nodes, and nodes that a pass wrote in the place of one it quantized, belong to the
row of the node that they serve, so that rows can be compared with the float model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from qexport.exporter.looking.element_types import element_types
from qexport.exporter.looking.inspect import LAYERS
from qexport.exporter.outcome.result import Result
from qexport.exporter.precision.costs import Kernels
from qexport.exporter.precision.regions import PAIR, Region, label
from qexport.exporter.report.scales import INTEGER, Scales, scale_of
from qexport.exporter.report.times import milliseconds
from qexport.exporter.report.values import Choice, Node, State
from qexport.passes.numbers.notes import ERROR_KEY
from qexport.passes.numbers.range import SQNR_KEY
from qexport.passes.quantize import KEPT

SERVING = {*PAIR, "DynamicQuantizeLinear"}
CHOOSERS = ("triage",)  # steps that leave layers in float because of what they measured
GRAPHS = ("graph", "Graph")  # what decisions about a whole graph have for an operator


@dataclass(frozen=True, slots=True)
class Graphs:
    """The model at three points of a build.

    Attributes:
        source: As it came.
        plain: Before the first pass that quantizes, with the notes of calibration.
        result: What is published.
    """

    source: ir.Model
    plain: ir.Model
    result: ir.Model


@dataclass(frozen=True, slots=True)
class _Row:
    """The nodes of one row; ``main`` is the one that its types and scales are read from."""

    name: str
    main: ir.Node
    members: tuple[ir.Node, ...]

    @property
    def region(self) -> Region:
        return Region(tuple(n.name or "" for n in self.members), tuple(n.op_type for n in self.members))

    def sum_of(self, spent: Mapping[str, float]) -> float | None:
        """The sum over the members; ``None`` where none of them has a number."""
        found = [spent[name] for name in self.region.nodes if name in spent]
        return sum(found) if found else None


def node_rows(graphs: Graphs, result: Result, kernels: Kernels | None) -> tuple[Node, ...]:
    """Return the rows in the order of the result's graph, those that are gone behind them.

    Args:
        graphs: The model before, between and after.
        result: Decisions, layers, what was backed off.
        kernels: The runtime's profiles of ``plain`` and of the result.
    """
    choices = _choices(result)
    known = {node.name or "" for model in (graphs.source, graphs.plain) for node in model.graph.all_nodes()}
    rows = find_rows(graphs.result.graph, known, choices)
    facts = _Facts(graphs, result, rows, kernels)
    there = {row.name for row in rows}
    gone = [name for name in choices if name in known and name not in there]
    return (*(facts.row(row, choices) for row in rows), *(facts.gone(name, choices[name]) for name in gone))


def find_rows(graph: ir.Graph, known: Collection[str], decided: Collection[str]) -> tuple[_Row, ...]:
    """Part the nodes of a graph into rows.

    A node that is new, and is called after one that was decided about (``NAME/MatMulInteger``), was written for it.
    """
    groups: dict[str, list[ir.Node]] = {}
    for number, node in enumerate(graph):
        if node.op_type in SERVING:
            continue
        name = node.name or f"({node.op_type} {number})"
        owner = None if name in known else _written_for(name, decided)
        groups.setdefault(owner or name, []).append(node)
    return tuple(_Row(name, _main(nodes), tuple(nodes)) for name, nodes in groups.items())


def _written_for(name: str, decided: Collection[str]) -> str | None:
    """The longest name among ``decided`` that ``name`` begins with, up to a slash."""
    while "/" in name:
        name = name.rpartition("/")[0]
        if name in decided:
            return name
    return None


def _main(nodes: list[ir.Node]) -> ir.Node:
    """What multiplies or looks up, else the first."""
    return next((node for node in nodes if node.op_type in LAYERS or node.op_type in (*INTEGER, "Gather")), nodes[0])


def _choices(result: Result) -> dict[str, list[Choice]]:
    """What was decided about each node, in the order of the steps; the same words twice are told once."""
    found: dict[str, dict[Choice, None]] = {}
    for step in result.steps:
        for d in step.decisions:
            if d.node and d.op not in GRAPHS and d.units is None:
                found.setdefault(d.node, {})[Choice(step.name, d.action, d.reason, d.detail)] = None
    return {name: list(choices) for name, choices in found.items()}


class _Facts:
    """What is known of rows, by name."""

    def __init__(self, graphs: Graphs, result: Result, rows: tuple[_Row, ...], kernels: Kernels | None) -> None:
        self._sqnr = {layer.node: layer.sqnr for layer in result.quality.layers} if result.quality is not None else {}
        self._off = {name for entry in result.backed_off for name in entry.nodes}
        self._notes = {node.name or "": node.meta for node in graphs.plain.graph}
        source = {node.name or "": node for node in graphs.source.graph}
        self._before = source | {node.name or "": node for node in graphs.plain.graph}
        came, plain = bytes_of(graphs.source.graph), bytes_of(graphs.plain.graph)
        self._bytes_before = {name: max(came.get(name, 0), plain.get(name, 0)) for name in came.keys() | plain.keys()}
        self._ms_before = milliseconds(graphs.plain.graph, kernels[0]) if kernels is not None else {}
        spent = milliseconds(graphs.result.graph, kernels[1]) if kernels is not None else {}
        self._ms_after = {row.name: row.sum_of(spent) for row in rows}
        labels = label(graphs.result.graph, [row.region for row in rows])
        self._bytes_after = bytes_by_label(graphs.result.graph, labels)
        self._place = {row.name: number for number, row in enumerate(rows)}
        self._types = element_types(graphs.result)

    def row(self, row: _Row, choices: Mapping[str, list[Choice]]) -> Node:
        told = choices.get(row.name, [])
        return self._node(
            row.name, row.main.op_type, _state(told, off=row.name in self._off), scale_of(row.main, self._types), told
        )

    def gone(self, name: str, told: list[Choice]) -> Node:
        node = self._before.get(name)
        return self._node(name, "" if node is None else node.op_type, "gone", Scales(), told)

    def _node(self, name: str, op: str, state: State, scales: Scales, told: list[Choice]) -> Node:
        notes: Mapping[str, Any] = self._notes.get(name, {})
        return Node(
            name=name,
            op=op,
            block=name[: max(name.rfind("/"), name.rfind("."), 0)],
            state=state,
            activation=scales.activation,
            weight=scales.weight,
            scale=scales.scale,
            zero_point=scales.zero_point,
            weight_scale=scales.weight_scale,
            sqnr_own=notes.get(SQNR_KEY),
            sqnr=self._sqnr.get(name),
            error=notes.get(ERROR_KEY),
            ms_before=self._ms_before.get(name),
            ms_after=self._ms_after.get(name),
            bytes_before=self._bytes_before.get(name, 0),
            bytes_after=self._bytes_after.get(self._place.get(name, -1), 0),
            why=tuple(told),
        )


def _state(told: list[Choice], *, off: bool) -> State:
    if off:
        return "backed off"
    if any(choice.action == "quantized" for choice in told):
        return "quantized"
    chosen = any(choice.step in CHOOSERS and choice.action == "kept" for choice in told)
    return "kept" if chosen or any(choice.reason == KEPT for choice in told) else "float"


def bytes_of(graph: ir.Graph) -> dict[str, int]:
    """Bytes of the initializers that each node reads, by name; one that several read counts for the first."""
    sizes: dict[str, int] = {}
    for user, size in _first_readers(graph):
        sizes[user.name or ""] = sizes.get(user.name or "", 0) + size
    return sizes


def bytes_by_label(graph: ir.Graph, labels: Mapping[str, int]) -> dict[int, int]:
    """The same by label, -1 for none."""
    sizes: dict[int, int] = {}
    for user, size in _first_readers(graph):
        place = labels.get(user.name or "", -1)
        sizes[place] = sizes.get(place, 0) + size
    return sizes


def _first_readers(graph: ir.Graph) -> Iterator[tuple[ir.Node, int]]:
    """Every initializer that nodes read: the first of them in the main graph, and its bytes."""
    seen: set[ir.Value] = set()
    for node in graph:
        inner = (user for branch in _branches(node) for user in ir.traversal.RecursiveGraphIterator(branch))
        for user in (node, *inner):
            for value in user.inputs:
                if value is not None and value.is_initializer() and value not in seen and value.const_value is not None:
                    seen.add(value)
                    yield node, value.const_value.nbytes


def _branches(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute_ in node.attributes.values():
        if attribute_.type == ir.AttributeType.GRAPH:
            yield attribute_.as_graph()
        elif attribute_.type == ir.AttributeType.GRAPHS:
            yield from attribute_.as_graphs()
