"""A bounded, order-independent excerpt of a tensor over all samples: the samples with the smallest digests."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

LIMIT = 128  # samples kept
ROWS = 2  # rows taken of each
PATCH = 12  # side of the window taken of an image


@dataclass(slots=True)
class Excerpts:
    """Pieces of the samples with the smallest digests, at places that depend on the digest alone."""

    kept: dict[bytes, NDArray[np.float32]] = field(default_factory=dict)

    def wants(self, digest: bytes) -> bool:
        """Whether a sample with this digest would be kept."""
        return len(self.kept) < LIMIT or digest < max(self.kept)

    def add(self, digest: bytes, value: NDArray[np.float32]) -> None:
        """Consider one sample's ``value`` (batch axis of 1 first)."""
        if not self.wants(digest):
            return
        self.kept[digest] = excerpt(digest, value)
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


def excerpt(digest: bytes, value: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of ``[..., K]``, or a window of an image batch ``[N, C, H, W]``."""
    draws = [int.from_bytes(digest[8 * i : 8 * i + 8], "big") for i in range(ROWS)]  # a digest is random enough
    if value.ndim == 4:
        top, left = (draw % (max(side - PATCH, 0) + 1) for draw, side in zip(draws, value.shape[2:], strict=True))
        return value[:1, :, top : top + PATCH, left : left + PATCH].copy()
    rows = value.reshape(-1, value.shape[-1])
    return rows[[draw % len(rows) for draw in draws]]
