"""BERT encoders (Devlin et al. 2018) from config.json and safetensors, without torch.

Inputs ``input_ids``, ``attention_mask``, ``token_type_ids``: int64 [batch, sequence], padded at the end. Outputs
``last_hidden_state`` float32 [batch, sequence, hidden] and ``sentence_embedding`` float32 [batch, hidden]: the mean
over unmasked positions, or the first position where the folder's pooling says ``cls`` (Reimers & Gurevych 2019),
always scaled to length one, whether or not the folder lists a Normalize module. Heads on top are not built.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field, model_validator

from qexport.exporter.families.builder import GraphBuilder
from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import SCORING, Form
from qexport.exporter.families.pooling import read_pooling

OPSET = 20  # the first with Gelu, and what TensorRT 10.3 reads
ANCHOR = "embeddings.word_embeddings.weight"  # what stands before it in the file stands before every name
MASKED = -10000.0  # added to masked scores; exp() of it is 0 and it fits float16


class BertConfig(BaseModel):
    """The fields of config.json that shape the graph; others are ignored, unsupported values refused."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_type: Literal["bert"]
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    layer_norm_eps: float = Field(gt=0)
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh"] = "gelu"
    position_embedding_type: Literal["absolute"] = "absolute"
    type_vocab_size: int = Field(default=2, gt=0)
    is_decoder: Literal[False] = False
    add_cross_attention: Literal[False] = False

    @model_validator(mode="after")
    def _heads_divide_the_hidden_size(self) -> BertConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} heads do not divide hidden_size {self.hidden_size}")
        return self


