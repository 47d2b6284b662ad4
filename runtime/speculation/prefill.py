"""Prefill: let a decoder read prompts in pieces, and the few tokens that were decided without it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qexport.runtime.decoder import Decoder
from qexport.runtime.speculation.proposal import Logits

LOGITS_BYTES = 64 << 20
"""Most memory for the logits of one call: the graph makes them for all tokens of a prompt, and one row is needed."""
WIDEST = 512


def prefill(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> tuple[list[Logits], int]:
    """Read more tokens of every row, in pieces.

    Args:
        decoder: With one row of its batch for each.
        prompts: Tokens, of any lengths; a row without any is left alone.

    Returns:
        Logits ``[1, vocabulary]`` after the last token of each row (zeros where there was none), and the calls.

    Raises:
        DataInvalid: More than the model has positions for, or no token of it.
    """
    batch, vocabulary = len(prompts), decoder.signature.vocabulary
    piece = min(max(LOGITS_BYTES // (4 * batch * vocabulary), 1), WIDEST)
    last: list[Logits] = [np.zeros((1, vocabulary), np.float32)] * batch
    longest = max(map(len, prompts))
    for first in range(0, longest, piece):
        parts = [prompt[first : first + piece] for prompt in prompts]
        counts = np.array([len(part) for part in parts])
        ids = np.zeros((batch, counts.max()), np.int64)
        for row, part in enumerate(parts):
            ids[row, : len(part)] = part
        logits = decoder.extend(ids, counts)
        for row, part in enumerate(parts):
            if part:
                last[row] = logits[row, len(part) - 1 : len(part)].copy()
    return last, -(-longest // piece)
