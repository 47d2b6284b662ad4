"""Weights as small integers with a scale, and maybe a zero point, for each group of inputs: the grid and its codes.

Everything here is laid out ``[K, N]``, inputs by outputs, as in ``y = x W``; a group is ``group`` consecutive inputs
of one output. Codes and zero points are signed, so that zero is code ``0`` of a symmetric grid:
``w = scale * (code - zero)`` with codes in ``[-2^(bits-1), 2^(bits-1) - 1]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.errors import UsageError
from qexport.passes.numbers.range import LARGEST_SCALE, SMALLEST_FLOAT32, SMALLEST_SCALE, half_precision
from qexport.passes.numbers.weights import MAX_COARSE
from qexport.passes.placement import Site

CODES_KEY = "qexport.codes"
SMALLEST_GROUP = 16  # no kernel has a smaller one
SHRINKS = np.linspace(1.0, 0.5, 21)  # what the clip search multiplies a group's range with

Matrix = NDArray[np.float32]  # [K, N]
Scales = NDArray[np.float32]  # [K / group, N]
Zeros = NDArray[np.int8]  # [K / group, N]


@dataclass(frozen=True, slots=True)
class Grid:
    """What a weight is rounded to.

    Attributes:
        bits: Bits of a code.
        group: Inputs that share a scale; 0 is all of them, one scale for each output channel.
        symmetric: Whether there are no zero points.
    """

    bits: Literal[8, 4, 3]
    group: int = 0
    symmetric: bool = True

    @property
    def low(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest code."""
        return -self.low - 1

    def rows(self, k: int) -> int:
        """Inputs of one group of a weight with ``k`` inputs."""
        return self.group or k


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """A weight on a grid.

    Attributes:
        values: Signed codes, ``[K, N]``.
        scale: ``[K / group, N]``.
        zero: Codes that stand for zero, ``[K / group, N]``; ``None`` where that is code 0 everywhere.
        grid: The grid.
    """

    values: NDArray[np.int8]
    scale: Scales
    zero: Zeros | None
    grid: Grid

    def dequantize(self) -> Matrix:
        """The weight that the codes stand for, ``[K, N]``."""
        k, n = self.values.shape
        blocks = self.values.reshape(len(self.scale), -1, n)
        zero = None if self.zero is None else self.zero[:, None]
        return decode(blocks, self.scale[:, None], zero).reshape(k, n)


def quantize_groups(weight: Matrix, grid: Grid, *, half: bool = False, clip: bool = False) -> Codes:
    """Round ``weight`` to the nearest codes of ``grid``.

    Args:
        weight: ``[K, N]``; ``grid.group`` divides K (:func:`check_group`).
        grid: What to round to.
        half: Whether scales must be normal float16 numbers.
        clip: Whether to search, group by group, for the range of least squared error instead of the whole one.
    """
    k, n = weight.shape
    blocks = np.asarray(weight, np.float32).reshape(-1, grid.rows(k), n)
    scale, zero = scales_for(blocks, grid, half=half, clip=clip)
    values = encode(blocks, scale[:, None], None if zero is None else zero[:, None], grid)
    return Codes(values.reshape(k, n), scale, zero, grid)


def scales_for(block: Matrix, grid: Grid, *, half: bool = False, clip: bool = False) -> tuple[Scales, Zeros | None]:
    """Scale and zero point of each column of ``block``.

    A symmetric range is ``[-m, m]`` with the largest magnitude m, cut into ``2^bits - 1`` steps; any other one is the
    smallest that holds the column and zero. So no weight is farther than half a step from a code (Frantar et al. 2022,
    whose quantizer this is).

    Args:
        block: ``[..., rows, N]``, the rows that share a scale.
        grid: ``bits`` and ``symmetric`` of it count here.
        half: Whether scales must be normal float16 numbers.
        clip: Whether to search for the range of least squared error.

    Returns:
        Arrays ``[..., N]``; zero points are ``None`` for a symmetric grid.
    """
    high = np.maximum(block.max(axis=-2, initial=0.0), 0)
    low = np.minimum(block.min(axis=-2, initial=0.0), 0)
    if grid.symmetric:
        high = np.maximum(high, -low)
        low = -high
    scale, zero = _steps(low, high, grid, half=half)
    if not clip:
        return scale, zero
    least = _error(block, scale, zero, grid)
    for shrink in SHRINKS[1:]:
        tried, origin = _steps(low * np.float32(shrink), high * np.float32(shrink), grid, half=half)
        error = _error(block, tried, origin, grid)
        better = error < least
        least, scale = np.where(better, error, least), np.where(better, tried, scale)
        zero = None if zero is None or origin is None else np.where(better, origin, zero)
    return scale, zero


