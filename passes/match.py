"""What the pattern passes share: visiting nodes, reading constants and shapes, and putting one node where many were."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.errors import UsageError
from qexport.passes.base import Decision

Dims = tuple[int | str | None, ...]
"""One entry per axis: a size, the name of a symbolic size, or ``None`` where nothing is known."""

SHARED = "an intermediate is used elsewhere"
"""The reason for leaving a pattern whose inner values somebody else reads."""


def visit(model: ir.Model, *ops: str) -> Iterator[tuple[ir.Node, int]]:
    """Yield each standard node whose operator is one of ``ops``, with the opset it is read by.

    Goes through the main graph, every subgraph and every function. Nodes that the caller removed since are left out,
    so it may edit while it iterates.
    """
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for body in bodies:
        opset = body.opset_imports.get("", 1)
        for node in tuple(body.all_nodes()):
            if node.domain == "" and node.op_type in ops and node.graph is not None:
                yield node, opset


def check_names(names: Sequence[str], model: ir.Model) -> None:
    """Raise ``UsageError`` for a name that no node has, with the nearest one that exists."""
    known = {node.name or "" for node in model.graph.all_nodes()} if names else set()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"no node is called {name!r}",
                where="option 'keep'",
                hint=f"did you mean {near[0]!r}?" if near else "qexport inspect MODEL lists the nodes",
            )


def producer(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """Return the standard node that makes ``value`` if its operator is one of ``ops``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type in ops else None


def consumer(value: ir.Value, *ops: str) -> ir.Node | None:
    """Return the only node that reads ``value`` if its operator is one of ``ops`` and nobody else sees the value."""
    users = set(value.consumers())
    if len(users) != 1 or value.is_graph_output():
        return None
    (node,) = users
    return node if node.domain == "" and node.op_type in ops else None


def maker(value: ir.Value) -> ir.Node:
    """Return the node that makes a value which is known to be made by one."""
    node = value.producer()
    assert node is not None
    return node


def is_cache(value: ir.Value) -> bool:
    """Whether calls hand a value on to the next: an input that TensorScatter writes into, or what that gives back.

    Nobody else reads such a value, so it may change its form along with the model.
    """
    if value.is_graph_input():
        uses = ((node, index) for node, index in value.uses() if node.op_type == "TensorScatter")
        written = any(index == 0 and node.outputs[0].is_graph_output() for node, index in uses)
        return written and not value.is_graph_output()
    node = value.producer()
    past = node.inputs[0] if node is not None and node.op_type == "TensorScatter" else None
    return past is not None and past.is_graph_input() and value.is_graph_output()


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer or dense Constant; an initializer that a caller can override is none."""
    if value is None or value.is_graph_input():
        return None
    node = producer(value, "Constant")
    return None if node is not None and "sparse_value" in node.attributes else ir.convenience.get_const_tensor(value)


def array(value: ir.Value | None) -> NDArray[np.generic] | None:
    """Return the numbers of a constant."""
    tensor = constant(value)
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """Return the number in a constant of one element that does not raise the rank of what it is combined with."""
    tensor = constant(value)
    if tensor is None or tensor.size != 1 or len(tensor.shape) > 1 or tensor.dtype == ir.DataType.STRING:
        return None
    return float(tensor.numpy().item())


def is_scalar(value: ir.Value | None, expected: float, tolerance: float = 1e-6) -> bool:
    """Whether ``value`` is a constant scalar within a relative tolerance of ``expected``."""
    number = scalar(value)
    return number is not None and abs(number - expected) <= tolerance * abs(expected)


def operands(node: ir.Node | None) -> tuple[tuple[ir.Value, ir.Value], ...]:
    """Return the operand pairs of a binary node: both orders where the operation commutes; none of no node."""
    left, right = node.inputs[:2] if node is not None else (None, None)
    if node is None or left is None or right is None:
        return ()
    return ((left, right), (right, left)) if node.op_type in ("Add", "Mul") else ((left, right),)


def dims(value: ir.Value | None) -> Dims | None:
    """Return the shape, symbolic sizes by name; ``None`` where the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def same_dims(left: Sequence[int | str | None], right: Sequence[int | str | None]) -> bool:
    """Whether two shapes are known to be equal; two unknown sizes are not."""
    return len(left) == len(right) and all(a is not None and a == b for a, b in zip(left, right, strict=True))


