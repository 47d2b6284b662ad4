"""From hidden states to vectors of sentences and tokens: pooling, linear layers on top, length one; in float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qexport.exporter.families.builder import GraphBuilder
from qexport.exporter.families.pooling import Dense

FLOAT = ir.DataType.FLOAT


def apply(g: GraphBuilder, module: Dense, x: ir.Value) -> ir.Value:
    """A Dense module on top of ``x``."""
    scope = f"{module.place}.linear"
    x = g.linear(scope, x, (module.outputs, module.inputs), bias=module.bias)
    return x if module.activation is None else g.op(scope, module.activation, x)


def in_float32(g: GraphBuilder, x: ir.Value) -> ir.Value:
    """Leave half precision for good: sums over positions and lengths of vectors do not fit it."""
    if g.dtype == FLOAT:
        return x
    g.dtype = FLOAT
    return g.op("pooling", "Cast", x, to=FLOAT)


def _mean(g: GraphBuilder, hidden: ir.Value, mask: ir.Value) -> ir.Value:
    """Mean over unmasked positions; an empty mask gives zeros."""
    scope, last, middle = "pooling", g.constant("axis_last", [-1]), g.constant("axis_1", [1])
    weight = g.op(scope, "Unsqueeze", g.op(scope, "Cast", mask, to=FLOAT), last)
    total = g.op(scope, "ReduceSum", g.op(scope, "Mul", hidden, weight), middle, keepdims=0)
    count = g.op(scope, "Max", g.op(scope, "ReduceSum", weight, middle, keepdims=0), g.constant("tiny", 1e-9))
    return g.op(scope, "Div", total, count)


def _first(g: GraphBuilder, hidden: ir.Value, _mask: ir.Value) -> ir.Value:
    """The first position, where the tokenizer puts [CLS]."""
    return g.op("pooling", "Gather", hidden, first_position(g), axis=1)


def first_position(g: GraphBuilder) -> ir.Value:
    """The number of the first position."""
    return g.weight("first_position", np.array(0, np.int64))


def normalize(g: GraphBuilder, vector: ir.Value) -> ir.Value:
    """Length one; zeros stay zeros."""
    scope, last = "pooling", g.constant("axis_last", [-1])
    length = g.op(scope, "ReduceL2", vector, last, keepdims=1)
    return g.op(scope, "Div", vector, g.op(scope, "Max", length, g.constant("tiny_length", 1e-12)))


def where_seen(g: GraphBuilder, vectors: ir.Value, mask: ir.Value) -> ir.Value:
    """Zeros where the mask is 0."""
    seen = g.op("pooling", "Unsqueeze", g.op("pooling", "Cast", mask, to=FLOAT), g.constant("axis_last", [-1]))
    return g.op("pooling", "Mul", vectors, seen)


POOLINGS = {"mean": _mean, "cls": _first, "mean_sqrt_len_tokens": _mean}
"""By the names of sentence-transformers; the last differs from the mean in length only, which becomes one."""
