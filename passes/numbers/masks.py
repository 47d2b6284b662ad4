"""Masks of sparse weights: which numbers stay, by a score for each of them.

Weights are ``[K, N]``, K inputs and N outputs. A pattern is a share of zeros anywhere, or ``n:m`` as sparse tensor
cores read it: of every m consecutive inputs of an output, n stay (Mishra et al. 2021, "Accelerating Sparse Deep Neural
Networks", section 3). Every mask has exactly the zeros that its pattern says; of equal scores the first ones stay.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating]  # [K, N]
Mask = NDArray[np.bool_]  # [K, N], true where a number stays
Scope = Literal["layer", "output"]


@dataclass(frozen=True, slots=True)
class Pattern:
    """How many numbers are zero.

    Attributes:
        ratio: Share of zeros, above 0 and below 1.
        group: Consecutive inputs of an output that all have this share; 0 leaves open where the zeros are.
    """

    ratio: float
    group: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"the share of zeros must be above 0 and below 1, got {self.ratio!r}")
        if self.group and not 0 < self.kept < self.group:
            raise ValueError(f"no {self.group} numbers have a share of {self.ratio!r} zeros")

    @property
    def kept(self) -> int:
        """Numbers of a group that stay."""
        return self.group - round(self.ratio * self.group)

    @property
    def name(self) -> str:
        """As :meth:`parse` reads it, or the share in percent."""
        return f"{self.kept}:{self.group}" if self.group else f"{100 * self.ratio:g} %"

    @classmethod
    def parse(cls, wanted: str | float) -> Pattern:
        """The pattern called ``"2:4"`` (2 of every 4 stay), or of a share of zeros; ``ValueError`` for others."""
        if not isinstance(wanted, str):
            return cls(float(wanted))
        found = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", wanted)
        if not found or not int(found[1]) < int(found[2]):
            raise ValueError(f"expected a share of zeros or n:m with n below m, such as '2:4', got {wanted!r}")
        kept, group = int(found[1]), int(found[2])
        return cls((group - kept) / group, group)

    def zeros(self, size: int) -> int:
        """How many of ``size`` numbers are zero; ``ValueError`` where that would be all of them."""
        count = round(self.ratio * size)
        if count >= size > 0:
            raise ValueError(f"{100 * self.ratio:g} % zeros leave none of {size} numbers")
        return count

    def fits(self, zero: Mask, per: Scope = "layer") -> bool:
        """Whether a weight ``[K, N]`` that is zero at ``zero`` has the pattern, or more zeros."""
        if self.group:
            groups = zero.reshape(-1, self.group, zero.shape[1]) if len(zero) % self.group == 0 else None
            return groups is not None and bool((groups.sum(axis=1) >= self.group - self.kept).all())
        if per == "output":
            return bool((zero.sum(axis=0) >= self.zeros(len(zero))).all())
        return int(zero.sum()) >= self.zeros(zero.size)


def magnitude(weight: Scores) -> Scores:
    """``|w|``."""
    return np.abs(weight)


def wanda(weight: Scores, hessian: NDArray[np.floating]) -> Scores:
    """``|w_kn| |x_k|``, to be compared within an output (Sun et al. 2023, "Wanda")."""
    size: Scores = np.sqrt(np.diag(hessian))[:, None]
    return np.abs(weight) * size


def saliency(weight: Scores, gradient: Scores) -> Scores:
    """``|w g|``: what the loss changes by without a number, to first order (Molchanov et al. 2016)."""
    return np.abs(weight * gradient)


def keep_mask(scores: Scores, pattern: Pattern, per: Scope = "layer") -> Mask:
    """The mask of a weight: its largest scores stay.

    Args:
        scores: ``[K, N]``; a pattern with groups needs a K that they divide.
        pattern: What is zero.
        per: Whether scores compete within the layer or within each output; groups compete within themselves.

    Raises:
        ValueError: The pattern would leave nothing, or does not divide K.
    """
    k, n = scores.shape
    if pattern.group:
        if k % pattern.group:
            raise ValueError(f"groups of {pattern.group} do not divide {k} inputs")
        groups = scores.reshape(-1, pattern.group, n).swapaxes(0, 1)
        return np.asarray(largest(groups, pattern.kept).swapaxes(0, 1).reshape(k, n))
    if per == "output":
        return largest(scores, k - pattern.zeros(k))
    return largest(scores.reshape(-1), scores.size - pattern.zeros(scores.size)).reshape(k, n)


def keep_masks(scores: Sequence[Scores], pattern: Pattern) -> list[Mask]:
    """The masks of several weights whose scores compete with one another.

    Raises:
        ValueError: The pattern has groups.
    """
    if pattern.group:
        raise ValueError("groups of inputs do not compete with other layers")
    together = np.concatenate([part.ravel() for part in scores])
    mask = largest(together, together.size - pattern.zeros(together.size))
    parts = np.split(mask, np.cumsum([part.size for part in scores])[:-1])
    return [part.reshape(score.shape) for part, score in zip(parts, scores, strict=True)]


def largest(scores: Scores, count: int) -> Mask:
    """Where the ``count`` largest of the first axis are, the first of equal ones."""
    if not 0 < count < len(scores):
        return np.full(scores.shape, count > 0)
    place = len(scores) - count
    bound = np.partition(scores, place, axis=0)[place]
    above, equal = scores > bound, scores == bound
    return np.asarray(above | (equal & (np.cumsum(equal, axis=0) <= count - above.sum(axis=0))))
