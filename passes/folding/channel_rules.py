"""How operators take part when a value is divided by a scale for each channel: one row for each operator.

A *produce* rule says what must be divided so that a node's output is; a *consume* rule says what happens to a node when
one of its inputs is divided. Scales are positive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from qexport.passes.folding.attention_rules import attention_down, attention_up
from qexport.passes.folding.axes import DOWN, UP, Ids, only_along
from qexport.passes.folding.flood import FLOATS, Blocked, Flood, Fork
from qexport.passes.match import array, dims, is_cache

VECTOR = "a product with a vector"
Rule = Callable[[Flood, ir.Node, int, Ids], None]
"""``(flood, node, index of the output or input, its ids)``."""
CONTRIBUTED = {"MultiHeadAttention": "com.microsoft"}
"""Operators that are not ONNX's own, and whose they are."""


LAYOUT = ("Reshape", "Flatten", "Transpose", "Unsqueeze", "Squeeze", "Slice", "Split", "Concat")


def find_rule(table: Mapping[str, Rule], node: ir.Node) -> Rule | None:
    """The row of an operator, if it is the one that the table means: others may have its name in another domain."""
    return table.get(node.op_type) if node.domain == CONTRIBUTED.get(node.op_type, "") else None


def produce(flood: Flood, value: ir.Value, ids: Ids) -> None:
    """Divide ``value`` at its source."""
    node = value.producer()
    if node is None and is_cache(value):
        return  # zeros, or what this model has written
    if node is None:
        raise Blocked("it is an input of the model" if value.is_graph_input() else "it is a constant")
    rule = find_rule(PRODUCE, node)
    if rule is None:
        raise Blocked(f"{node.op_type} makes it, which no scale goes through")
    rule(flood, node, value.index() or 0, ids)


