"""Randomness that is looked up, not drawn: one number for each seed, sequence, position and purpose.

Nothing that happens on the way, such as how far a draft looked ahead, what was rejected or who else is in the batch,
moves the numbers of a position (counter-based generators: Salmon et al. 2011). Draft and acceptance never share one.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np

_UNIT = 2.0**-53
_BLOCK = 16  # positions that are made together; making one costs as much


class Purpose(IntEnum):
    """What a number is used for: which of the four words that Philox makes for a position."""

    TOKEN = 0  # a token of the target, where no distribution of a draft is there
    DRAFT = 1  # a token of the draft
    ACCEPT = 2  # whether that is taken
    RESIDUAL = 3  # the token instead of it


def uniform(seed: int, stream: int, position: int, purpose: Purpose) -> float:
    """A number in [0, 1), uniform and independent over all arguments: Philox 4x64, 10 rounds, counter = position + 1.

    Args:
        seed: Of the request, the first word of the key.
        stream: Which sequence of the request, the second word of the key.
        position: Tokens before the one that is chosen, prompt included.
        purpose: What the number is for.
    """
    block, place = divmod(position, _BLOCK)
    return _words(seed, stream, block)[len(Purpose) * place + purpose]


@lru_cache(maxsize=4096)
def _words(seed: int, stream: int, block: int) -> tuple[float, ...]:
    raw = np.random.Philox(key=[seed, stream], counter=block * _BLOCK).random_raw(len(Purpose) * _BLOCK)
    return tuple(((raw >> np.uint64(11)) * _UNIT).tolist())
