"""Which node of a file each operator of the runtime's profile stands for, also where the runtime has merged several."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from qexport.exporter.precision.costs import CONVOLUTIONS, PRODUCTS, owners
from qexport.exporter.precision.regions import PAIR, Region, label
from qexport.runtime.profile import Kernel

WORKING = {*PRODUCTS, *CONVOLUTIONS}
_BEHIND = {
    *PAIR,
    "Relu",
    "Clip",
    "Add",
    "Sum",
    "Mul",
    "Sigmoid",
    "Tanh",
    "LeakyRelu",
    "HardSigmoid",
    "BatchNormalization",
}
"""What runtimes merge with the product or convolution before it."""
_STEPS = 4  # at most


def nodes_of(graph: ir.Graph, kernels: Sequence[Kernel]) -> list[ir.Node | None]:
    """Return the node of each kernel, ``None`` for what belongs to none.

    A kernel is called after the last node in it. One that multiplies belongs to the product or convolution that it
    began with, of which each has one kernel.
    """
    named = [node for node in graph if node.name]
    labels = label(graph, [Region((node.name or "",), (node.op_type,)) for node in named])
    found: list[ir.Node | None] = []
    taken: set[ir.Node] = set()
    for kernel, owner in zip(kernels, owners(kernels, labels), strict=True):
        node = named[owner] if owner >= 0 else None
        if node is not None and kernel.op in WORKING and node.op_type not in WORKING:
            node = _worker(node, taken) or node
        if node is not None and kernel.op in WORKING:
            taken.add(node)
        found.append(node)
    return found


def _worker(last: ir.Node, taken: Collection[ir.Node]) -> ir.Node | None:
    """The nearest product or convolution before ``last`` that has no kernel yet."""
    level = [last]
    for _ in range(_STEPS):
        above = (value.producer() for node in level if node.op_type in _BEHIND for value in node.inputs if value)
        level = [node for node in above if node is not None]
        free = [node for node in level if node.op_type in WORKING and node not in taken]
        if free:
            return free[0]
    return None


def milliseconds(graph: ir.Graph, kernels: Sequence[Kernel]) -> dict[str, float]:
    """What each node takes, by name; those that have no kernel of their own are left out."""
    spent: dict[str, float] = {}
    for node, kernel in zip(nodes_of(graph, kernels), kernels, strict=True):
        if node is not None:
            spent[node.name or ""] = spent.get(node.name or "", 0.0) + 1e3 * kernel.seconds
    return spent
