"""Decoders of the Llama kind: RMSNorm before each block, rotary positions, grouped queries, a gated MLP.

Grouped queries (Ainslie et al. 2023), rotary positions (Su et al. 2021) with the halves of a head as pairs, as in
transformers, RMSNorm (Zhang & Sennrich 2019), gated units (Shazeer 2020). Families differ by the fields of
``DecoderConfig``; each reads its own config.json and calls ``build_decoder``. ``attending`` says what the two layouts
read and write.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import onnx_ir as ir
from pydantic import Field, model_validator

from qexport.errors import ModelInvalid
from qexport.exporter.families.attending import Attending, Geometry, attending, opset_for, split_heads
from qexport.exporter.families.builder import GraphBuilder
from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import Form
from qexport.exporter.families.rotary import Rope, attention_factor, rotary_angles, spell_out_rope
from qexport.exporter.families.settings import Settings
from qexport.exporter.families.weights import Weights

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MOST_POSITIONS, MOST_DIM = 1 << 18, 1 << 9  # bounds of the rotary tables, which no weight bears out


class DecoderConfig(Settings):
    """The fields of config.json that shape the graph; others are ignored, unsupported values refused.

    A family restricts the values of fields, and says by class attributes what its layers have.
    """

    query_key_norms: ClassVar[bool] = False
    """Whether queries and keys are normalized, each head by itself, before they are rotated."""
    sub_norms: ClassVar[bool] = False
    """Whether there is a norm before the last product of attention and of the MLP as well."""
    partial_rotary: ClassVar[bool] = False
    """Whether ``partial_rotary_factor`` means something; transformers reads over it in the other families."""
    absent: ClassVar[dict[str, Any]] = {}
    """What fields that are left out mean, where that is not what ``DecoderConfig`` says; null is not left out."""

    model_type: str
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
    hidden_act: str = "silu"
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
        known = {key: value for key, value in {**cls.absent, **given}.items() if value is not None}
        known.setdefault("num_key_value_heads", heads)
        if "head_dim" not in known and isinstance(heads, int) and isinstance(width, int) and heads > 0:
            if width % heads:
                raise ValueError(f"{heads} heads do not divide hidden_size {width}")
            known["head_dim"] = width // heads
        spell_out_rope(known)
        return known

    @model_validator(mode="after")
    def _heads_share_keys(self) -> DecoderConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_key_value_heads} key heads do not divide {self.num_attention_heads} heads")
        return self

    @model_validator(mode="after")
    def _turns_pairs(self) -> DecoderConfig:
        turned = 2 * self.rope_parameters.pairs(self.head_dim)
        if turned < self.head_dim and not self.partial_rotary:
            raise ValueError(f"partial_rotary_factor turns {turned} of {self.head_dim}, {self.model_type} turns all")
        return self

    @property
    def query_bias(self) -> bool:
        """Whether the products that make queries, keys and values have a bias."""
        return self.attention_bias

    @property
    def output_bias(self) -> bool:
        """Whether the product behind attention has a bias."""
        return self.attention_bias

    def window(self, layer: int) -> int | None:
        """How many positions a query of this layer sees, itself counted; ``None`` for all before it."""
        del layer
        return None


def build_decoder(shape: DecoderConfig, folder: Folder, form: Form) -> ir.Model:
    """Build the graph; peak memory is the weights once, or the largest of them where the form is lazy."""
    weights = folder.weights(TABLE)
    _demand_head(shape, weights)
    g = GraphBuilder(shape.model_type, opset_for(cached=form.cached), weights, form)
    see = attending(g, Geometry(shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim))
    table = g.parameter(TABLE, (shape.vocab_size, shape.hidden_size))
    hidden = g.op("model.embed_tokens", "Gather", table, see.ids)
    layer = _Layer(g, shape, see)
    for index in range(shape.num_hidden_layers):
        hidden = layer(index, hidden)
    hidden = g.rms_norm("model.norm", hidden, shape.hidden_size, shape.rms_norm_eps)
    head = g.head(HEAD, (shape.vocab_size, shape.hidden_size), TABLE if shape.tie_word_embeddings else None)
    see.finish(g.op("lm_head", "MatMul", hidden, head), shape.vocab_size)
    return g.finish(shape.max_position_embeddings)


def _demand_head(shape: DecoderConfig, weights: Weights) -> None:
    """Raise ``ModelInvalid`` for a checkpoint of the layers alone, as ``AutoModel`` saves it."""
    bare = TABLE not in weights and TABLE.removeprefix("model.") in weights
    if bare or (HEAD not in weights and TABLE in weights and not shape.tie_word_embeddings):
        lost = "its names lack 'model.'" if bare else f"{HEAD!r} is missing, and tie_word_embeddings is false"
        hint = "save the model with its head: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other)"
        raise ModelInvalid(f"a base model without the head that makes logits: {lost}", where=weights.where, hint=hint)


def _silu(g: GraphBuilder, scope: str, x: ir.Value) -> ir.Value:
    return g.op(scope, "Mul", x, g.op(scope, "Sigmoid", x))


def _relu_squared(g: GraphBuilder, scope: str, x: ir.Value) -> ir.Value:
    x = g.op(scope, "Relu", x)
    return g.op(scope, "Mul", x, x)


ACTIVATIONS: dict[str, Callable[[GraphBuilder, str, ir.Value], ir.Value]] = {
    "silu": _silu,
    "swish": _silu,
    "relu2": _relu_squared,
}
"""By ``hidden_act``; families say which of them they may have."""


class _Layer:
    """Appends one layer after the other."""

    def __init__(self, g: GraphBuilder, shape: DecoderConfig, see: Attending) -> None:
        self.g, self.shape, self.see = g, shape, see
        self.angles = rotary_angles(shape.rope_parameters, shape.head_dim, shape.max_position_embeddings)
        self.factor = attention_factor(shape.rope_parameters)

    def __call__(self, index: int, hidden: ir.Value) -> ir.Value:
        """[batch, sequence, hidden] to the same."""
        g, scope = self.g, f"model.layers.{index}"
        attended = self._attention(f"{scope}.self_attn", self._norm(scope, "input_layernorm", hidden), index)
        hidden = g.op(scope, "Add", hidden, attended)
        return g.op(
            scope, "Add", hidden, self._mlp(f"{scope}.mlp", self._norm(scope, "post_attention_layernorm", hidden))
        )

    def _norm(self, scope: str, part: str, x: ir.Value, width: int | None = None) -> ir.Value:
        return self.g.rms_norm(f"{scope}.{part}", x, width or self.shape.hidden_size, self.shape.rms_norm_eps)

    def _mlp(self, scope: str, x: ir.Value) -> ir.Value:
        g, wide, narrow, bias = self.g, self.shape.intermediate_size, self.shape.hidden_size, self.shape.mlp_bias
        gate = g.linear(f"{scope}.gate_proj", x, (wide, narrow), bias=bias)
        up = g.linear(f"{scope}.up_proj", x, (wide, narrow), bias=bias)
        inner = g.op(scope, "Mul", ACTIVATIONS[self.shape.hidden_act](g, f"{scope}.act_fn", gate), up)
        if self.shape.sub_norms:
            inner = self._norm(scope, "ffn_sub_norm", inner, wide)
        return g.linear(f"{scope}.down_proj", inner, (narrow, wide), bias=bias)

    def _attention(self, scope: str, x: ir.Value, index: int) -> ir.Value:
        g, shape, see = self.g, self.shape, self.see
        width = shape.num_attention_heads * shape.head_dim
        query = self._turned(scope, "q", self._project(f"{scope}.q_proj", x, shape.num_attention_heads))
        key = self._turned(scope, "k", self._project(f"{scope}.k_proj", x, shape.num_key_value_heads))
        value = self._project(f"{scope}.v_proj", x, shape.num_key_value_heads)
        mask = see.mask(shape.window(index))
        context = see.attend(scope, (query, key, value), 1.0 / math.sqrt(shape.head_dim), mask)
        if shape.sub_norms:
            context = self._norm(scope, "attn_sub_norm", context, width)
        return g.linear(f"{scope}.o_proj", context, (shape.hidden_size, width), bias=shape.output_bias)

    def _project(self, scope: str, x: ir.Value, heads: int) -> ir.Value:
        """[batch, heads, sequence, head_dim]."""
        sizes = (heads * self.shape.head_dim, self.shape.hidden_size)
        wide = self.g.linear(scope, x, sizes, bias=self.shape.query_bias)
        return split_heads(self.g, scope, wide, heads, self.shape.head_dim)

    def _turned(self, scope: str, part: str, x: ir.Value) -> ir.Value:
        if self.shape.query_key_norms:
            x = self._norm(scope, f"{part}_norm", x, self.shape.head_dim)
        return self.see.rotate(scope, x, self.angles, self.factor)
