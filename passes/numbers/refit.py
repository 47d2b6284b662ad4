"""Least squares on what is left of a weight: repair without training.

Taking numbers out of W changes the output ``X W`` by ``X (W - W')``, and the square of that is
``tr((W - W')^T H (W - W'))`` with ``H = X^T X``. Given what goes, the least is a linear system for each output: with S
the inputs that stay and P those that go, ``w'_S = w_S + H_SS^-1 H_SP w_P``. The ridge is on ``W - W'``, relative to
H's mean diagonal, so that what the samples say nothing about stays as it is, and no output gets worse on them than
without repair.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qexport.passes.numbers.gptq import Square
from qexport.passes.numbers.masks import Mask, Scores

Vector = NDArray[np.float64]
RIDGE = 0.01
LEAST_RIDGE = 1e-6
RIDGES = (1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0)  # what is tried
TRIED = 8  # outputs that decide
FLAT = 1e-6  # share of the mean square that a variance is below where it is noise of sums in float32
MORE_RIDGE = 10.0  # factor of the next trial where a system cannot be solved


def refit(weight: Scores, hessian: Square, mask: Mask, ridge: float = RIDGE) -> NDArray[np.float64]:
    """The weight ``[K, N]`` that is zero where ``mask`` is not, and nearest to ``weight`` in its outputs.

    Outputs with the same mask share a factorization; one system is held at a time.

    Args:
        weight: The weight as it was before anything was taken out, ``[K, N]``.
        hessian: ``X^T X`` of the rows that it is multiplied with, ``[K, K]``, up to a positive factor.
        mask: True where a number stays, ``[K, N]``.
        ridge: Share of H's mean diagonal that is added to the diagonal; raised tenfold until H can be factorized.
    """
    dense = np.asarray(weight, np.float64)
    damped = damped_hessian(hessian, ridge)
    found = np.where(mask, dense, 0.0)
    lost = damped @ (dense - found)  # H_SP w_P, in the rows of S
    for columns in _alike(mask):
        stay = np.flatnonzero(mask[:, columns[0]])
        if 0 < len(stay) < len(dense):
            found[np.ix_(stay, columns)] += np.linalg.solve(damped[np.ix_(stay, stay)], lost[np.ix_(stay, columns)])
    return found


def refit_rows(weight: Scores, hessian: Square, keep: NDArray[np.bool_], ridge: float = RIDGE) -> NDArray[np.float64]:
    """The weight ``[kept, N]`` for the inputs that stay, nearest to ``weight`` ``[K, N]`` in its outputs.

    Args:
        weight: The weight as it was, ``[K, N]``.
        hessian: As for :func:`refit`.
        keep: Which inputs stay, ``[K]``.
        ridge: As for :func:`refit`.
    """
    stay = np.asarray(keep, bool)
    found = refit(weight, hessian, np.broadcast_to(stay[:, None], np.shape(weight)), ridge)
    return np.asarray(found[stay])


def refit_rows_and_bias(
    weight: Scores, hessian: Square, total: Vector, count: int, keep: NDArray[np.bool_], ridge: float = RIDGE
) -> tuple[NDArray[np.float64], Vector]:
    """As :func:`refit_rows`, with what is to be added to the bias: means need no weights then ("bias absorption").

    Args:
        weight: The weight as it was, ``[K, N]``.
        hessian: ``X^T X`` of all rows, ``[K, K]``.
        total: Their sum, ``[K]``.
        count: How many they are.
        keep: Which inputs stay, ``[K]``.
        ridge: As for :func:`refit`.
    """
    found = refit_rows(weight, centred(hessian, total, count), keep, ridge)
    mean = np.asarray(total, np.float64) / count
    return found, mean @ np.asarray(weight, np.float64) - mean[np.asarray(keep, bool)] @ found


def centred(hessian: Square, total: Vector, count: int) -> Square:
    """``(X - mean)^T (X - mean)``, zero for inputs that vary no more than rounding does.

    Args:
        hessian: ``X^T X`` of all rows, ``[K, K]``.
        total: Their sum, ``[K]``.
        count: How many they are.
    """
    found = np.asarray(hessian - np.outer(total, total) / max(count, 1), np.float64)
    flat = np.diag(found) <= FLAT * np.diag(hessian)
    found[flat] = found[:, flat] = 0
    return found


def best_ridge(weight: Scores, halves: tuple[Square, Square], mask: Mask) -> float:
    """The ridge for :func:`refit` with the sum of two halves of the rows.

    Of ``RIDGES`` the one with the least error on one half when fitted to the other, both ways round, over ``TRIED``
    outputs; and half of that, since noise counts half as much in twice the rows.

    Args:
        weight: The weight as it was, ``[K, N]``.
        halves: ``X^T X`` of each half, ``[K, K]``.
        mask: True where a number stays, ``[K, N]``.
    """
    some = np.unique(np.linspace(0, weight.shape[1] - 1, min(TRIED, weight.shape[1])).astype(int))
    dense, kept = np.asarray(weight, np.float64)[:, some], mask[:, some]

    def error(ridge: float) -> float:
        gaps = [dense - refit(dense, half, kept, ridge) for half in halves]
        return sum(float(np.sum(gap * (other @ gap))) for gap, other in zip(gaps, reversed(halves), strict=True))

    return min(RIDGES, key=error) / 2


def damped_hessian(hessian: Square, ridge: float) -> Square:
    """H with a ridge that makes it positive definite; an input that nothing went through gets the mean."""
    diagonal = np.diag(hessian)
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if live.any() else 1.0
    damped = np.array(hessian, np.float64)
    damped[~live] = damped[:, ~live] = 0
    while True:
        np.fill_diagonal(damped, np.where(live, diagonal + ridge * mean, mean))
        try:
            np.linalg.cholesky(damped)
        except np.linalg.LinAlgError:
            ridge = max(ridge * MORE_RIDGE, LEAST_RIDGE)
        else:
            return damped


def _alike(mask: Mask) -> list[NDArray[np.intp]]:
    """Columns with the same mask, together."""
    packed = np.packbits(np.ascontiguousarray(mask.T), axis=1)
    _, kind = np.unique(packed, axis=0, return_inverse=True)
    order = np.argsort(kind.reshape(-1), kind="stable")
    return np.split(order, np.flatnonzero(np.diff(kind.reshape(-1)[order])) + 1)
