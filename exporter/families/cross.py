"""Attention without a cache: of an encoder to its own tokens, and of a decoder to what an encoder found.

Keys and values of the second kind follow from the source alone. In the portable layout the encoder's graph computes
them for every layer of the decoder, as outputs ``cross_key_values.{i}.key`` and ``.value`` [batch, heads,
encoder_sequence, head size], and the decoder's graph has inputs of these names beside ``encoder_attention_mask`` int64
[batch, encoder_sequence]: no step computes them again.
"""

from __future__ import annotations

from typing import TypeAlias

import onnx_ir as ir

from qexport.exporter.families.attending import Geometry, Heads, merge_heads, split_heads
from qexport.exporter.families.builder import GraphBuilder
from qexport.passes.portable import KINDS, MASKED, cross_name

Pair: TypeAlias = tuple[ir.Value, ir.Value]  # key, value [batch, heads, encoder_sequence, head size]


def look(g: GraphBuilder, scope: str, heads: Heads, mask: ir.Value, geometry: Geometry) -> ir.Value:
    """Softmax(q k^T + mask) v, [batch, sequence, heads * head size]; scores are not scaled.

    One operator in the portable layout, where ``mask`` must have a row for each query; small ones otherwise.
    """
    query, key, value = heads
    if g.form.cached:
        context = g.op(scope, "Attention", query, key, value, mask, scale=1.0)
    else:
        scores = g.op(f"{scope}.scores", "MatMul", query, g.op(scope, "Transpose", key, perm=[0, 1, 3, 2]))
        chances = g.op(scope, "Softmax", g.op(scope, "Add", scores, mask), axis=-1)
        context = g.op(f"{scope}.context", "MatMul", chances, value)
    return merge_heads(g, scope, context, geometry)


def project(g: GraphBuilder, scope: str, hidden: ir.Value, width: int, geometry: Geometry) -> Pair:
    """Keys and values of a source ``hidden`` [batch, encoder_sequence, width], without biases."""
    sizes = (geometry.heads * geometry.dim, width)
    key, value = (
        split_heads(
            g, f"{scope}.{part}", g.linear(f"{scope}.{part}", hidden, sizes, bias=False), geometry.heads, geometry.dim
        )
        for part in ("k", "v")
    )
    return key, value


def cross_sizes(geometry: Geometry) -> tuple[str | int, ...]:
    """Shape of the keys and values of a source."""
    return "batch", geometry.heads, "encoder_sequence", geometry.dim


def given(g: GraphBuilder, layer: int, geometry: Geometry) -> Pair:
    """Inputs with the keys and values that a layer of the decoder looks at."""
    key, value = (g.input(cross_name(layer, kind), g.dtype, cross_sizes(geometry)) for kind in KINDS)
    return key, value


def source_mask(g: GraphBuilder, real: ir.Value, rows_of: ir.Value | None = None) -> ir.Value:
    """0 at tokens of the source, ``MASKED`` at padding: float [batch, 1, 1, encoder_sequence].

    Args:
        g: The graph.
        real: int64 [batch, encoder_sequence], 0 at padding.
        rows_of: Tokens [batch, sequence] that look; where given, the mask has a row for each of them.
    """
    scope = "source_mask"
    seen = seen_source(g, real)
    mask = g.op(scope, "Where", seen, g.constant("unmasked", 0.0), g.constant("masked", MASKED))
    if rows_of is None:
        return mask
    one = g.constant("one_row", [1])
    rows = g.op(scope, "Concat", one, one, g.op(scope, "Shape", rows_of, start=1, end=2), one, axis=0)
    return g.op(scope, "Expand", mask, rows)


def seen_source(g: GraphBuilder, real: ir.Value) -> ir.Value:
    """Whether there is a token, bool [batch, 1, 1, encoder_sequence]."""
    wide = g.op("source_mask", "Unsqueeze", real, g.constant("axes_1_2", [1, 2]))
    return g.op("source_mask", "Cast", wide, to=ir.DataType.BOOL)
