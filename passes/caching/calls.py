"""Work out values of a decoder graph for made-up calls: what they are says more than how an exporter spelt them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes import match
from qexport.passes.portable import IDS, MASK, POSITIONS

Arrays: TypeAlias = Mapping[ir.Value, NDArray[Any]]


class UnknownValue(Exception):
    """A value cannot be worked out; the message says why."""


class Call:
    """``batch`` rows of ``new`` tokens behind ``past`` earlier ones.

    Args:
        graph: The graph; only its parts that are asked for are ever run.
        sizes: Earlier tokens, new tokens, rows.
        caches: Inputs with the caches, and inner values with what a cache and the new columns make together.
    """

    def __init__(
        self, graph: ir.Graph, sizes: tuple[int, int, int], caches: tuple[Sequence[ir.Value], Sequence[ir.Value]]
    ) -> None:
        self.past, self.new, self.batch = sizes
        self.total = self.past + self.new
        self._opset = graph.opset_imports.get("", 1)
        self._known = dict(_inputs(graph, *sizes))
        for values, length in zip(caches, (self.past, self.total), strict=True):
            self._known |= {value: _zeros(value, self.batch, length) for value in values}
        self._sizes = _named_sizes(self._known)
        self._found: dict[ir.Value, NDArray[Any]] = {}

    def look_up(self, value: ir.Value) -> NDArray[Any]:
        """A small value that depends on the inputs and the lengths of the caches alone; remembered for others.

        Raises:
            UnknownValue: As ``work_out``.
        """
        if value not in self._found:
            (self._found[value],) = self.work_out([value], self._found)
        return self._found[value]

    def work_out(self, wanted: Sequence[ir.Value], given: Arrays) -> list[NDArray[Any]]:
        """The values ``wanted`` where the values ``given`` are as they are given.

        Raises:
            UnknownValue: They depend on something that is not known here, or the nodes cannot be run.
        """
        nodes, leaves = self._cone(wanted, given)
        return _run(nodes, leaves, wanted, self._opset)

    def integers(self, wanted: ir.Value, given: Arrays) -> list[int]:
        """Single integers among the constants that ``wanted`` is computed from."""
        _, leaves = self._cone([wanted], given)
        singles = [array for array in leaves.values() if array.size == 1 and array.dtype.kind == "i"]
        return [int(array.item()) for array in singles]

    def _cone(self, wanted: Sequence[ir.Value], given: Arrays) -> tuple[list[ir.Node], dict[str, NDArray[Any]]]:
        """The nodes between what is known and what is wanted, in order, and what is known by name."""
        nodes: dict[ir.Node, None] = {}
        leaves: dict[str, NDArray[Any]] = {}
        todo: list[tuple[ir.Value, bool]] = [(value, False) for value in wanted]
        while todo:
            value, visited = todo.pop()
            node = value.producer()
            array = given[value] if value in given else self._read(value)
            if array is not None:
                leaves[str(value.name)] = array
            elif node is None:
                raise UnknownValue(f"depends on {value.name!r}")
            elif visited:
                nodes.setdefault(node)
            elif node not in nodes:
                if node.domain != "" or any(a.type in _BODIES for a in node.attributes.values()):
                    raise UnknownValue(f"depends on {node.name} ({node.op_type})")
                todo.append((value, True))
                todo.extend((source, False) for source in node.inputs if source is not None)
        return list(nodes), leaves

    def _read(self, value: ir.Value) -> NDArray[Any] | None:
        if value in self._known:
            return self._known[value]
        node = match.producer(value, "Shape")
        if node is None:
            return match.array(value)
        shape = [self._sizes.get(size) if isinstance(size, str) else size for size in match.dims(node.inputs[0]) or ()]
        shape = shape[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(shape))]
        return np.array(shape, np.int64) if shape and None not in shape else None


class Calls:
    """Calls of one graph, each made once; ``past`` and ``present`` as in ``Call``."""

    def __init__(self, graph: ir.Graph, past: Sequence[ir.Value], present: Sequence[ir.Value]) -> None:
        self._graph, self._caches = graph, (past, present)
        self._made: dict[tuple[int, int, int], Call] = {}

    def at(self, past: int, new: int, batch: int = 1) -> Call:
        """The call of these sizes."""
        sizes = (past, new, batch)
        if sizes not in self._made:
            self._made[sizes] = Call(self._graph, sizes, self._caches)
        return self._made[sizes]


_BODIES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _inputs(graph: ir.Graph, past: int, new: int, batch: int) -> Iterator[tuple[ir.Value, NDArray[Any]]]:
    rows = {IDS: np.zeros(new), MASK: np.ones(past + new), POSITIONS: np.arange(past, past + new)}
    for value in graph.inputs:
        if value.name in rows and value.dtype is not None:
            yield value, np.tile(rows[value.name].astype(value.dtype.numpy()), (batch, 1))


def _zeros(value: ir.Value, batch: int, length: int) -> NDArray[Any]:
    """Zeros in the shape of a cache [batch, heads, length, size], that take no memory."""
    shape = match.dims(value)
    assert shape is not None
    assert value.dtype is not None
    sizes = [size if isinstance(size, int) else 1 for size in shape]
    return np.broadcast_to(np.zeros((), value.dtype.numpy()), (batch, sizes[1], length, sizes[3]))


def _named_sizes(known: Arrays) -> dict[str, int | None]:
    """What the names of sizes stand for in a call; ``None`` for a name that stands for several."""
    sizes: dict[str, int | None] = {}
    for value, array in known.items():
        for name, size in zip(match.dims(value) or (), array.shape, strict=True):
            if isinstance(name, str):
                sizes[name] = size if sizes.get(name, size) == size else None
    return sizes


def _run(
    nodes: Sequence[ir.Node], leaves: dict[str, NDArray[Any]], wanted: Sequence[ir.Value], opset: int
) -> list[NDArray[Any]]:
    import onnx
    from onnx.reference import ReferenceEvaluator

    names = [str(value.name) for value in wanted]
    starts, ends = ([onnx.ValueInfoProto(name=name) for name in side] for side in (leaves, dict.fromkeys(names)))
    graph = onnx.helper.make_graph([ir.serde.serialize_node(node) for node in nodes], "call", starts, ends)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        with np.errstate(all="ignore"):
            found = ReferenceEvaluator(model).run(list(dict.fromkeys(names)), leaves)
    except Exception as error:  # operators are run by numpy, which raises whatever it likes
        raise UnknownValue(f"cannot be run: {str(error).splitlines()[0][:80] if str(error) else error!r}") from error
    by_name = dict(zip(dict.fromkeys(names), found, strict=True))
    return [np.asarray(by_name[name]) for name in names]