def perm(node: ir.Node) -> tuple[int, ...]:
    """Return the permutation of a Transpose; empty where it is left to the default."""
    return tuple(node.attributes.get_ints("perm", ()))


def too_old(node: ir.Node, op: str, need: int, opset: int) -> Decision:
    """Return the refusal of a pattern whose replacement does not exist in the model's opset."""
    return Decision(node.name or "", op, "skipped", f"needs opset {need}, model has {opset}")


def closed(region: Collection[ir.Node], output: ir.Value) -> bool:
    """Whether ``output`` is all that anybody outside ``region`` sees of it, and it lies in one graph."""
    return all(node.graph is maker(output).graph for node in region) and all(
        value is output or not (value.is_graph_output() or any(user not in region for user in value.consumers()))
        for node in region
        for value in node.outputs
    )


def replace(region: Collection[ir.Node], output: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Put ``nodes`` where ``region`` made ``output``; the last one takes over its name, type, shape and notes.

    What only the region read (constants, casts, scalings) goes with it.
    """
    anchor = maker(output)
    assert anchor.graph is not None
    final, read = nodes[-1], [value for node in region for value in node.inputs]
    final.name = anchor.name
    final.outputs[0].meta.update(output.meta)
    final.outputs[0].metadata_props.update(output.metadata_props)
    ir.convenience.replace_nodes_and_values(anchor.graph, anchor, list(region), nodes, [output], [final.outputs[0]])
    sweep(read)


def sweep(values: Sequence[ir.Value | None]) -> None:
    """Remove the nodes and initializers behind values that nobody reads any more."""
    todo = list(values)
    while todo:
        value = todo.pop()
        node = None if value is None else value.producer()
        if value is None or value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        if (
            node is not None
            and node.graph is not None
            and not any(o.uses() or o.is_graph_output() for o in node.outputs)
        ):
            todo.extend(node.inputs)
            node.graph.remove(node, safe=True)
        elif node is None and value.is_initializer() and value.graph is not None:
            value.graph.initializers.pop(str(value.name))


class Names:
    """The names that a graph and its subgraphs use, of values and of nodes; collected once, then kept up."""

    def __init__(self, body: ir.Graph | ir.Function) -> None:
        nodes = list(body.all_nodes())
        values = [value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None]
        for graph in (body, *body.subgraphs()):
            values.extend(graph.inputs)
            values.extend(() if isinstance(graph, ir.Function) else graph.initializers.values())
        self._taken = {node.name for node in nodes} | {value.name for value in values}
        self._counts: dict[str, int] = {}

    def fresh(self, name: str) -> str:
        """Return ``name``, numbered if it is taken, and take it."""
        found, count = name, self._counts.get(name, 0)
        while found in self._taken:
            count += 1
            found = f"{name}_{count}"
        self._counts[name] = count
        self._taken.add(found)
        return found


def add_constant(anchor: ir.Node, name: str, numbers: NDArray[np.generic]) -> ir.Value:
    """Give the graph of ``anchor`` a new constant: an initializer, or a Constant node inside a function."""
    body = anchor.graph
    assert body is not None
    tensor = ir.tensor(numbers, name=name)
    if isinstance(body, ir.Function):
        node = ir.node("Constant", [], {"value": tensor})
        body.insert_before(anchor, node)
        return node.outputs[0]
    tensor.name = Names(body).fresh(name)
    value = ir.val(str(tensor.name), tensor.dtype, numbers.shape, const_value=tensor)
    body.register_initializer(value)
    return value
