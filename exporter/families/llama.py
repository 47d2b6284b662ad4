"""Llama decoders (Touvron et al. 2023) from config.json and safetensors, without torch.

Inputs ``input_ids``, ``attention_mask``: int64 [batch, sequence], padded at the end. Output ``logits`` float32
[batch, sequence, vocabulary]: position ``t`` scores the token at ``t + 1`` and sees the unmasked positions up to ``t``.
Positions count from the start of the row. What stands at a masked position means nothing.

Grouped queries (Ainslie et al. 2023), rotary positions (Su et al. 2021) with the halves of a head as pairs, as in
transformers, RMSNorm (Zhang & Sennrich 2019), SwiGLU (Shazeer 2020). Normalization and rotation are written in small
operators that every target reads; ``fuse-rms-norm`` makes one of the former.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from qexport.exporter.families.builder import COPY, MAX_POSITIONS, GraphBuilder, Weights, open_weights
from qexport.exporter.families.folder import Folder

OPSET = 20  # what TensorRT 10.3 reads
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Frequencies = NDArray[np.floating[Any]]  # [head_dim / 2], radians per position
MASKED = -10000.0  # stands in for masked scores; exp() of it is 0 and it fits float16
MOST_POSITIONS, MOST_DIM = 1 << 18, 1 << 9  # bounds of the rotary tables, which no weight bears out


class Rope(BaseModel):
    """How positions become angles: ``rope_parameters``, or the older ``rope_scaling`` with ``rope_theta`` beside it.

    The last four fields say how frequencies are scaled; see ``SCALINGS``.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    rope_type: Literal["default", "linear", "llama3"] = "default"
    rope_theta: float = Field(default=10000.0, gt=0)
    partial_rotary_factor: float = Field(default=1.0, ge=1, le=1)
    factor: float = Field(default=1.0, ge=1)
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)
    original_max_position_embeddings: int = Field(default=8192, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Rope:
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError("low_freq_factor is not below high_freq_factor")
        return self


class LlamaConfig(BaseModel):
    """The fields of config.json that shape the graph; others are ignored, unsupported values refused."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_type: Literal["llama"]
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, le=MOST_DIM, multiple_of=2)
    intermediate_size: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0, le=MOST_POSITIONS)
    rms_norm_eps: float = Field(gt=0)
    rope_parameters: Rope
    hidden_act: Literal["silu", "swish"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, given: Any) -> Any:
        """Fill in what follows from other fields, and read the older spelling of the rotary settings."""
        if not isinstance(given, dict):
            return given
        heads, width = given.get("num_attention_heads"), given.get("hidden_size")
        known = {key: value for key, value in given.items() if value is not None}
        known.setdefault("num_key_value_heads", heads)
        if "head_dim" not in known and isinstance(heads, int) and isinstance(width, int) and heads > 0:
            if width % heads:
                raise ValueError(f"{heads} heads do not divide hidden_size {width}")
            known["head_dim"] = width // heads
        rope = known.get("rope_parameters", known.get("rope_scaling", {}))
        if isinstance(rope, dict):
            outer = {key: known[key] for key in ("rope_theta", "partial_rotary_factor") if key in known}
            known["rope_parameters"] = {**outer, "rope_type": rope.get("type", "default"), **rope}
        return known

    @model_validator(mode="after")
    def _heads_share_keys(self) -> LlamaConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_key_value_heads} key heads do not divide {self.num_attention_heads} heads")
        return self


def build(config: dict[str, object], folder: Folder) -> ir.Model:
    """Build the graph; peak memory is the weights once, as float32, and tied embeddings twice."""
    shape = LlamaConfig.model_validate(config)
    weights = open_weights(folder.weights(), TABLE)
    g = GraphBuilder(shape.model_type, OPSET)
    ids, mask = (g.input(name, ir.DataType.INT64, ("batch", "sequence")) for name in ("input_ids", "attention_mask"))
    table = weights(TABLE, (shape.vocab_size, shape.hidden_size))
    hidden = g.op("model.embed_tokens", "Gather", g.weight(TABLE, table), ids)
    length = g.op("model", "Shape", ids, start=1, end=2)
    layer = _Layer(g, shape, weights, _allowed(g, mask, length), _rotary(g, shape, length))
    for index in range(shape.num_hidden_layers):
        hidden = layer(f"model.layers.{index}", hidden)
    hidden = g.rms_norm("model.norm", hidden, weights, shape.hidden_size, shape.rms_norm_eps)
    logits = g.op("lm_head", "MatMul", hidden, _head(g, shape, weights, table))
    g.output(logits, "logits", ir.DataType.FLOAT, ("batch", "sequence", shape.vocab_size))
    model = ir.Model(g.graph, ir_version=10, producer_name="qexport")
    model.metadata_props[MAX_POSITIONS] = str(shape.max_position_embeddings)
    return model


def _head(g: GraphBuilder, shape: LlamaConfig, weights: Weights, table: NDArray[Any]) -> ir.Value:
    """The output matrix [hidden, vocabulary]; of tied embeddings a copy, which quantizes like any other weight."""
    rows = table if shape.tie_word_embeddings else weights(HEAD, table.shape)
    head = g.weight(HEAD, np.ascontiguousarray(rows.T))
    if shape.tie_word_embeddings:
        head.meta[COPY] = TABLE
    return head


def _allowed(g: GraphBuilder, mask: ir.Value, length: ir.Value) -> ir.Value:
    """0 where a query may look and ``MASKED`` elsewhere, float [batch, 1, sequence, sequence]."""
    scope = "mask"
    zero, one = (g.weight(f"{name}_position", np.array(n, np.int64)) for name, n in (("first", 0), ("next", 1)))
    keys = g.op(scope, "Range", zero, g.op(scope, "Squeeze", length), one)
    queries = g.op(scope, "Unsqueeze", keys, g.constant("axis_1", [1]))
    real = g.op(scope, "Cast", g.op(scope, "Unsqueeze", mask, g.constant("axes_1_2", [1, 2])), to=ir.DataType.BOOL)
    seen = g.op(scope, "And", g.op(scope, "LessOrEqual", keys, queries), real)
    return g.op(scope, "Where", seen, g.constant("unmasked", 0.0), g.constant("masked", MASKED))


def _rotary(g: GraphBuilder, shape: LlamaConfig, length: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine of every position, both halves alike: float [sequence, head_dim]."""
    scope, angles = "model.rotary_emb", rotary_angles(shape)

    def rows(name: str, table: NDArray[np.float32]) -> ir.Value:
        first, axis = g.constant("zero", [0]), g.constant("axis_0", [0])
        half = g.op(scope, "Slice", g.weight(f"{scope}.{name}", table), first, length, axis)
        return g.op(scope, "Concat", half, half, axis=-1)

    return rows("cos", np.cos(angles)), rows("sin", np.sin(angles))


def rotary_angles(shape: LlamaConfig) -> NDArray[np.float32]:
    """Angle of every position and pair, float32 [max_position_embeddings, head_dim / 2] (Su et al. 2021, eq. 15)."""
    rope = shape.rope_parameters
    exponents = np.arange(0, shape.head_dim, 2, dtype=np.float32) / np.float32(shape.head_dim)
    frequencies = SCALINGS[rope.rope_type](1 / np.float32(rope.rope_theta) ** exponents, rope)
    return np.outer(np.arange(shape.max_position_embeddings, dtype=np.float32), frequencies.astype(np.float32))


def _llama3(frequencies: Frequencies, rope: Rope) -> Frequencies:
    """Long waves are stretched by ``factor``, short ones stay, a ramp lies between (Llama 3.1's reference code)."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    ramp = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    scaled: Frequencies = (1 - ramp) * frequencies / rope.factor + ramp * frequencies
    return scaled


SCALINGS: dict[str, Callable[[Frequencies, Rope], Frequencies]] = {
    "default": lambda frequencies, rope: frequencies,
    "linear": lambda frequencies, rope: frequencies / rope.factor,
    "llama3": _llama3,
}
"""By ``rope_type``."""


class _Layer:
    """Appends one layer after the other; all share the mask and the rotation."""

    def __init__(
        self,
        g: GraphBuilder,
        shape: LlamaConfig,
        weights: Weights,
        allowed: ir.Value,
        rotary: tuple[ir.Value, ir.Value],
    ) -> None:
        self.g, self.shape, self.weights, self.allowed, self.rotary = g, shape, weights, allowed, rotary

    def __call__(self, scope: str, hidden: ir.Value) -> ir.Value:
        """[batch, sequence, hidden] to the same."""
        g = self.g
        hidden = g.op(scope, "Add", hidden, self._attention(f"{scope}.self_attn", self._norm(scope, "input", hidden)))
        return g.op(scope, "Add", hidden, self._mlp(f"{scope}.mlp", self._norm(scope, "post_attention", hidden)))

    def _norm(self, scope: str, part: str, hidden: ir.Value) -> ir.Value:
        width, epsilon = self.shape.hidden_size, self.shape.rms_norm_eps
        return self.g.rms_norm(f"{scope}.{part}_layernorm", hidden, self.weights, width, epsilon)

    def _mlp(self, scope: str, x: ir.Value) -> ir.Value:
        g, wide, narrow, bias = self.g, self.shape.intermediate_size, self.shape.hidden_size, self.shape.mlp_bias
        gate = g.linear(f"{scope}.gate_proj", x, self.weights, (wide, narrow), bias=bias)
        up = g.linear(f"{scope}.up_proj", x, self.weights, (wide, narrow), bias=bias)
        gate = g.op(f"{scope}.act_fn", "Mul", gate, g.op(f"{scope}.act_fn", "Sigmoid", gate))
        inner = g.op(scope, "Mul", gate, up)
        return g.linear(f"{scope}.down_proj", inner, self.weights, (narrow, wide), bias=bias)

    def _attention(self, scope: str, x: ir.Value) -> ir.Value:
        g, shape = self.g, self.shape
        heads, dim, width = shape.num_attention_heads, shape.head_dim, shape.num_attention_heads * shape.head_dim
        query = self._rotate(scope, self._project(f"{scope}.q_proj", x, heads))
        key = self._rotate(scope, self._project(f"{scope}.k_proj", x, shape.num_key_value_heads))
        value = self._shared(scope, self._project(f"{scope}.v_proj", x, shape.num_key_value_heads))
        keys = g.op(scope, "Transpose", self._shared(scope, key), perm=[0, 1, 3, 2])
        scores = g.op(f"{scope}.scores", "MatMul", query, keys)
        scores = g.op(scope, "Mul", scores, g.constant("attention_scale", 1.0 / math.sqrt(dim)))
        chances = g.op(scope, "Softmax", g.op(scope, "Add", scores, self.allowed), axis=-1)
        context = g.op(scope, "Transpose", g.op(f"{scope}.context", "MatMul", chances, value), perm=[0, 2, 1, 3])
        merged = g.op(scope, "Reshape", context, g.constant("merge_heads", [0, 0, width]))
        sizes = (shape.hidden_size, width)
        return g.linear(f"{scope}.o_proj", merged, self.weights, sizes, bias=shape.attention_bias)

    def _project(self, scope: str, x: ir.Value, heads: int) -> ir.Value:
        """[batch, heads, sequence, head_dim]."""
        dim, bias = self.shape.head_dim, self.shape.attention_bias
        wide = self.g.linear(scope, x, self.weights, (heads * dim, self.shape.hidden_size), bias=bias)
        split = self.g.op(scope, "Reshape", wide, self.g.constant(f"split_{heads}_heads", [0, 0, heads, dim]))
        return self.g.op(scope, "Transpose", split, perm=[0, 2, 1, 3])

    def _rotate(self, scope: str, x: ir.Value) -> ir.Value:
        """``x cos + (-second half, first half) sin``."""
        g, half, (cos, sin) = self.g, self.shape.head_dim // 2, self.rotary
        start, middle, end, last = (
            g.constant(*pair) for pair in (("zero", [0]), ("half_head", [half]), ("head", [2 * half]), ("last", [-1]))
        )
        first, second = g.op(scope, "Slice", x, start, middle, last), g.op(scope, "Slice", x, middle, end, last)
        turned = g.op(scope, "Concat", g.op(scope, "Neg", second), first, axis=-1)
        return g.op(scope, "Add", g.op(scope, "Mul", x, cos), g.op(scope, "Mul", turned, sin))

    def _shared(self, scope: str, x: ir.Value) -> ir.Value:
        """Every key or value head once for each of its queries, so that there are as many as query heads."""
        g, heads, dim = self.g, self.shape.num_attention_heads, self.shape.head_dim
        times = heads // self.shape.num_key_value_heads
        if times == 1:
            return x
        apart = g.op(scope, "Unsqueeze", x, g.constant("axis_2", [2]))
        many = g.op(scope, "Expand", apart, g.constant("queries_per_key", [1, 1, times, 1, 1]))
        return g.op(scope, "Reshape", many, g.constant("all_heads", [0, heads, -1, dim]))