def build(config: dict[str, object], folder: Folder, form: Form = SCORING) -> ir.Model:
    """Build the graph; peak memory is the weights once, as float32."""
    shape = BertConfig.model_validate(config)
    pool = POOLINGS[read_pooling(folder, POOLINGS)]
    g = GraphBuilder("bert", OPSET, folder.weights(ANCHOR), form)
    ids, mask, types = (
        g.input(name, ir.DataType.INT64, ("batch", "sequence"))
        for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    hidden = _embed(g, shape, ids, types)
    bias = _mask_bias(g, mask)
    for layer in range(shape.num_hidden_layers):
        hidden = _layer(g, shape, f"encoder.layer.{layer}", (hidden, bias))
    sentence = _normalize(g, pool(g, hidden, mask))
    g.output(hidden, "last_hidden_state", ir.DataType.FLOAT, ("batch", "sequence", shape.hidden_size))
    g.output(sentence, "sentence_embedding", ir.DataType.FLOAT, ("batch", shape.hidden_size))
    return g.finish(shape.max_position_embeddings)


def _embed(g: GraphBuilder, shape: BertConfig, ids: ir.Value, types: ir.Value) -> ir.Value:
    def table(part: str, rows: int) -> ir.Value:
        name = f"embeddings.{part}.weight"
        return g.parameter(name, (rows, shape.hidden_size))

    scope = "embeddings"
    length = g.op(scope, "Shape", ids, start=1, end=2)
    places = table("position_embeddings", shape.max_position_embeddings)
    positions = g.op(scope, "Slice", places, g.constant("zero", [0]), length, g.constant("axis_0", [0]))
    words = g.op(f"{scope}.word_embeddings", "Gather", table("word_embeddings", shape.vocab_size), ids)
    kinds = table("token_type_embeddings", shape.type_vocab_size)
    kinds = g.op(f"{scope}.token_type_embeddings", "Gather", kinds, types)
    total = g.op(scope, "Add", g.op(scope, "Add", words, kinds), positions)
    return g.layer_norm(f"{scope}.LayerNorm", total, shape.hidden_size, shape.layer_norm_eps)


def _mask_bias(g: GraphBuilder, mask: ir.Value) -> ir.Value:
    """0 where attended and ``MASKED`` elsewhere, float [batch, 1, 1, sequence]."""
    scope = "mask"
    ones = g.op(scope, "Cast", mask, to=ir.DataType.FLOAT)
    holes = g.op(scope, "Sub", g.constant("one", 1.0), ones)
    wide = g.op(scope, "Unsqueeze", holes, g.constant("axes_1_2", [1, 2]))
    return g.op(scope, "Mul", wide, g.constant("masked", MASKED))


def _layer(g: GraphBuilder, shape: BertConfig, scope: str, inputs: tuple[ir.Value, ir.Value]) -> ir.Value:
    hidden, bias = inputs
    width, inner_width = shape.hidden_size, shape.intermediate_size
    attended = _attention(g, shape, f"{scope}.attention", (hidden, bias))
    summed = g.op(f"{scope}.attention.output", "Add", attended, hidden)
    hidden = g.layer_norm(f"{scope}.attention.output.LayerNorm", summed, width, shape.layer_norm_eps)
    inner = g.linear(f"{scope}.intermediate.dense", hidden, (inner_width, width))
    approximate = "none" if shape.hidden_act == "gelu" else "tanh"
    inner = g.op(f"{scope}.intermediate", "Gelu", inner, approximate=approximate)
    outer = g.linear(f"{scope}.output.dense", inner, (width, inner_width))
    summed = g.op(f"{scope}.output", "Add", outer, hidden)
    return g.layer_norm(f"{scope}.output.LayerNorm", summed, width, shape.layer_norm_eps)


def _attention(g: GraphBuilder, shape: BertConfig, scope: str, inputs: tuple[ir.Value, ir.Value]) -> ir.Value:
    hidden, bias = inputs
    heads, square = shape.num_attention_heads, (shape.hidden_size, shape.hidden_size)
    split = g.constant("split_heads", [0, 0, heads, shape.hidden_size // heads])
    merge = g.constant("merge_heads", [0, 0, shape.hidden_size])
    self_scope = f"{scope}.self"

    def project(part: str, order: list[int]) -> ir.Value:
        wide = g.op(f"{self_scope}.{part}", "Reshape", g.linear(f"{self_scope}.{part}", hidden, square), split)
        return g.op(f"{self_scope}.{part}", "Transpose", wide, perm=order)

    query, key, value = project("query", [0, 2, 1, 3]), project("key", [0, 2, 3, 1]), project("value", [0, 2, 1, 3])
    scores = g.op(
        self_scope,
        "Mul",
        g.op(f"{self_scope}.scores", "MatMul", query, key),
        g.constant("attention_scale", 1.0 / math.sqrt(shape.hidden_size // heads)),
    )
    chances = g.op(self_scope, "Softmax", g.op(self_scope, "Add", scores, bias), axis=-1)
    context = g.op(self_scope, "Transpose", g.op(f"{self_scope}.context", "MatMul", chances, value), perm=[0, 2, 1, 3])
    return g.linear(f"{scope}.output.dense", g.op(self_scope, "Reshape", context, merge), square)


def _mean(g: GraphBuilder, hidden: ir.Value, mask: ir.Value) -> ir.Value:
    """Mean over unmasked positions; an empty mask gives zeros."""
    scope, last, middle = "pooling", g.constant("axis_last", [-1]), g.constant("axis_1", [1])
    weight = g.op(scope, "Unsqueeze", g.op(scope, "Cast", mask, to=ir.DataType.FLOAT), last)
    total = g.op(scope, "ReduceSum", g.op(scope, "Mul", hidden, weight), middle, keepdims=0)
    count = g.op(scope, "Max", g.op(scope, "ReduceSum", weight, middle, keepdims=0), g.constant("tiny", 1e-9))
    return g.op(scope, "Div", total, count)


def _first(g: GraphBuilder, hidden: ir.Value, _mask: ir.Value) -> ir.Value:
    """The first position, where the tokenizer puts [CLS]."""
    return g.op("pooling", "Gather", hidden, g.weight("first_position", np.array(0, np.int64)), axis=1)


def _normalize(g: GraphBuilder, vector: ir.Value) -> ir.Value:
    """Length one; zeros stay zeros."""
    scope, last = "pooling", g.constant("axis_last", [-1])
    length = g.op(scope, "ReduceL2", vector, last, keepdims=1)
    return g.op(scope, "Div", vector, g.op(scope, "Max", length, g.constant("tiny_length", 1e-12)))


POOLINGS = {"mean": _mean, "cls": _first, "mean_sqrt_len_tokens": _mean}
"""By the names of sentence-transformers; the last differs from the mean in length only, which becomes one."""
