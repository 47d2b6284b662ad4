"""What passes that store weights in few bits share: which products they take, and what they add to a graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.base import Decision
from qexport.passes.match import Names, check_names, constant, dims, producer, replace, sweep
from qexport.passes.placement import ATTENTION, CHANNEL_AXIS, FLOATS, Site
from qexport.passes.quantize import KEPT

AXIS_OPSET, BLOCK_OPSET = 13, 21  # first opsets whose DequantizeLinear takes channels, and blocks and int4
SCALED = "a Gemm whose alpha or beta is not 1"
PRODUCTS = ("MatMul", "Gemm")
CONTRIB, CONTRIB_OPS = "com.microsoft", ("MatMulNBits", "MatMulBnb4")


@dataclass(frozen=True, slots=True)
class Choice:
    """Which products with a constant weight are taken.

    Attributes:
        min_dim: Smallest K and N worth the trouble.
        keep: Names of nodes that stay in float.
        head: Whether the product that makes an output of the model is taken too.
    """

    min_dim: int = 32
    keep: tuple[str, ...] = ()
    head: bool = True

    def linears(self, model: ir.Model) -> tuple[list[Site], list[Decision]]:
        """The products to take, and why others are not; a name in ``keep`` that no node has is a ``UsageError``.

        A weight is stored once: where anything else needs its float numbers, it stays in float for all.
        """
        check_names(self.keep, model)
        products = [node for node in model.graph if node.op_type in PRODUCTS and node.domain in ("", "ai.onnx")]
        reasons = {node: next(self._reasons(node), None) for node in products}
        willing = {node for node, reason in reasons.items() if reason is None}
        for node in willing:
            weight = node.inputs[1]
            if weight is None or weight.is_graph_output() or any(user not in willing for user in weight.consumers()):
                reasons[node] = "something else reads the float weight"
        refused = [decision(node, "skipped", reason) for node, reason in reasons.items() if reason]
        refused += [
            decision(node, "skipped", "inside a control-flow branch")
            for node in ir.traversal.RecursiveGraphIterator(model.graph)
            if node.op_type in PRODUCTS and node.graph is not model.graph
        ]
        sites = [Site(node, (0,), 1, CHANNEL_AXIS[node.op_type](node)) for node in products if reasons[node] is None]
        return sites, refused

    def _reasons(self, node: ir.Node) -> Iterator[str]:
        x, weight = node.inputs[:2]
        kernel = constant(weight)
        if x is None or x.dtype not in FLOATS or (kernel is not None and kernel.dtype not in FLOATS):
            yield "not a float operator"
        elif producer(weight, "DequantizeLinear") is not None:
            yield "already quantized"
        elif kernel is None:
            yield "weight is on the left" if constant(x) is not None else ATTENTION
        elif len(kernel.shape) != 2:
            yield "weight is not a matrix"
        elif min(kernel.numpy().shape) < self.min_dim:
            yield f"K or N below {self.min_dim}"
        if node.name in self.keep:
            yield KEPT
        if node.attributes.get_int("transA", 0) or len(dims(x) or (0, 0)) < 2:
            yield "the activation is transposed or a vector"
        if not self.head and _makes_output(node):
            yield "makes an output of the model"


class Editor:
    """Adds constants and nodes to the main graph, with names that nobody has yet."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        self._names = Names(model.graph)

    def constant(self, name: str, numbers: NDArray[np.generic]) -> ir.Value:
        """A new initializer."""
        name = self._names.fresh(name)
        tensor = ir.tensor(np.ascontiguousarray(numbers), name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(numbers.shape))
        value.type = ir.TensorType(tensor.dtype)
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        like: ir.Value | None,
        **attributes: int | list[int],
    ) -> ir.Node:
        """A node that is in no graph yet; its output has the type and shape of ``like``."""
        domain = CONTRIB if op in CONTRIB_OPS else ""
        if domain:
            self.model.opset_imports[domain] = 1
        node = ir.node(op, inputs, attributes or None, domain=domain, name=self._names.fresh(f"{name}/{op}"))
        output = node.outputs[0]
        output.name = self._names.fresh(f"{name}/{op}:0")
        if like is not None:
            output.type = None if like.dtype is None else ir.TensorType(like.dtype)
            output.shape = None if like.shape is None else like.shape.copy()
        return node

    def replace_product(self, site: Site, op: str, constants: Sequence[ir.Value], **sizes: int) -> None:
        """Put ``op`` for the product of ``site``, with ``constants`` for its weight; the bias of a Gemm is added."""
        (x, weight, *bias), output = site.node.inputs, site.node.outputs[0]
        name = str(site.node.name or (weight and weight.name))
        nodes = [self.node(op, [x, *constants], name, output, **sizes)]
        if bias and bias[0] is not None:
            nodes.append(self.node("Add", [nodes[0].outputs[0], bias[0]], name, output))
        replace([site.node], output, nodes)

    def first(self, nodes: Sequence[ir.Node]) -> None:
        """Put nodes that read constants only before all others."""
        self.graph.insert_before(self.graph[0], nodes)

    def drop(self, weights: Sequence[ir.Value]) -> None:
        """Remove those that nothing reads any more."""
        sweep(weights)


def decision(node: ir.Node, action: str, reason: str) -> Decision:
    """The decision about ``node``."""
    return Decision(node.name or "", node.op_type, action, reason)


def is_scaled(node: ir.Node) -> bool:
    """Whether a Gemm has an alpha or a beta."""
    return any(node.attributes.get_float(name, 1.0) != 1 for name in ("alpha", "beta"))


def _makes_output(node: ir.Node) -> bool:
    """Whether the product, or the only Add behind it, makes an output of the model."""
    output = node.outputs[0]
    users = set(output.consumers())
    if len(users) == 1 and not output.is_graph_output():
        (user,) = users
        output = user.outputs[0] if user.op_type == "Add" else output
    return output.is_graph_output()
