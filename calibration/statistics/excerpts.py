"""A bounded, order-independent excerpt of a tensor over all samples: the samples with the smallest digests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIMIT = 128  # samples kept
ROWS = 2  # rows taken of each
Window = tuple[int, ...]  # size along each spatial axis; empty for rows of the last axis


@dataclass(slots=True)
class Excerpts:
    """Pieces of the samples with the smallest digests, at places that depend on the digest alone.

    Attributes:
        window: Size of the pieces along the axes behind ``[N, C]``; empty takes rows of the last axis.
        rows: How many rows are taken of each sample, at most four.
        kept: Sample digest to its piece.
    """

    window: Window = ()
    rows: int = ROWS
    kept: dict[bytes, NDArray[np.float32]] = field(default_factory=dict)

    def wants(self, digest: bytes) -> bool:
        """Whether a sample with this digest would be kept."""
        return len(self.kept) < LIMIT or digest < max(self.kept)

    def add(self, digest: bytes, value: NDArray[np.float32]) -> None:
        """Consider one sample's ``value`` (batch axis first); an empty one has nothing to take."""
        if value.size and self.wants(digest):
            self.kept[digest] = excerpt(digest, value, self.window, self.rows)
            self._trim()

    def merge(self, other: Excerpts) -> None:
        """Consider another shard's pieces."""
        self.kept.update(other.kept)
        self._trim()

    def stacked(self) -> list[NDArray[np.float32]]:
        """All pieces in digest order, those of equal shape joined along the first axis."""
        groups: dict[tuple[int, ...], list[NDArray[np.float32]]] = {}
        for digest in sorted(self.kept):
            piece = self.kept[digest]
            groups.setdefault(piece.shape[1:], []).append(piece)
        return [np.concatenate(pieces) for pieces in groups.values()]

    def _trim(self) -> None:
        for digest in sorted(self.kept)[LIMIT:]:
            del self.kept[digest]


def excerpt(digest: bytes, value: NDArray[np.float32], window: Window, count: int = ROWS) -> NDArray[np.float32]:
    """Rows of ``[..., K]``, or a window of the first image of ``[N, C, ...]``, whole axes where they are smaller."""
    draws = [int.from_bytes(digest[i : i + 8], "big") for i in range(0, 32, 8)]  # a digest is random enough
    if not window:
        rows = value.reshape(-1, value.shape[-1])
        return rows[[draw % len(rows) for draw in draws[:count]]]
    cut: list[Any] = [slice(0, 1), slice(None)]
    for draw, side, size in zip(draws, value.shape[2:], window, strict=False):
        start = draw % (max(side - size, 0) + 1)
        cut.append(slice(start, start + size))
    piece: NDArray[np.float32] = value[tuple(cut)].copy()
    return piece
