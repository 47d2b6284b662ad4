"""Add numbers to a layer's output through its bias, or one that is made for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.match import Names, add_constant, array, consumer, operands, sweep

NO_BIAS = "no bias to fold into: an Add of its own costs time (option 'insert')"


def bias_refusal(node: ir.Node, *, insert: bool = False) -> str | None:
    """Why a product or convolution takes nothing into its bias; ``None`` where it does.

    Args:
        node: A MatMul, Gemm or Conv with a constant weight.
        insert: Whether a MatMul without a bias may get an Add; the others take a bias at no cost.
    """
    if node.op_type == "MatMul":
        return None if insert or _bias_behind(node) is not None else NO_BIAS
    if node.attributes.get_int("transA", 0):
        return "transposed activation"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    numbers = array(bias)
    if bias is not None and (numbers is None or not _is_row(numbers) or not node.attributes.get_float("beta", 1.0)):
        return "its bias is computed, switched off or different from row to row"
    return None


def raise_bias(node: ir.Node, shift: NDArray[np.float64]) -> None:
    """Add ``shift``, ``[N]``, to what a layer's product makes, through its bias; ``bias_refusal`` had no reason."""
    if node.op_type != "MatMul":
        alpha, beta = (node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
        _raise(node, 2, shift * alpha / (beta or 1.0))
        return
    behind = _bias_behind(node)
    if behind is not None:
        _raise(*behind, shift)
        return
    output, graph = node.outputs[0], node.graph
    assert graph is not None
    add = ir.node("Add", [output, None], name=Names(graph).fresh(f"{node.name}/Add"))
    made = add.outputs[0]
    made.shape, made.type = output.shape, output.type
    graph.insert_after(node, add)
    _raise(add, 1, shift)
    output.replace_all_uses_with(made, replace_graph_outputs=True)
    add.replace_input_with(0, output)
    made.name, output.name = output.name, Names(graph).fresh(f"{output.name}/product")


def _bias_behind(node: ir.Node) -> tuple[ir.Node, int] | None:
    """The Add that alone reads a product, and the index of its constant that has one number for each channel."""
    add = consumer(node.outputs[0], "Add")
    for own, bias in operands(add):
        numbers = array(bias)
        if add is not None and own is node.outputs[0] and numbers is not None and _is_row(numbers):
            return add, list(add.inputs).index(bias)
    return None


def _is_row(numbers: NDArray[Any]) -> bool:
    """Whether an array differs along its last axis at most."""
    return numbers.size == (numbers.shape[-1] if numbers.ndim else 1)


def _raise(node: ir.Node, index: int, shift: NDArray[np.float64]) -> None:
    """Replace a bias by one with ``shift`` added, made where there is none; others may share the old one."""
    old = node.inputs[index] if len(node.inputs) > index else None
    numbers = array(old)
    if old is None or numbers is None:
        like, name = node.inputs[0], f"{node.name}/bias"
        dtype = np.dtype(np.float32) if like is None or like.dtype is None else like.dtype.numpy()
        raised = shift
        node.resize_inputs(max(len(node.inputs), index + 1))
    else:
        dtype, name = numbers.dtype, f"{old.name}"
        raised = (numbers.reshape(-1).astype(np.float64) + shift).reshape([1] * (numbers.ndim - 1) + [-1])
    node.replace_input_with(index, add_constant(node, name, raised.astype(dtype)))
    sweep([old])
