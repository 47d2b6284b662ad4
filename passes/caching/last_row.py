"""Logits of one token of each row, where a graph makes them of all."""

from __future__ import annotations

import onnx_ir as ir

from qexport.passes import match

_BY_TOKEN = {"MatMul", "MatMulNBits", "Cast", "RMSNormalization", "LayerNormalization"}


def select(logits: ir.Value, place: ir.Value) -> ir.Value:
    """Logits [batch, 1, vocabulary] of the tokens at ``place`` [batch, 1, 1].

    What makes logits out of each token's numbers alone, such as the head, makes only these.
    """
    value, reader = logits, None
    while (node := value.producer()) is not None and _by_token(node) and set(value.consumers()) <= {reader}:
        source = node.inputs[0]
        assert source is not None
        value.shape = None
        value, reader = source, node
    picked = ir.node("GatherND", [value, place], {"batch_dims": 1})
    made = match.maker(value)
    assert made.graph is not None
    made.graph.insert_after(made, picked)
    if reader is None:
        return picked.outputs[0]
    reader.replace_input_with(0, picked.outputs[0])
    return logits


def _by_token(node: ir.Node) -> bool:
    """Whether a node treats the tokens of its first input one by one, by what is the same for all."""
    along = node.attributes.get_int("axis", -1) in (-1, 2)
    return node.op_type in _BY_TOKEN and along and all(map(_steady, node.inputs[1:]))


def _steady(value: ir.Value | None) -> bool:
    """Whether a value is made of constants alone."""
    if value is None or match.constant(value) is not None:
        return True
    node = value.producer()
    return node is not None and all(map(_steady, node.inputs))
