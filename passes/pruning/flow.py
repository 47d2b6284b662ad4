"""What is computed from what in a graph: the order of its nodes, who reads a value, and what lies between two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from heapq import heapify, heappop, heappush

import onnx_ir as ir

from qexport.passes.match import constant, maker

SIZES = ("Shape", "Size")  # what reads these of a value does not depend on its numbers


class Flow:
    """The dataflow of a graph as it is now; nodes of branches count as the node that has the branches.

    Args:
        graph: Its nodes in an order in which they can run.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._order = {node: place for place, node in enumerate(graph)}
        self.reads = {node: tuple(dict.fromkeys(_reads(node))) for node in self._order}
        self._readers: dict[ir.Value, list[ir.Node]] = {}
        for node, values in self.reads.items():
            for value in values:
                self._readers.setdefault(value, []).append(node)
        self._bits = {value: 1 << i for i, value in enumerate(v for v, r in self._readers.items() if len(r) > 1)}
        self._behind: dict[ir.Value, int] = {}
        for node, values in self.reads.items():
            seen = 0
            for value in () if _is_size(node) else values:
                seen |= self._behind.get(value, 0) | self._bits.get(value, 0)
            self._behind.update(dict.fromkeys(node.outputs, seen))

    def readers(self, value: ir.Value) -> list[ir.Node]:
        """The nodes that read a value, in order."""
        return self._readers.get(value, [])

    def sorted(self, nodes: Iterable[ir.Node]) -> tuple[ir.Node, ...]:
        """Nodes in the order of the graph."""
        return tuple(sorted(nodes, key=self._order.__getitem__))

    def depends(self, value: ir.Value, entry: ir.Value) -> bool:
        """Whether a value is computed from the numbers of another, which several nodes read."""
        return bool(self._behind.get(value, 0) & self._bits.get(entry, 0))

    def between(self, entry: ir.Value, last: ir.Node) -> set[ir.Node]:
        """The nodes that depend on ``entry`` and that ``last`` depends on, itself one of them."""
        found, todo = set[ir.Node](), [last]
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                inputs = () if _is_size(node) else self.reads[node]
                todo += [maker(value) for value in inputs if value is not entry and self.depends(value, entry)]
        return found

    def onward(self, value: ir.Value) -> Iterator[ir.Node]:
        """The nodes behind a value, in order; one that was told goes on being followed."""
        waiting = [(self._order[node], node) for node in self.readers(value)]
        heapify(waiting)
        told = set[ir.Node]()
        while waiting:
            _, node = heappop(waiting)
            if node not in told:
                told.add(node)
                yield node
                for reader in (reader for out in node.outputs for reader in self.readers(out) if reader not in told):
                    heappush(waiting, (self._order[reader], reader))

    def behind(self, nodes: Iterable[ir.Node], barrier: Collection[ir.Node] = ()) -> set[ir.Node]:
        """Nodes and all that is computed from what they make, sizes included, but for what lies behind a barrier."""
        found, todo = set[ir.Node](), list(nodes)
        while todo:
            node = todo.pop()
            if node not in found and node not in barrier:
                found.add(node)
                todo += [reader for out in node.outputs for reader in self.readers(out)]
        return found

    def makers(self, value: ir.Value, count: int) -> Counter[str]:
        """The operators of the last nodes that a value is computed by, as many as told."""
        ops, told, todo = Counter[str](), set[ir.Node](), [value]
        waiting: list[tuple[int, ir.Node]] = []
        while True:
            for one in todo:
                node = None if constant(one) is not None else one.producer()
                if node is not None and node not in told:
                    told.add(node)
                    heappush(waiting, (-self._order[node], node))
            if not waiting or ops.total() == count:
                return ops
            _, node = heappop(waiting)
            ops[node.op_type] += 1
            todo = list(self.reads[node])


def _is_size(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in SIZES


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, its branches included; values of the branches themselves have no reader elsewhere."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from (value for graph in (attribute.as_graph(),) for value in _captured(graph))
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from (value for graph in attribute.as_graphs() for value in _captured(graph))


def _captured(graph: ir.Graph) -> Iterator[ir.Value]:
    """What the nodes of a branch read, and what it hands through."""
    yield from graph.outputs
    for node in graph:
        yield from _reads(node)
