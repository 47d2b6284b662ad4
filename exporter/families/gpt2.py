"""GPT-2 decoders (Radford et al. 2019) from config.json and safetensors, without torch.

LayerNorm before each block, learned positions, one stored matrix for queries, keys and values. That matrix is taken
apart: three products take no longer than one with a Split behind it (onnxruntime, 1 to 64 tokens), and each has the
range of its own results. The checkpoint stores products as [in, out], as MatMul reads them. ``attending`` says what
the two layouts read and write.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field, model_validator

from qexport.exporter.families.attending import Attending, Geometry, attending, opset_for, split_heads
from qexport.exporter.families.builder import Change, GraphBuilder
from qexport.exporter.families.encoder import activate
from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import SCORING, Form
from qexport.exporter.families.settings import Settings
from qexport.exporter.families.weights import Array

ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")
TABLE, PLACES, HEAD = "wte.weight", "wpe.weight", "lm_head.weight"
PARTS = ("query", "key", "value")  # columns of c_attn, in this order


class GPT2Config(Settings):
    """The fields of config.json that shape the graph; others are ignored, unsupported values refused.

    ``reorder_and_upcast_attn`` is one of those ignored: it only says in which type training sums.
    """

    model_type: Literal["gpt2"]
    vocab_size: int = Field(gt=0)
    n_positions: int = Field(gt=0)
    n_embd: int = Field(gt=0)
    n_layer: int = Field(gt=0)
    n_head: int = Field(gt=0)
    n_inner: int | None = Field(default=None, gt=0)
    layer_norm_epsilon: float = Field(default=1e-5, gt=0)
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh", "gelu", "relu"] = "gelu_new"
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: bool = True

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> GPT2Config:
        if self.n_embd % self.n_head:
            raise ValueError(f"{self.n_head} heads do not divide n_embd {self.n_embd}")
        return self

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.n_embd // self.n_head

    @property
    def inner(self) -> int:
        """Width between the two products of the MLP."""
        return self.n_inner or 4 * self.n_embd

    def scale(self, layer: int) -> float:
        """What the scores of a layer are multiplied with."""
        scale = 1.0 / math.sqrt(self.head_dim) if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


def build(config: dict[str, object], folder: Folder, form: Form = SCORING) -> ir.Model:
    """Build the graph; peak memory is the weights once, or the largest of them where the form is lazy."""
    shape = GPT2Config.model_validate(config)
    g = GraphBuilder("gpt2", opset_for(cached=form.cached), folder.weights(TABLE), form)
    see = attending(g, Geometry(shape.n_head, shape.n_head, shape.head_dim))
    words = g.op("wte", "Gather", g.parameter(TABLE, (shape.vocab_size, shape.n_embd)), see.ids)
    places = see.lookup("wpe", g.parameter(PLACES, (shape.n_positions, shape.n_embd)))
    hidden = g.op("wpe", "Add", words, places)
    for index in range(shape.n_layer):
        hidden = _layer(g, shape, see, (index, hidden))
    hidden = g.layer_norm("ln_f", hidden, shape.n_embd, shape.layer_norm_epsilon)
    head = g.head(HEAD, (shape.vocab_size, shape.n_embd), TABLE if shape.tie_word_embeddings else None)
    see.finish(g.op("lm_head", "MatMul", hidden, head), shape.vocab_size)
    return g.finish(shape.n_positions)


def _layer(g: GraphBuilder, shape: GPT2Config, see: Attending, at: tuple[int, ir.Value]) -> ir.Value:
    """[batch, sequence, n_embd] to the same."""
    index, hidden = at
    scope, width, epsilon = f"h.{index}", shape.n_embd, shape.layer_norm_epsilon
    x = g.layer_norm(f"{scope}.ln_1", hidden, width, epsilon)
    heads = [
        split_heads(
            g, f"{scope}.attn.{part}", _project(g, f"{scope}.attn", part, x, width), shape.n_head, shape.head_dim
        )
        for part in PARTS
    ]
    context = see.attend(f"{scope}.attn", (heads[0], heads[1], heads[2]), shape.scale(index), see.mask())
    hidden = g.op(f"{scope}.attn", "Add", hidden, _product(g, f"{scope}.attn.c_proj", context, (width, width)))
    x = g.layer_norm(f"{scope}.ln_2", hidden, width, epsilon)
    inner = _product(g, f"{scope}.mlp.c_fc", x, (width, shape.inner))
    inner = activate(g, f"{scope}.mlp.act", inner, shape.activation_function)
    return g.op(f"{scope}.mlp", "Add", hidden, _product(g, f"{scope}.mlp.c_proj", inner, (shape.inner, width)))


def _product(g: GraphBuilder, scope: str, x: ir.Value, shape: tuple[int, int]) -> ir.Value:
    """``x W + b`` with W [in, out]."""
    product = g.op(scope, "MatMul", x, g.parameter(f"{scope}.weight", shape))
    return g.op(scope, "Add", product, g.parameter(f"{scope}.bias", shape[1:]))


def _project(g: GraphBuilder, scope: str, part: str, x: ir.Value, width: int) -> ir.Value:
    """One of the three products that are stored as one matrix."""
    stored, name = f"{scope}.c_attn", f"{scope}.c_attn.{part}"
    change = _columns(PARTS.index(part) * width, width)
    weight = g.parameter(f"{name}.weight", (width, 3 * width), change, stored=f"{stored}.weight")
    bias = g.parameter(f"{name}.bias", (3 * width,), change, stored=f"{stored}.bias")
    return g.op(name, "Add", g.op(name, "MatMul", x, weight), bias)


def _columns(start: int, count: int) -> Change:
    def cut(array: Array) -> Array:
        return np.ascontiguousarray(array[..., start : start + count])

    return cut
