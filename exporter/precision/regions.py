"""Regions of int8: what is quantized together, because taking one of it away leaves the others little to win.

1. Nodes that read the same tensor share its quantizer.
2. A node whose input comes from another one through operators that work on integers as well (Relu, MaxPool, Reshape)
   hands its integers on.
3. A residual addition ends a region: what comes after it starts anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from qexport.exporter.precision.residual import levels
from qexport.passes.match import constant

HANDED_ON = {"Relu", "Clip", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity"}
HANDED_ON |= {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Pad", "Split", "Expand", "Concat"}
PAIR = {"QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True, slots=True)
class Region:
    """Nodes to quantize together, by name, in the order of the graph."""

    nodes: tuple[str, ...]
    ops: tuple[str, ...]

    @property
    def name(self) -> str:
        """The first node, and how many more there are."""
        more = len(self.nodes) - 1
        return f"{self.nodes[0]} and {more} more" if more else self.nodes[0]


def find_regions(graph: ir.Graph, names: Collection[str]) -> tuple[Region, ...]:
    """Part the nodes called ``names`` into regions, in the order of the graph."""
    names = frozenset(names)
    chosen = [node for node in graph if node.name in names]
    depth, makers = levels(graph), _makers(graph)
    owner = {node: node for node in chosen}

    def root(node: ir.Node) -> ir.Node:
        while owner[node] is not node:
            owner[node] = owner[owner[node]]
            node = owner[node]
        return node

    def join(one: ir.Node, other: ir.Node) -> None:
        if depth[one] == depth[other]:
            owner[root(other)] = root(one)

    first: dict[ir.Value, ir.Node] = {}
    for node in chosen:
        for value in _computed(node):
            join(first.setdefault(value, node), node)
            maker = makers.get(value)
            if maker in owner:
                join(maker, node)
    groups: dict[ir.Node, list[ir.Node]] = {}
    for node in chosen:
        groups.setdefault(root(node), []).append(node)
    return tuple(Region(tuple(n.name or "" for n in g), tuple(n.op_type for n in g)) for g in groups.values())


def find_units(graph: ir.Graph, names: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """Part the nodes called ``names`` into the smallest choices that make sense, in the order of the graph.

    Every node is one of its own, but what has no weight (a residual Add) goes with the last node it reads from: its
    integers are worth nothing without the ones that come in.
    """
    names, makers = frozenset(names), _makers(graph)
    owner: dict[ir.Node | None, ir.Node] = {}
    groups: dict[ir.Node, list[str]] = {}
    for node in graph:
        if node.name in names:
            behind = [makers[value] for value in _computed(node) if makers.get(value) in owner]
            weightless = all(constant(value) is None for value in node.inputs)
            owner[node] = owner[behind[-1]] if weightless and behind else node
            groups.setdefault(owner[node], []).append(node.name or "")
    return tuple(map(tuple, groups.values()))


def _computed(node: ir.Node) -> Iterator[ir.Value]:
    """The inputs that are made by nodes; a table is looked up by integers, which nobody quantizes."""
    for value in node.inputs if node.op_type != "Gather" else ():
        if value is not None and value.producer() is not None:
            yield value


def _makers(graph: ir.Graph) -> dict[ir.Value, ir.Node]:
    """The nearest node behind each value, if any, that does more than move or clip numbers."""
    found: dict[ir.Value, ir.Node] = {}
    for node in graph:
        source = node.inputs[0] if node.op_type in HANDED_ON and node.inputs else None
        maker = node if node.op_type not in HANDED_ON else None if source is None else found.get(source)
        found.update(dict.fromkeys(node.outputs, maker) if maker is not None else {})
    return found


def label(graph: ir.Graph, regions: Collection[Region]) -> dict[str, int]:
    """Return for every node and every output by name the region whose time its own belongs to, -1 for none.

    A quantizer belongs to what reads it, everything else to the region it comes from.
    """
    home = {name: number for number, region in enumerate(regions) for name in region.nodes}
    labels: dict[ir.Node | None, int] = {}
    for node in graph:
        behind = [labels.get(value.producer(), -1) for value in node.inputs if value is not None]
        labels[node] = home.get(node.name or "", max(behind, default=-1))
    for node in reversed(graph):
        if node.op_type in PAIR:
            users = [labels[user] for output in node.outputs for user in output.consumers() if user in labels]
            labels[node] = max(users, default=-1)
    found = {}
    for node in graph:
        found[node.name or ""] = labels[node]
        # an integer kernel that swallowed the quantizer behind it goes by that one's output
        made_by = _maker(node, labels) if node.op_type in PAIR else labels[node]
        found |= {value.name or "": made_by for value in node.outputs}
    return found


def _maker(pair: ir.Node, labels: dict[ir.Node | None, int]) -> int:
    source = pair.inputs[0]
    return labels.get(source.producer(), -1) if source is not None else -1
