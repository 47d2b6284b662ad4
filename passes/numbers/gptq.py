"""GPTQ: round a weight one input at a time, and let the inputs that are left make up for the error.

Minimises ``tr((W - Q)^T H (W - Q))`` with ``H = X^T X``, the squared output error of ``y = x W`` over all rows x.
Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers":

1. ``H^-1 = U^T U`` with an upper triangular U holds all the recursion needs (section 3.3, step 3). With ``H = R R^T``,
   R upper triangular, ``U = R^-1``: one Cholesky factorization, and no inverse of H is ever formed.
2. Input k is rounded, its error divided by ``U_kk`` is taken off every later input j times ``U_kj`` (equation 2).
3. Updates stay inside a block of inputs until it is done, then reach the others at once (step 2).

Inputs that matter most come first with ``act_order`` ("activation order" of the authors' code). The groups stay those
of consecutive inputs, so that nothing is permuted in what is stored: their scales are chosen from the weight before
anything moves ("static groups"). Without ``act_order`` the scale of a group is chosen when its first input is reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qexport.passes.numbers.groups import Codes, Grid, Matrix, Scales, Zeros, decode, encode, scales_for

MORE_DAMPING = 10.0  # factor of the next trial where H is not positive definite
LEAST_DAMPING = 1e-6

Square = NDArray[np.float64]  # [K, K]


@dataclass(frozen=True, slots=True)
class Rounding:
    """How to go about it.

    Attributes:
        damping: Share of H's mean diagonal that is added to the diagonal; raised tenfold until H can be factorized.
        act_order: Whether inputs are rounded by falling diagonal of H, instead of in order.
        block: Inputs whose updates are held back together; has no effect on the result but rounding.
        half: Whether scales must be normal float16 numbers.
        clip: Whether to search for the range of least squared error of each group.
    """

    damping: float = 0.01
    act_order: bool = True
    block: int = 128
    half: bool = False
    clip: bool = False


def gptq(weight: Matrix, hessian: Square, grid: Grid, how: Rounding | None = None) -> Codes:
    """Round ``weight`` to ``grid`` for the least output error.

    An input that no sample has used (a zero on H's diagonal) is rounded to the nearest and moves no other.

    Args:
        weight: ``[K, N]``; ``grid.group`` divides K.
        hessian: ``X^T X`` of the rows that the weight is multiplied with, ``[K, K]``, up to a positive factor.
        grid: What to round to.
        how: Options of the method.
    """
    how = how or Rounding()
    order = np.argsort(-np.diag(hessian), kind="stable") if how.act_order else np.arange(len(weight))
    factor = inverse_factor(hessian[np.ix_(order, order)], how.damping)
    work = _Work(np.asarray(weight, np.float64)[order], order, grid, how)
    if how.act_order:
        work.choose_all(weight)
    for start, end in _blocks(len(order), how.block, grid):
        work.round_block(start, end, factor)
    values = np.empty(weight.shape, np.int8)
    values[order] = work.values
    return Codes(values, work.scale, work.zero, grid)


def inverse_factor(hessian: Square, damping: float) -> Square:
    """Upper triangular U with ``U^T U`` the inverse of the damped ``hessian``."""
    diagonal = np.diag(hessian)
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if live.any() else 1.0
    damped = hessian.copy()
    while True:
        np.fill_diagonal(damped, np.where(live, diagonal + damping * mean, mean))
        try:
            lower = np.linalg.cholesky(damped[::-1, ::-1])
        except np.linalg.LinAlgError:
            damping = max(damping * MORE_DAMPING, LEAST_DAMPING)
        else:
            # read backwards, the lower factor of the matrix read backwards is an upper one of the matrix itself
            return np.asarray(np.triu(np.linalg.inv(lower[::-1, ::-1])))


def _blocks(count: int, block: int, grid: Grid) -> Iterator[tuple[int, int]]:
    """Starts and ends of blocks; every group starts one, so that its scale is chosen from inputs up to date."""
    size = grid.rows(count)
    for group in range(0, count, size):
        yield from ((start, min(start + block, group + size)) for start in range(group, group + size, block))


class _Work:
    """The weight as it changes, rows in the order of rounding, and the codes found so far."""

    def __init__(self, rows: Square, order: NDArray[np.intp], grid: Grid, how: Rounding) -> None:
        k, n = rows.shape
        self.rows, self.order, self.grid, self.how = rows, order, grid, how
        self.size = grid.rows(k)
        self.values = np.empty((k, n), np.int8)
        self.scale: Scales = np.ones((k // self.size, n), np.float32)
        self.zero: Zeros | None = None if grid.symmetric else np.zeros((k // self.size, n), np.int8)

    def choose_all(self, weight: Matrix) -> None:
        """Scales of all groups, from the weight as it came."""
        for group, start in enumerate(range(0, len(weight), self.size)):
            self._choose(group, weight[start : start + self.size])

    def round_block(self, start: int, end: int, factor: Square) -> None:
        """Round inputs ``start`` to ``end``, and take their errors off the ones behind."""
        if not self.how.act_order and start % self.size == 0:
            self._choose(int(self.order[start]) // self.size, self.rows[start : start + self.size].astype(np.float32))
        errors = np.empty((end - start, self.rows.shape[1]))
        for k in range(start, end):
            error = (self.rows[k] - self._round(k)) / factor[k, k]
            self.rows[k + 1 : end] -= np.outer(factor[k, k + 1 : end], error)
            errors[k - start] = error
        self.rows[end:] -= factor[start:end, end:].T @ errors

    def _round(self, k: int) -> Matrix:
        group = int(self.order[k]) // self.size
        scale, zero = self.scale[group], None if self.zero is None else self.zero[group]
        self.values[k] = encode(self.rows[k].astype(np.float32), scale, zero, self.grid)
        return decode(self.values[k], scale, zero)

    def _choose(self, group: int, block: Matrix) -> None:
        scale, zero = scales_for(block, self.grid, half=self.how.half, clip=self.how.clip)
        self.scale[group] = scale
        if self.zero is not None and zero is not None:
            self.zero[group] = zero