def encode(weight: Matrix, scale: Scales, zero: Zeros | None, grid: Grid) -> NDArray[np.int8]:
    """Nearest codes; ``scale`` and ``zero`` broadcast against ``weight``."""
    steps = np.rint(weight / scale)
    steps = steps if zero is None else steps + zero
    return np.asarray(np.clip(steps, grid.low, grid.high), np.int8)


def decode(values: NDArray[np.int8], scale: Scales, zero: Zeros | None) -> Matrix:
    """The numbers that codes stand for, in float32; ``scale`` and ``zero`` broadcast against ``values``."""
    steps = values.astype(np.float32)
    return np.asarray((steps if zero is None else steps - zero) * scale, np.float32)


def misfit_groups(weight: Matrix, grid: Grid, *, half: bool) -> str | None:
    """Why ``weight`` cannot be stored on ``grid``, if it cannot: float16 scales have a smallest and a largest one."""
    if not np.isfinite(weight).all():
        return "weights are not finite"
    k, n = weight.shape
    scale, _ = scales_for(weight.reshape(-1, grid.rows(k), n), grid)
    if half and scale.max(initial=0.0) > LARGEST_SCALE:
        return "weights too large for float16 scales"
    return "weights too small for float16 scales" if half and (scale < SMALLEST_SCALE).mean() > MAX_COARSE else None


def check_group(grid: Grid, k: int, node: str) -> None:
    """Raise ``UsageError`` naming the node, its inputs and groups that fit, where ``grid.group`` does not divide k."""
    if grid.group and k % grid.group:
        fitting = [size for size in range(SMALLEST_GROUP, k) if k % size == 0]
        regular = [size for size in fitting if size % SMALLEST_GROUP == 0]  # what all kernels take
        near = sorted(sorted(regular or fitting, key=lambda size: abs(size - grid.group))[:3])
        fit = f"group = {', '.join(map(str, near))}" if near else "no group divides it"
        raise UsageError(
            f"group {grid.group} does not divide the {k} inputs of node {node!r}",
            where="option 'group'",
            hint=f"{fit}; 0 gives one scale to each output channel; 'keep' leaves the node in float",
        )


def as_matrix(site: Site) -> Matrix:
    """The weight of a MatMul or Gemm as ``[K, N]`` float32, whatever ``transB`` says."""
    weight = np.asarray(site.kernel.numpy(), np.float32)
    return weight if site.axis == 1 else weight.T


def codes_of(value: ir.Value | None) -> Codes | None:
    """The codes that another pass chose for a weight, if one did; laid out ``[K, N]`` whatever ``transB`` says."""
    found = None if value is None else value.meta.get(CODES_KEY)
    return found if isinstance(found, Codes) else None


def _steps(low: Matrix, high: Matrix, grid: Grid, *, half: bool) -> tuple[Scales, Zeros | None]:
    """Scale and zero point of the ranges ``[low, high]``; what is all zero gets a scale that divides."""
    span = (high.astype(np.float64) - low) / (grid.high - grid.low)
    scale = half_precision(span) if half else np.maximum(span, SMALLEST_FLOAT32).astype(np.float32)
    scale = np.where(span == 0, np.float32(SMALLEST_SCALE), scale)
    if grid.symmetric:
        return scale, None
    return scale, np.clip(np.rint(-low / scale) + grid.low, grid.low, grid.high).astype(np.int8)


def _error(block: Matrix, scale: Scales, zero: Zeros | None, grid: Grid) -> NDArray[np.float32]:
    wide, origin = scale[..., None, :], None if zero is None else zero[..., None, :]
    return np.asarray(np.square(decode(encode(block, wide, origin, grid), wide, origin) - block).sum(axis=-2))
