"""Marks: huge constants in outputs, such as the -1e9 of ``Where(mask, logits, -1e9)``, that would drown the numbers.

One -1e9 in an output is 1e-9 away from itself relatively, and so is everything beside it: no error of the other numbers
shows in a norm that holds it. What a mask put there equally on both sides says nothing about how close the others are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HUGE = 1e4  # the smallest number that masks are made with
APART = 100.0  # and how far above all other numbers they are


def marks(truth: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where rows of ``[rows, numbers]`` hold marks: finite, equal on both sides, huge, and far above all others.

    A huge number that was computed is none unless it is equal to the last bit; one that changed counts in full, and
    as far as it reaches no other is a mark.
    """
    sizes = np.abs(truth)
    huge: NDArray[np.bool_] = (sizes >= HUGE) & (truth == found) & np.isfinite(sizes)
    if not huge.any():
        return huge
    others = np.where(huge | ~np.isfinite(sizes), 0.0, sizes).max(axis=1, keepdims=True)
    huge &= sizes >= APART * others
    return huge


def without_marks(
    truth: NDArray[np.float64], found: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both sides with zeros where they have marks; the same arrays where there are none."""
    places = marks(truth, found)
    return (np.where(places, 0.0, truth), np.where(places, 0.0, found)) if places.any() else (truth, found)
