"""How fused attention takes part when a value is divided by a scale, or shifted by an offset, for each channel.

What an attention returns is, head by head, a mean of its values: it is scaled and shifted as they are. Query heads that
share a value head share its channels too.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qexport.passes.folding.axes import Ids
from qexport.passes.folding.flood import Blocked, Flood
from qexport.passes.match import dims

STATE = {"Attention": (4, 5, 6), "MultiHeadAttention": (3, 6, 7, 8, 9)}
"""Where an attention's past, lengths and biases are among its inputs; with these it is left alone."""


def attention_up(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    """Divide the values, so that the result is divided; query heads that share a value head are tied."""
    q, kv = _counts(node)
    if index != 0:
        raise Blocked("an attention keeps its values")
    shared = flood.join(_by_head(node, ids, q).reshape(kv, q // kv, -1), 1)
    flood.visit(node.inputs[2], _from_heads(shared[:, 0], ids.ndim))


def attention_down(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    """Pass the division of the values on to the result."""
    if index != 2:
        raise Blocked("an attention product reads it")
    _demand_stateless(node)
    q, kv = _counts(node)
    flood.visit(node.outputs[0], _from_heads(np.repeat(_by_head(node, ids, kv), q // kv, axis=0), ids.ndim))


def _demand_stateless(node: ir.Node) -> None:
    """Raise ``Blocked`` where anything but the result shows the values, or anything but V is added to them."""
    inputs = [node.inputs[index] for index in STATE[node.op_type] if index < len(node.inputs)]
    if any(value is not None for value in inputs) or any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        raise Blocked("an attention keeps its values")
    ranks = {len(dims(value) or ()) for value in (node.inputs[2], node.outputs[0])}
    if len(ranks) != 1 or 0 in ranks:
        raise Blocked("the heads of an attention are not known")


def _by_head(node: ir.Node, ids: Ids, heads: int) -> Ids:
    """Ids of an attention's values or result as ``[heads, size]``; the size may be 1 where it makes no difference."""
    if ids.ndim not in (3, 4) or ids.shape[0] != 1 or ids.shape[-2 if ids.ndim == 4 else 1] != 1:
        raise Blocked("channels run along positions of an attention")
    if ids.ndim == 4:
        return np.broadcast_to(ids[0, :, 0], (heads, ids.shape[3]))
    if ids.shape[2] % heads:
        raise Blocked(f"the heads of {node.op_type} are not known")
    return ids.reshape(heads, -1)


def _from_heads(ids: Ids, rank: int) -> Ids:
    return ids[None, :, None] if rank == 4 else ids.reshape(1, 1, -1)


def _counts(node: ir.Node) -> tuple[int, int]:
    """Query heads and value heads."""
    if node.op_type == "MultiHeadAttention":
        return node.attributes.get_int("num_heads", 1), node.attributes.get_int("num_heads", 1)
    shapes = [dims(node.inputs[0]), dims(node.inputs[2])]
    if all(shape is not None and len(shape) == 4 for shape in shapes):
        counts = [shape[1] for shape in shapes if shape is not None]
        if isinstance(counts[0], int) and isinstance(counts[1], int):
            return counts[0], counts[1]
    q, kv = (node.attributes.get_int(name, 0) for name in ("q_num_heads", "kv_num_heads"))
    if q <= 0 or kv <= 0:
        raise Blocked("the heads of an attention are not known")
    return q, kv
