"""T5 encoder-decoders (Raffel et al. 2020), T5 1.1 and mT5, from config.json and safetensors, without torch.

As one plain graph: ``input_ids``, ``attention_mask`` int64 [batch, encoder_sequence] and ``decoder_input_ids`` int64
[batch, decoder_sequence], all padded at the end, to ``logits`` float32 [batch, decoder_sequence, vocabulary].

In the portable layout two graphs, since a source is read once and its translation written in steps:

- the encoder: ``input_ids``, ``attention_mask`` to ``last_hidden_state`` float32 [batch, encoder_sequence, d_model] and
  the keys and values that ``cross`` speaks of;
- the decoder: what ``attending.Cached`` reads, besides these keys and values and ``encoder_attention_mask``.

Attention does not scale its scores; a bias by distance, stored in the first layer of each stack, is added to them in
every layer. In float16 the feed-forward parts of trained models overflow; write these in bfloat16. Behind opset 23
RMSNormalization sums in float32.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from qexport.exporter.families.attending import Cached, Heads, opset_for
from qexport.exporter.families.builder import GraphBuilder
from qexport.exporter.families.cross import (
    Pair,
    cross_sizes,
    given,
    look,
    project,
    seen_source,
    source_mask,
)
from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import SCORING, Form
from qexport.exporter.families.t5_layers import TABLES, Side, T5Config, biases, run_stack, stored_table
from qexport.passes.portable import IDS, KINDS, LOGITS, MASK, MASKED, SOURCE_MASK, WANTED, cross_name

ARCHITECTURES = (
    "T5ForConditionalGeneration",
    "T5WithLMHeadModel",
    "T5Model",
    "MT5ForConditionalGeneration",
    "MT5Model",
)
HEAD = "lm_head.weight"


def build(config: dict[str, object], folder: Folder, form: Form = SCORING) -> ir.Model:
    """Build the plain graph, or the decoder; peak memory is the weights once, or the largest where the form is lazy."""
    shape = T5Config.model_validate(config)
    g = GraphBuilder("t5", opset_for(cached=form.cached), folder.weights(TABLES[0]), form)
    return _decoder(g, shape) if form.cached else _plain(g, shape)


def build_encoder(config: dict[str, object], folder: Folder, form: Form) -> ir.Model:
    """Build the encoder that belongs to the decoder of ``build`` in the portable layout."""
    shape = T5Config.model_validate(config)
    g = GraphBuilder("t5_encoder", opset_for(cached=form.cached), folder.weights(TABLES[0]), form)
    ids, real = (g.input(name, ir.DataType.INT64, ("batch", "encoder_sequence")) for name in (IDS, MASK))
    hidden = _encode(g, shape, (ids, real))
    pairs = [_pair(g, shape, hidden, layer) for layer in range(shape.num_decoder_layers)]
    g.output(hidden, "last_hidden_state", ir.DataType.FLOAT, ("batch", "encoder_sequence", shape.d_model))
    for layer, pair in enumerate(pairs):
        for kind, value in zip(KINDS, pair, strict=True):
            g.output(value, cross_name(layer, kind), g.dtype, cross_sizes(shape.geometry))
    return g.finish()


def _plain(g: GraphBuilder, shape: T5Config) -> ir.Model:
    ids, real = (g.input(name, ir.DataType.INT64, ("batch", "encoder_sequence")) for name in (IDS, MASK))
    wanted = g.input(WANTED, ir.DataType.INT64, ("batch", "decoder_sequence"))
    hidden = _encode(g, shape, (ids, real))
    places = _counted(g, "decoder", wanted)
    bias = biases(g, shape, "decoder", places)

    def attend(scope: str, heads: Heads) -> ir.Value:
        return look(g, scope, heads, bias, shape.geometry)

    def pair(layer: int) -> Pair:
        return _pair(g, shape, hidden, layer)

    side = Side("decoder", shape.num_decoder_layers, attend, (pair, source_mask(g, real)))
    logits = _logits(g, shape, run_stack(g, shape, side, wanted))
    g.output(logits, LOGITS, ir.DataType.FLOAT, ("batch", "decoder_sequence", shape.vocab_size))
    return g.finish()


def _decoder(g: GraphBuilder, shape: T5Config) -> ir.Model:
    see = Cached(g, shape.geometry)
    real = g.input(SOURCE_MASK, ir.DataType.INT64, ("batch", "encoder_sequence"))
    queries = g.op("decoder", "Unsqueeze", see.positions, g.constant("axis_last", [-1]))
    bias = biases(g, shape, "decoder", (see.columns("decoder"), queries))
    bias = g.op("decoder", "Transpose", bias, perm=[1, 0, 2, 3])

    def attend(scope: str, heads: Heads) -> ir.Value:
        return see.attend(scope, heads, 1.0, bias)

    def pair(layer: int) -> Pair:
        return given(g, layer, shape.geometry)

    side = Side("decoder", shape.num_decoder_layers, attend, (pair, source_mask(g, real, see.ids)))
    see.finish(_logits(g, shape, run_stack(g, shape, side, see.ids)), shape.vocab_size)
    return g.finish()


def _encode(g: GraphBuilder, shape: T5Config, inputs: Pair) -> ir.Value:
    """[batch, encoder_sequence, d_model] of tokens and their mask."""
    ids, real = inputs
    bias = biases(g, shape, "encoder", _counted(g, "encoder", ids))
    mask = g.op("encoder", "Where", seen_source(g, real), bias, g.constant("masked", MASKED))

    def attend(scope: str, heads: Heads) -> ir.Value:
        return look(g, scope, heads, mask, shape.geometry)

    return run_stack(g, shape, Side("encoder", shape.num_layers, attend), ids)


def _counted(g: GraphBuilder, scope: str, ids: ir.Value) -> Pair:
    """Positions from 0 on, as keys [sequence] and queries [sequence, 1]."""
    length = g.op(scope, "Squeeze", g.op(scope, "Shape", ids, start=1, end=2))
    keys = g.count(scope, length)
    return keys, g.op(scope, "Unsqueeze", keys, g.constant("axis_last", [-1]))


def _pair(g: GraphBuilder, shape: T5Config, hidden: ir.Value, layer: int) -> Pair:
    """Keys and values of the source for one layer of the decoder."""
    return project(g, f"decoder.block.{layer}.layer.1.EncDecAttention", hidden, shape.d_model, shape.geometry)


def _logits(g: GraphBuilder, shape: T5Config, hidden: ir.Value) -> ir.Value:
    """With a head of its own where the file has one; else with a copy of the embeddings, as transformers does."""
    if shape.scale_decoder_outputs:
        hidden = g.op("lm_head", "Mul", hidden, g.constant("head_scale", 1.0 / math.sqrt(shape.d_model)))
    sizes = (shape.vocab_size, shape.d_model)
    own = HEAD in g.weights or not shape.tie_word_embeddings
    head = g.head(HEAD, sizes) if own else g.head(HEAD, sizes, TABLES[0], stored=stored_table(g))
    return g.op("lm_head", "MatMul", hidden, head)
