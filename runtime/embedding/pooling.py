"""One vector of the vectors of a text's tokens; names and formulas are those of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Hidden: TypeAlias = NDArray[np.float32]  # [rows, tokens, width]
Mask: TypeAlias = NDArray[np.float32]  # [rows, tokens], 1 where a token is: at the front of a row, at least one
Vectors: TypeAlias = NDArray[np.float32]  # [rows, width]

SMALLEST = 1e-12  # vectors that are shorter stay as they are


def _mean(hidden: Hidden, mask: Mask) -> Vectors:
    """Reimers & Gurevych 2019."""
    found: Vectors = _sum(hidden, mask) / mask.sum(1, keepdims=True)
    return found


def _mean_sqrt(hidden: Hidden, mask: Mask) -> Vectors:
    found: Vectors = _sum(hidden, mask) / np.sqrt(mask.sum(1, keepdims=True))
    return found


def _weighted(hidden: Hidden, mask: Mask) -> Vectors:
    """Token i counts i times (Muennighoff 2022, SGPT)."""
    return _mean(hidden, mask * np.arange(1, mask.shape[1] + 1, dtype=np.float32))


def _max(hidden: Hidden, mask: Mask) -> Vectors:
    found: Vectors = np.where(mask[..., None] > 0, hidden, -np.inf).max(1)
    return found


def _first(hidden: Hidden, _mask: Mask) -> Vectors:
    return hidden[:, 0]


def _last(hidden: Hidden, mask: Mask) -> Vectors:
    found: Vectors = hidden[np.arange(len(hidden)), mask.sum(1).astype(np.intp) - 1]
    return found


def _sum(hidden: Hidden, mask: Mask) -> Vectors:
    found: Vectors = np.matmul(mask[:, None], hidden)[:, 0]
    return found


POOLINGS: dict[str, Callable[[Hidden, Mask], Vectors]] = {
    "mean": _mean,
    "cls": _first,
    "max": _max,
    "lasttoken": _last,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted,
}


def unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """Length one along the last axis; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    found: NDArray[np.float32] = vectors / np.maximum(lengths, SMALLEST)
    return found
