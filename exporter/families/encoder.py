"""Encoders that normalize after each sum (Vaswani et al. 2017): what BERT, RoBERTa and DistilBERT have in common.

Decomposed attention over [batch, sequence], rows padded at the end; a family gives its names, its embeddings and its
head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
from pydantic import Field, model_validator

from qexport.exporter.families.builder import GraphBuilder
from qexport.exporter.families.settings import Settings
from qexport.passes.portable import MASKED

OPSET = 20  # the first with Gelu, and what TensorRT 10.3 reads
ANCHOR = "embeddings.word_embeddings.weight"  # what stands before it in the file stands before every name
POSITIONS = "embeddings.position_embeddings.weight"
KINDS = "embeddings.token_type_embeddings"


class EncoderConfig(Settings):
    """The fields of config.json that shape the graph; others are ignored, unsupported values refused."""

    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    layer_norm_eps: float = Field(gt=0)
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"] = "gelu"
    position_embedding_type: Literal["absolute"] = "absolute"
    is_decoder: Literal[False] = False
    add_cross_attention: Literal[False] = False

    @model_validator(mode="after")
    def _heads_divide_the_hidden_size(self) -> EncoderConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} heads do not divide hidden_size {self.hidden_size}")
        return self


@dataclass(frozen=True, slots=True)
class Names:
    """Where a checkpoint has the parts of a layer, after the layer's own name; as BERT has them if not given."""

    layers: str = "encoder.layer"
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attended: str = "attention.output.dense"
    attended_norm: str = "attention.output.LayerNorm"
    inner: str = "intermediate.dense"
    outer: str = "output.dense"
    outer_norm: str = "output.LayerNorm"


def inputs(g: GraphBuilder, *names: str) -> list[ir.Value]:
    """Add inputs of token numbers and the like: int64 [batch, sequence]."""
    return [g.input(name, ir.DataType.INT64, ("batch", "sequence")) for name in names]


def embed(
    g: GraphBuilder,
    shape: EncoderConfig,
    ids: ir.Value,
    kinds: Callable[[], ir.Value] | None = None,
    first: int = 0,
) -> ir.Value:
    """Words, token types and positions, summed and normalized: [batch, sequence, hidden].

    Args:
        g: The graph.
        shape: Sizes.
        ids: Word numbers.
        kinds: Adds the token types, as anything that broadcasts; there are none if not given.
        first: Row of the table of positions that the first position has.
    """
    scope, width = "embeddings", shape.hidden_size
    length = g.op(scope, "Shape", ids, start=1, end=2)
    rows = (shape.max_position_embeddings, width)
    places = g.parameter(POSITIONS, rows, None if first == 0 else lambda table: table[first:])
    positions = g.op(scope, "Slice", places, g.constant("zero", [0]), length, g.constant("axis_0", [0]))
    total = g.op(f"{scope}.word_embeddings", "Gather", g.parameter(ANCHOR, (shape.vocab_size, width)), ids)
    if kinds is not None:
        total = g.op(scope, "Add", total, kinds())
    total = g.op(scope, "Add", total, positions)
    return g.layer_norm(f"{scope}.LayerNorm", total, width, shape.layer_norm_eps)


def encode(g: GraphBuilder, shape: EncoderConfig, names: Names, hidden: ir.Value, mask: ir.Value) -> ir.Value:
    """All layers; ``mask`` int64 [batch, sequence] is 1 where a position is attended to."""
    bias = _mask_bias(g, mask)
    for layer in range(shape.num_hidden_layers):
        hidden = _Layer(g, shape, names, f"{names.layers}.{layer}")(hidden, bias)
    return hidden


def _mask_bias(g: GraphBuilder, mask: ir.Value) -> ir.Value:
    """0 where attended and ``MASKED`` elsewhere, float [batch, 1, 1, sequence]."""
    scope = "mask"
    ones = g.op(scope, "Cast", mask, to=g.dtype)
    holes = g.op(scope, "Sub", g.constant("one", 1.0), ones)
    wide = g.op(scope, "Unsqueeze", holes, g.constant("axes_1_2", [1, 2]))
    return g.op(scope, "Mul", wide, g.constant("masked", MASKED))


def activate(g: GraphBuilder, scope: str, x: ir.Value, function: str) -> ir.Value:
    """What ``hidden_act`` names."""
    if function == "relu":
        return g.op(scope, "Relu", x)
    return g.op(scope, "Gelu", x, approximate="none" if function == "gelu" else "tanh")


@dataclass(frozen=True, slots=True)
class _Layer:
    """Appends one layer; nodes are named after the modules they come from."""

    g: GraphBuilder
    shape: EncoderConfig
    names: Names
    scope: str

    def __call__(self, hidden: ir.Value, bias: ir.Value) -> ir.Value:
        g, shape, names = self.g, self.shape, self.names
        width, inner_width = shape.hidden_size, shape.intermediate_size
        hidden = self._add(names.attended_norm, self._attention(hidden, bias), hidden)
        inner = g.linear(f"{self.scope}.{names.inner}", hidden, (inner_width, width))
        inner = activate(g, _parent(f"{self.scope}.{names.inner}"), inner, shape.hidden_act)
        outer = g.linear(f"{self.scope}.{names.outer}", inner, (width, inner_width))
        return self._add(names.outer_norm, outer, hidden)

    def _add(self, norm: str, x: ir.Value, residual: ir.Value) -> ir.Value:
        """The sum of both, normalized."""
        norm = f"{self.scope}.{norm}"
        total = self.g.op(_parent(norm), "Add", x, residual)
        return self.g.layer_norm(norm, total, self.shape.hidden_size, self.shape.layer_norm_eps)

    def _attention(self, hidden: ir.Value, bias: ir.Value) -> ir.Value:
        g, shape, names = self.g, self.shape, self.names
        scope = _parent(f"{self.scope}.{names.query}")
        size = shape.hidden_size // shape.num_attention_heads
        split = g.constant("split_heads", [0, 0, shape.num_attention_heads, size])
        merge = g.constant("merge_heads", [0, 0, shape.hidden_size])
        query, key, value = (
            self._project(name, hidden, split, order)
            for name, order in ((names.query, [0, 2, 1, 3]), (names.key, [0, 2, 3, 1]), (names.value, [0, 2, 1, 3]))
        )
        product = g.op(f"{scope}.scores", "MatMul", query, key)
        scores = g.op(scope, "Mul", product, g.constant("attention_scale", 1.0 / math.sqrt(size)))
        chances = g.op(scope, "Softmax", g.op(scope, "Add", scores, bias), axis=-1)
        context = g.op(scope, "Transpose", g.op(f"{scope}.context", "MatMul", chances, value), perm=[0, 2, 1, 3])
        square = (shape.hidden_size, shape.hidden_size)
        return g.linear(f"{self.scope}.{names.attended}", g.op(scope, "Reshape", context, merge), square)

    def _project(self, name: str, hidden: ir.Value, split: ir.Value, order: list[int]) -> ir.Value:
        """[batch, heads, sequence, size], or with the last two axes swapped."""
        scope, square = f"{self.scope}.{name}", (self.shape.hidden_size, self.shape.hidden_size)
        wide = self.g.op(scope, "Reshape", self.g.linear(scope, hidden, square), split)
        return self.g.op(scope, "Transpose", wide, perm=order)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
