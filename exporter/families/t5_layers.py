"""The two stacks of T5: blocks of attention and feed-forward with RMSNorm before each, and biases by distance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import Field, model_validator

from qexport.exporter.families.attending import Geometry, Heads, split_heads
from qexport.exporter.families.builder import GraphBuilder
from qexport.exporter.families.cross import Pair, look
from qexport.exporter.families.settings import Settings
from qexport.exporter.families.weights import Array
from qexport.passes.portable import MASKED

MOST_DISTANCE = 1 << 16  # bound of the table of distances, which no weight bears out
TABLES = ("shared.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight")
"""Names that savers have for the one table of embeddings."""


class T5Config(Settings):
    """The fields of config.json that shape the graph; others are ignored, unsupported values refused.

    ``tie_word_embeddings: false`` says of T5 that logits are not scaled, as T5 1.1 has it. transformers 5 writes
    ``scale_decoder_outputs`` instead, and ``tie_word_embeddings: true`` always. mT5 never scales.
    """

    model_type: Literal["t5", "mt5"]
    vocab_size: int = Field(gt=0)
    d_model: int = Field(gt=0)
    d_kv: int = Field(gt=0)
    d_ff: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_decoder_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    relative_attention_num_buckets: int = Field(default=32, ge=4)
    relative_attention_max_distance: int = Field(default=128, gt=0, le=MOST_DISTANCE)
    layer_norm_epsilon: float = Field(default=1e-6, gt=0)
    feed_forward_proj: Literal["relu", "gated-gelu", "gated-silu"]
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, given: Any) -> Any:
        """Fill in what follows from other fields."""
        if not isinstance(given, dict):
            return given
        known = {key: value for key, value in given.items() if value is not None}
        original = known.get("model_type") == "t5"
        known.setdefault("num_decoder_layers", known.get("num_layers"))
        known.setdefault("feed_forward_proj", "relu" if original else "gated-gelu")
        known.setdefault("scale_decoder_outputs", original and known.get("tie_word_embeddings", True))
        return known

    @model_validator(mode="after")
    def _buckets_end(self) -> T5Config:
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise ValueError("relative_attention_max_distance is not above half of relative_attention_num_buckets")
        return self

    @property
    def geometry(self) -> Geometry:
        """Heads; together they need not be as wide as the model."""
        return Geometry(self.num_heads, self.num_heads, self.d_kv)


Attend: TypeAlias = Callable[[str, Heads], ir.Value]  # [batch, sequence, heads * d_kv]


@dataclass(frozen=True, slots=True)
class Side:
    """What one stack has of its own.

    Attributes:
        name: ``encoder`` or ``decoder``.
        layers: How many blocks.
        attend: Attention of the tokens to each other, biased and masked.
        source: Keys and values of a layer that the tokens look at besides, and the mask of them.
    """

    name: str
    layers: int
    attend: Attend
    source: tuple[Callable[[int], Pair], ir.Value] | None = None


def run_stack(g: GraphBuilder, shape: T5Config, side: Side, ids: ir.Value) -> ir.Value:
    """Tokens [batch, sequence] to [batch, sequence, d_model]."""
    table = g.parameter(TABLES[0], (shape.vocab_size, shape.d_model), stored=stored_table(g))
    hidden = g.op(f"{side.name}.embed_tokens", "Gather", table, ids)
    for index in range(side.layers):
        scope = f"{side.name}.block.{index}.layer"
        hidden = _attention(g, shape, f"{scope}.0", hidden, side.attend)
        if side.source is not None:
            hidden = _cross(g, shape, f"{scope}.1", hidden, (side.source[0](index), side.source[1]))
        hidden = _feed_forward(g, shape, f"{scope}.{1 if side.source is None else 2}", hidden)
    return g.rms_norm(f"{side.name}.final_layer_norm", hidden, shape.d_model, shape.layer_norm_epsilon)


def stored_table(g: GraphBuilder) -> str:
    """What the checkpoint calls the table of embeddings."""
    return next((name for name in TABLES if name in g.weights), TABLES[0])


def _attention(g: GraphBuilder, shape: T5Config, scope: str, hidden: ir.Value, attend: Attend) -> ir.Value:
    part = f"{scope}.SelfAttention"
    x = g.rms_norm(f"{scope}.layer_norm", hidden, shape.d_model, shape.layer_norm_epsilon)
    context = attend(
        part, (_heads(g, shape, f"{part}.q", x), _heads(g, shape, f"{part}.k", x), _heads(g, shape, f"{part}.v", x))
    )
    return _added(g, shape, part, (hidden, context))


def _cross(g: GraphBuilder, shape: T5Config, scope: str, hidden: ir.Value, source: tuple[Pair, ir.Value]) -> ir.Value:
    part, (pair, mask) = f"{scope}.EncDecAttention", source
    x = g.rms_norm(f"{scope}.layer_norm", hidden, shape.d_model, shape.layer_norm_epsilon)
    context = look(g, part, (_heads(g, shape, f"{part}.q", x), *pair), mask, shape.geometry)
    return _added(g, shape, part, (hidden, context))


def _heads(g: GraphBuilder, shape: T5Config, scope: str, x: ir.Value) -> ir.Value:
    """[batch, heads, sequence, d_kv]."""
    wide = g.linear(scope, x, (shape.num_heads * shape.d_kv, shape.d_model), bias=False)
    return split_heads(g, scope, wide, shape.num_heads, shape.d_kv)


def _added(g: GraphBuilder, shape: T5Config, scope: str, values: tuple[ir.Value, ir.Value]) -> ir.Value:
    hidden, context = values
    out = g.linear(f"{scope}.o", context, (shape.d_model, shape.num_heads * shape.d_kv), bias=False)
    return g.op(scope, "Add", hidden, out)


def _feed_forward(g: GraphBuilder, shape: T5Config, scope: str, hidden: ir.Value) -> ir.Value:
    """One product and Relu, or a gated unit (Shazeer 2020)."""
    part, wide = f"{scope}.DenseReluDense", (shape.d_ff, shape.d_model)
    x = g.rms_norm(f"{scope}.layer_norm", hidden, shape.d_model, shape.layer_norm_epsilon)
    if shape.feed_forward_proj == "relu":
        inner = g.op(part, "Relu", g.linear(f"{part}.wi", x, wide, bias=False))
    else:
        gate = g.linear(f"{part}.wi_0", x, wide, bias=False)
        if shape.feed_forward_proj == "gated-gelu":
            gate = g.op(f"{part}.act", "Gelu", gate, approximate="tanh")
        else:
            gate = g.op(f"{part}.act", "Mul", gate, g.op(f"{part}.act", "Sigmoid", gate))
        inner = g.op(part, "Mul", gate, g.linear(f"{part}.wi_1", x, wide, bias=False))
    return g.op(part, "Add", hidden, g.linear(f"{part}.wo", inner, (shape.d_model, shape.d_ff), bias=False))


def biases(g: GraphBuilder, shape: T5Config, name: str, places: Pair) -> ir.Value:
    """What the distance between query and key adds to a score of every head; all layers of a stack share it.

    Args:
        g: The graph.
        shape: The config.
        name: The stack; of the decoder a key that comes after the query gets ``MASKED``.
        places: Positions of keys, int64 [keys], and of queries, int64 [..., queries, 1].

    Returns:
        [heads, ..., queries, keys].
    """
    (keys, queries), scope = places, f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias"
    count, far = shape.relative_attention_num_buckets, shape.relative_attention_max_distance
    both = name == "encoder"
    bucket = buckets(np.arange(-far, far + 1 if both else 1), count, far, both=both)

    def by_distance(rows: Array) -> Array:
        return np.ascontiguousarray(rows[bucket].T)

    table = g.parameter(f"{scope}.weight", (count, shape.num_heads), by_distance)
    low, high = (g.weight(f"{scope}/{end}", np.array(n, np.int64)) for end, n in (("low", -far), ("high", far * both)))
    distance = g.op(scope, "Sub", keys, queries)
    inside = g.op(scope, "Max", g.op(scope, "Min", distance, high), low)
    found = g.op(scope, "Gather", table, g.op(scope, "Sub", inside, low), axis=1)
    if both:
        return found
    seen = g.op(scope, "LessOrEqual", keys, queries)
    return g.op(scope, "Where", seen, found, g.constant("masked", MASKED))


def buckets(distances: NDArray[np.int64], count: int, far: int, *, both: bool) -> NDArray[np.int64]:
    """Bucket of each distance, key minus query (Raffel et al. 2020, section 2.1; the published code in float32).

    Half of the buckets are for one distance each, the others grow by a factor up to ``far``, behind which there is one
    for all. With ``both``, half of all are for keys after the query; without, such keys share the bucket of 0.
    """
    after = np.zeros_like(distances)
    if both:
        count //= 2
        after = (distances > 0) * count
    back = np.abs(distances) if both else np.maximum(-distances, 0)
    exact = count // 2
    logs = np.log(np.maximum(back, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(far / exact))
    wide = exact + (logs * np.float32(count - exact)).astype(np.int64)
    found: NDArray[np.int64] = after + np.where(back < exact, back, np.minimum(wide, count - 1))
    return found
