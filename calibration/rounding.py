"""Learn which way every weight is rounded, from the Gram matrix of what it is multiplied with.

``w`` becomes ``s (floor(w / s) + h(v))`` with ``h`` between 0 and 1, and v is moved by Adam to lower
``tr((W - Q)^T H (W - Q))``, the squared output error, whose gradient is ``2 H (Q - W)``. A regularizer
``1 - |2 h - 1|^b`` drives h to 0 or 1 in the end: b falls from 20, where only the undecided care, to 2.

AdaRound: Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", section 3. There the
gradient comes from batches of activations; here from all of them at once, so there is nothing random about it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STRETCH, SHIFT = 1.2, -0.1  # the rectified sigmoid: clip(1.2 sigmoid(v) - 0.1, 0, 1)
RATE = 0.05
PRESSURE = 30.0  # weight of the regularizer, against an output error that is 1 for nearest rounding
WARM = 0.2  # share of the iterations before it sets in
SHARPEST, BLUNTEST = 20.0, 2.0
MOMENTUM, MEMORY = 0.9, 0.999  # of Adam (Kingma and Ba 2015)

Matrix = NDArray[np.float32]  # [K, N]


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """A weight as multiples of its scale, and the codes it may take.

    Attributes:
        weight: ``[K, N]``.
        scale: Broadcasts against it.
        low: Smallest code, broadcasting.
        high: Largest code, broadcasting.
    """

    weight: Matrix
    scale: Matrix
    low: Matrix
    high: Matrix

    @property
    def nearest(self) -> Matrix:
        """The codes of nearest rounding."""
        return np.asarray(np.clip(np.rint(self.weight / self.scale), self.low, self.high), np.float32)

    def errors(self, codes: Matrix, hessian: NDArray[np.floating]) -> NDArray[np.float64]:
        """Squared output error of each column, ``[N]``."""
        gap = codes.astype(np.float64) * self.scale - self.weight
        return np.asarray(np.einsum("kn,kn->n", gap, hessian @ gap))


def learn(steps: Steps, hessian: NDArray[np.floating], iterations: int) -> Matrix:
    """Return codes ``[K, N]``, every column at least as good as nearest rounding on ``hessian``, ``[K, K]``."""
    nearest = steps.nearest
    worst = steps.errors(nearest, hessian)
    found = _descend(steps, hessian.astype(np.float32), worst, iterations)
    return np.where(steps.errors(found, hessian) < worst, found, nearest)


def _descend(
    steps: Steps, hessian: NDArray[np.float32], worst: NDArray[np.float64], iterations: int
) -> NDArray[np.float32]:
    scale = np.broadcast_to(steps.scale, steps.weight.shape)
    exact = np.clip(steps.weight / scale, steps.low, steps.high)
    floor = np.minimum(np.floor(exact), steps.high - 1)
    share = np.clip((exact - floor - SHIFT) / STRETCH, 1e-3, 1 - 1e-3)
    v = np.log(share / (1 - share)).astype(np.float32)
    first, second = np.zeros_like(v), np.zeros_like(v)
    each = np.divide(2.0 * len(v), worst, out=np.zeros_like(worst), where=worst > 0).astype(np.float32)
    for i in range(iterations):
        h, slope = _rectified(v)
        gradient = scale * (hessian @ (scale * (floor + h) - steps.weight)) * each
        gradient -= _pressure(h, i / iterations)
        gradient *= slope
        first += (1 - MOMENTUM) * (gradient - first)
        second += (1 - MEMORY) * (np.square(gradient) - second)
        v -= RATE / (1 - MOMENTUM ** (i + 1)) * first / (np.sqrt(second / (1 - MEMORY ** (i + 1))) + 1e-8)
    return np.asarray(floor + (v >= 0), np.float32)


def _rectified(v: Matrix) -> tuple[Matrix, Matrix]:
    """``h(v)`` and its slope."""
    sigmoid = 1 / (1 + np.exp(-v))
    wide = STRETCH * sigmoid + SHIFT
    inside = (wide > 0) & (wide < 1)
    return np.clip(wide, 0, 1), np.asarray(STRETCH * sigmoid * (1 - sigmoid) * inside, np.float32)


def _pressure(h: Matrix, done: float) -> Matrix | float:
    """What pushes h away from the middle, when this share of the iterations is done."""
    if done < WARM:
        return 0.0
    cooled = 0.5 * (1 + math.cos(math.pi * (done - WARM) / (1 - WARM)))
    power = np.float32(BLUNTEST + (SHARPEST - BLUNTEST) * cooled)
    middle = 2 * h - 1
    return np.asarray(PRESSURE * 2 * power * np.abs(middle) ** (power - 1) * np.sign(middle), np.float32)
