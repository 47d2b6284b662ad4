"""Names that graphs of text models have for what they read and make; above all those of a portable decoder.

It keeps keys and values in buffers that belong to the caller: inputs ``input_ids`` and ``position_ids`` int64 [batch,
sequence], ``write_indices`` int64 [batch], and for each layer ``past_key_values.{i}.key`` and ``.value`` [batch, key
heads, max_seq, head size]; outputs ``logits`` float32 [batch, sequence, vocabulary] and ``present.{i}.key`` and
``.value``, which may share the memory of the past. Behind an encoder it also reads ``encoder_attention_mask`` int64
[batch, encoder_sequence] and ``cross_key_values.{i}.key`` and ``.value`` [batch, heads, encoder_sequence, head size],
which the graph of the encoder makes.

Unrolled (``unroll``), it makes several tokens in a call. Instead of logits it has the outputs ``ids`` int64 [batch,
steps] and, where they are drawn, ``chances`` float64 [batch, steps, vocabulary]; it also reads ``last`` int64 [batch],
and for drawing ``uniform`` float64 [batch, steps] and ``inverse_temperature`` float32 [1]. What each but the last step
leaves in a cache is an output as well, ``step.{n}.present.{i}.key``, and belongs into the same memory.
"""

from __future__ import annotations

IDS, MASK, TYPES, LOGITS = "input_ids", "attention_mask", "token_type_ids", "logits"
WANTED = "decoder_input_ids"  # what a plain encoder-decoder scores

POSITIONS, WRITE = "position_ids", "write_indices"
PAST, PRESENT, CROSS = "past_key_values.", "present.", "cross_key_values."
KINDS = ("key", "value")
SOURCE_MASK = "encoder_attention_mask"
LAST, UNIFORM, SHARPNESS = "last", "uniform", "inverse_temperature"
TOKENS, CHANCES = "ids", "chances"
COLUMNS = "max_seq"  # the axis of a cache that tokens are written along

CACHED_OPSET = 24
"""The first operator set with TensorScatter."""

MASKED = -10000.0
"""Stands in for scores that nobody may see; exp() of it is 0 and it fits float16."""

MAX_POSITIONS = "qexport.max_positions"
"""Metadata of a model: the longest sequence it has positions for."""

LABELS = "qexport.labels"
"""Metadata of a model with classes: their names, a JSON list in the order of the scores."""


def past_name(layer: int, kind: str) -> str:
    """The input that holds the keys or the values of a layer."""
    return f"{PAST}{layer}.{kind}"


def present_name(past: str) -> str:
    """The output that belongs to a past input."""
    return PRESENT + past.removeprefix(PAST)


def step_name(step: int, present: str) -> str:
    """The output for what step ``step``, from 1 on, of an unrolled decoder leaves in a cache."""
    return f"step.{step}.{present}"


def cross_name(layer: int, kind: str) -> str:
    """Output of an encoder and input of its decoder: the keys or the values of the source for a layer."""
    return f"{CROSS}{layer}.{kind}"


def parse_positions(told: str) -> int | None:
    """Number of positions as metadata has it; ``None`` where it is no number above 0."""
    plain = told.isascii() and told.isdigit() and len(told) < 10
    return int(told) if plain and int(told) > 0 else None
