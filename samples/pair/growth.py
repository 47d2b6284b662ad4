"""Make a larger model that says what a smaller one says: a head start for a small budget.

Function-preserving growth as in T. Chen et al., *Net2Net*, 2016, here by zeros: new channels of the residual stream
hold nothing at first, so what reads them may be drawn at random, new heads and new inner units write nothing at first,
and each norm's weight makes up for the channels it averages over (the square root of the ratio of widths).
"""

from __future__ import annotations

import math

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from pair.models import Shape, build

WRITERS = ("o_proj", "down_proj")
"""Matrices whose rows are channels of the residual stream: their new rows and columns stay zero."""


@torch.no_grad()
def grow(small: LlamaForCausalLM, shape: Shape, tokenizer: Tokenizer, seed: int) -> LlamaForCausalLM:
    """A model of ``shape`` with the same logits as ``small``, but for the epsilon of its norms.

    Raises:
        ValueError: when ``shape`` has other layers, smaller sizes, another head size or another grouping of heads, or
            the tokenizer another size.
    """
    old, large = small.config, build(shape, tokenizer, seed)
    fits = (
        shape.layers == old.num_hidden_layers
        and shape.width // shape.heads == old.head_dim
        and shape.heads * old.num_key_value_heads == shape.key_heads * old.num_attention_heads
        and large.config.vocab_size == old.vocab_size
        and min(shape.width - old.hidden_size, shape.inner - old.intermediate_size) >= 0
    )
    if not fits:
        raise ValueError(f"{shape} does not grow out of the given model: layers, head size, heads per key head, tokens")
    spread = math.sqrt(old.hidden_size / shape.width)
    sources = dict(small.named_parameters())
    for name, value in large.named_parameters():
        source = sources[name]
        if value.ndim == 1:
            value.fill_(spread * source.mean().item())
            value[: len(source)] = spread * source
            continue
        rows, columns = source.shape
        if "embed" in name or name.split(".")[-2] in WRITERS:
            value.zero_()
        value[:rows, :columns] = source
    return large