def consume(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    """Undo or pass on the division where ``node`` reads it."""
    rule = find_rule(CONSUME, node)
    if rule is None:
        raise Blocked(f"{node.op_type} reads it, which no scale goes through")
    rule(flood, node, index, ids)


def _computed(value: ir.Value | None) -> bool:
    return value is not None and array(value) is None


def _layout_up(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    if node.op_type == "Concat":
        for place, value in enumerate(node.inputs):
            flood.visit(value, UP["Concat"](node, place, ids))
        return
    flood.visit(node.inputs[0], UP[node.op_type](node, index, ids))


def _layout_down(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    if node.op_type == "Split":
        for place, value in enumerate(node.outputs):
            flood.visit(value, DOWN["Split"](node, place, ids))
        return
    flood.visit(node.outputs[0], DOWN[node.op_type](node, index, ids))


def _gather_up(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    """Rows of a constant table are divided in the table."""
    if _computed(node.inputs[0]):
        _layout_up(flood, node, index, ids)
        return
    along, table = only_along(ids, -1), array(node.inputs[0])
    if along is None or table is None or table.ndim < 2 or node.attributes.get_int("axis", 0) != 0:
        raise Blocked("a table is read across its channels")
    flood.slot(node, 0, along, -1)


def _pointwise_up(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    if index != 0:
        raise Blocked(f"{node.op_type} makes it, which no scale goes through")
    flood.visit(node.inputs[0], ids)


def _pointwise_down(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    if index != 0:
        raise Blocked(f"{node.op_type} reads it as a parameter")
    flood.visit(node.outputs[0], ids)


def _cast_up(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    if node.inputs[0] is None or node.inputs[0].dtype not in FLOATS:
        raise Blocked("it was cast from integers")
    _pointwise_up(flood, node, index, ids)


def _cast_down(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    if node.attributes.get_int("to", 0) not in FLOATS:
        raise Blocked("its channels become integers")
    _pointwise_down(flood, node, index, ids)


def _pool_up(flood: Flood, node: ir.Node, _: int, ids: Ids) -> None:
    flood.visit(node.inputs[0], _image(ids))


def _pool_down(flood: Flood, node: ir.Node, _: int, ids: Ids) -> None:
    flood.visit(node.outputs[0], _image(ids))


def _image(ids: Ids) -> Ids | None:
    """Ids that run along the channel axis of an image only."""
    return None if only_along(ids, 1) is None else ids


def _expand_up(flood: Flood, node: ir.Node, _: int, ids: Ids) -> None:
    flood.visit(node.inputs[0], flood.narrow(ids, node.inputs[0]))


def _wide_down(flood: Flood, node: ir.Node, _: int, ids: Ids) -> None:
    flood.visit(node.outputs[0], _widen(ids, node.outputs[0]))


def _widen(ids: Ids, value: ir.Value) -> Ids | None:
    """Ids of a result from those of an operand that is broadcast to it."""
    shape = dims(value)
    return None if shape is None else ids.reshape([1] * (len(shape) - ids.ndim) + list(ids.shape))


def _sum_up(flood: Flood, node: ir.Node, _: int, ids: Ids) -> None:
    for index, value in enumerate(node.inputs):
        if _computed(value):
            flood.visit(value, flood.narrow(ids, value))
        else:
            flood.slot(node, index, ids, -1)


def _sum_down(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    wide = _widen(ids, node.outputs[0])
    if wide is None:
        raise Blocked("the rank of a sum is not known")
    other = 1 - index
    if _computed(node.inputs[other]):
        flood.visit(node.inputs[other], flood.narrow(wide, node.inputs[other]))
    else:
        flood.slot(node, other, wide, -1)
    flood.visit(node.outputs[0], wide)


def _product_up(flood: Flood, node: ir.Node, _: int, ids: Ids) -> None:
    constants = [index for index, value in enumerate(node.inputs) if not _computed(value)]
    if constants:
        flood.slot(node, constants[0], ids, -1)
        return
    if node.inputs[0] is node.inputs[1]:
        raise Blocked("a square makes it, which no scale goes through")
    if node not in flood.choices:
        raise Fork(node)
    value = node.inputs[flood.choices[node]]
    flood.visit(value, flood.narrow(ids, value))


def _product_down(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    other = node.inputs[1 - index]
    if other in flood.known:
        raise Blocked("both factors of a product would be scaled")
    wide = _widen(ids, node.outputs[0])
    if _computed(other):
        flood.visit(node.outputs[0], wide)
    else:
        flood.slot(node, 1 - index, wide, 1)


def _quotient_up(flood: Flood, node: ir.Node, _: int, ids: Ids) -> None:
    if _computed(node.inputs[1]):
        flood.visit(node.inputs[0], flood.narrow(ids, node.inputs[0]))
    else:
        flood.slot(node, 1, ids, 1)


def _quotient_down(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    wide = _widen(ids, node.outputs[0])
    if index != 0:
        raise Blocked("a denominator reads it, which no scale goes through")
    if _computed(node.inputs[1]):
        flood.visit(node.outputs[0], wide)
    else:
        flood.slot(node, 1, wide, -1)


def _norm(last: bool, *parameters: int) -> Rule:
    """A normalization whose ``parameters`` scale and shift the last axis, or that of image channels."""

    def rule(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
        along = only_along(ids, -1 if last else 1)
        axis, rank = node.attributes.get_int("axis", -1), ids.ndim
        if along is None or index != 0 or (last and axis not in (-1, rank - 1)):
            raise Blocked(f"{node.op_type} normalizes over more than the channels")
        for parameter in parameters:
            if parameter < len(node.inputs) and node.inputs[parameter] is not None:
                flood.slot(node, parameter, along, -1)

    return rule


def _matmul_up(flood: Flood, node: ir.Node, _: int, ids: Ids) -> None:
    if _computed(node.inputs[1]):
        _value_up(flood, node.inputs[1], ids)
        return
    kernel = array(node.inputs[1])
    if kernel is None or kernel.ndim < 2:
        raise Blocked(VECTOR)
    along = only_along(ids, -1)
    if along is None:
        raise Blocked("channels run along the rows of a product")
    flood.slot(node, 1, along, -1)


def _value_up(flood: Flood, value: ir.Value | None, ids: Ids) -> None:
    """The right factor of a product of computed values has the channels of the result, but for its inner axis."""
    if len(dims(value) or ()) < 2:
        raise Blocked(VECTOR)
    if ids.ndim < 2 or ids.shape[-2] != 1:
        raise Blocked("channels run along the rows of a product")
    flood.visit(value, flood.narrow(ids, value))


def _matmul_down(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    if index == 1:
        if ids.ndim < 2 or ids.shape[-2] != 1:
            raise Blocked("an attention product reads it")
        if len(dims(node.inputs[0]) or ()) < 2:
            raise Blocked(VECTOR)
        flood.visit(node.outputs[0], _widen(ids, node.outputs[0]))
        return
    along, kernel = only_along(ids, -1), array(node.inputs[1])
    if kernel is None or along is None:
        raise Blocked("an attention product reads it")
    if kernel.ndim < 2:
        raise Blocked(VECTOR)
    flood.slot(node, 1, along[:, None], 1, weight=True)


def _gemm_up(flood: Flood, node: ir.Node, _: int, ids: Ids) -> None:
    along = only_along(ids, -1)
    if along is None:
        raise Blocked("channels run along the rows of a product")
    flood.slot(node, 1, along[:, None] if node.attributes.get_int("transB", 0) else along, -1)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        flood.slot(node, 2, along, -1)


def _gemm_down(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    along = only_along(ids, 0 if node.attributes.get_int("transA", 0) else 1)
    if index != 0 or along is None:
        raise Blocked("Gemm reads it as a weight or bias")
    flood.slot(node, 1, along if node.attributes.get_int("transB", 0) else along[:, None], 1, weight=True)


def _conv_up(flood: Flood, node: ir.Node, _: int, ids: Ids) -> None:
    along, kernel = only_along(ids, 1), array(node.inputs[1])
    if along is None or kernel is None:
        raise Blocked("the kernel of a convolution is computed")
    tail = (1,) * (kernel.ndim - 2)
    if node.op_type == "Conv":
        flood.slot(node, 1, along.reshape(-1, 1, *tail), -1)
    else:
        flood.slot(
            node, 1, _grouped(along, node, kernel.shape[0], kernel.shape[1]).reshape(*kernel.shape[:2], *tail), -1
        )
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        flood.slot(node, 2, along, -1)


def _conv_down(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    along, kernel = only_along(ids, 1), array(node.inputs[1])
    if index != 0 or along is None or kernel is None:
        raise Blocked("the kernel of a convolution is computed")
    tail = (1,) * (kernel.ndim - 2)
    if node.op_type == "Conv":
        found = _grouped(along, node, kernel.shape[0], kernel.shape[1])
        flood.slot(node, 1, found.reshape(*kernel.shape[:2], *tail), 1, weight=True)
    else:
        flood.slot(node, 1, along.reshape(-1, 1, *tail), 1, weight=True)


def _grouped(along: Ids, node: ir.Node, rows: int, columns: int) -> Ids:
    """Channel of each ``[row, column]`` of a kernel whose columns count within the group of the row."""
    groups = node.attributes.get_int("group", 1)
    group = np.arange(rows) // (rows // groups)
    every = np.broadcast_to(along, (groups * columns,))
    found: Ids = every[group[:, None] * columns + np.arange(columns)]
    return found


def _cache(flood: Flood, node: ir.Node, _: int, ids: Ids) -> None:
    """A cache, the rows that are written into it, and what it is then, are divided alike."""
    if ids.ndim != 4 or ids.shape[node.attributes.get_int("axis", -2)] != 1:
        raise Blocked("channels run along the columns of a cache")
    for value in (*node.inputs[:2], node.outputs[0]):
        flood.visit(value, ids)


def _nothing(_flood: Flood, _node: ir.Node, _index: int, _ids: Ids) -> None:
    """The numbers do not matter."""


PRODUCE: dict[str, Rule] = {
    **dict.fromkeys(
        ("Reshape", "Flatten", "Transpose", "Unsqueeze", "Squeeze", "Slice", "Split", "Concat"), _layout_up
    ),
    **dict.fromkeys(("Identity", "Dropout", "Relu", "LeakyRelu", "PRelu", "Neg", "Abs"), _pointwise_up),
    "Cast": _cast_up,
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _pool_up),
    **dict.fromkeys(("Add", "Sub"), _sum_up),
    **dict.fromkeys(("Attention", "MultiHeadAttention"), attention_up),
    "TensorScatter": _cache,
    **dict.fromkeys(("Conv", "ConvTranspose"), _conv_up),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), _norm(False, 1, 2)),
    **dict.fromkeys(("RMSNormalization", "SimplifiedLayerNormalization"), _norm(True, 1)),
    "LayerNormalization": _norm(True, 1, 2),
    "Gather": _gather_up,
    "Expand": _expand_up,
    "Mul": _product_up,
    "Div": _quotient_up,
    "MatMul": _matmul_up,
    "Gemm": _gemm_up,
}

CONSUME: dict[str, Rule] = {
    **dict.fromkeys(
        ("Reshape", "Flatten", "Transpose", "Unsqueeze", "Squeeze", "Slice", "Split", "Concat"), _layout_down
    ),
    **dict.fromkeys(("Identity", "Dropout", "Relu", "LeakyRelu", "PRelu", "Neg", "Abs"), _pointwise_down),
    "Cast": _cast_down,
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _pool_down),
    **dict.fromkeys(("Add", "Sub"), _sum_down),
    **dict.fromkeys(("Attention", "MultiHeadAttention"), attention_down),
    "TensorScatter": _cache,
    **dict.fromkeys(("Conv", "ConvTranspose"), _conv_down),
    **dict.fromkeys(("Shape", "Size"), _nothing),
    "Gather": _layout_down,
    "Expand": _wide_down,
    "Mul": _product_down,
    "Div": _quotient_down,
    "MatMul": _matmul_down,
    "Gemm": _gemm_down,
}
