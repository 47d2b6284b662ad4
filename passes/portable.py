"""Names in a portable decoder graph: keys and values in buffers that the caller keeps and the graph writes into.

Inputs ``input_ids`` and ``position_ids`` int64 [batch, sequence], ``write_indices`` int64 [batch], and for each layer
``past_key_values.{i}.key`` and ``.value`` [batch, key heads, max_seq, head size]; outputs ``logits`` float32 [batch,
sequence, vocabulary] and ``present.{i}.key`` and ``.value``, which may share the memory of the past.
"""

from __future__ import annotations

IDS, POSITIONS, WRITE, LOGITS = "input_ids", "position_ids", "write_indices", "logits"
PAST, PRESENT = "past_key_values.", "present."
KINDS = ("key", "value")

CACHED_OPSET = 24
"""The first operator set with TensorScatter."""

MAX_POSITIONS = "qexport.max_positions"
"""Metadata of a model: the longest sequence it has positions for."""


def past_name(layer: int, kind: str) -> str:
    """The input that holds the keys or the values of a layer."""
    return f"{PAST}{layer}.{kind}"


def present_name(past: str) -> str:
    """The output that belongs to a past input."""
    return PRESENT + past.removeprefix(PAST)


def parse_positions(told: str) -> int | None:
    """Number of positions as metadata has it; ``None`` where it is no number above 0."""
    plain = told.isascii() and told.isdigit() and len(told) < 10
    return int(told) if plain and int(told) > 0 else None
