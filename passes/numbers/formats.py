"""The 8-bit numbers that tensors are stored in, as rows: where they saturate, how they round, what scales fit them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Kind = Literal["int8", "uint8", "fp8"]
"""What rows are called: the integers of an activation or a weight, or float8e4m3fn (Micikevicius et al. 2022)."""

_E4M3 = ir.DataType.FLOAT8E4M3FN.numpy()
_E4M3_LARGEST = 448.0


def _to_e4m3(steps: NDArray[np.floating]) -> NDArray[np.floating]:
    """The nearest float8e4m3fn of each number, ties to even; beyond the largest one it saturates."""
    near = np.clip(np.asarray(steps, np.float32), -_E4M3_LARGEST, _E4M3_LARGEST).astype(_E4M3)
    return np.asarray(near, np.float32)


def _e4m3_edges() -> NDArray[np.float64]:
    """Zero, the middles between neighbours among the magnitudes of float8e4m3fn, and its largest, over the largest."""
    magnitudes = np.arange(127, dtype=np.uint8).view(_E4M3).astype(np.float64)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    return np.concatenate([[0.0], middles, [_E4M3_LARGEST]]) / _E4M3_LARGEST


@dataclass(frozen=True, slots=True, eq=False)
class Format:
    """One kind of 8-bit number.

    Attributes:
        stored: Its numpy type, which names the ONNX type.
        limits: Where QuantizeLinear saturates; an int8 range ends at -127 and 127, and clipped values may reach -128.
        reach: How many steps the end of a range is away from zero, or the whole range where it is affine.
        nearest: Rounds ``x / scale``, float32, to the grid.
        edges: Where the magnitudes that it tells apart begin and end, as shares of the largest one.
        affine: Whether there is a zero point.
        weight: The numbers of the weights that go with such activations.
        opset: First opset whose Q/DQ take it, with a scale for each channel.
        slack: How much larger than wanted a float16 scale may be: two of eight bits, or what the exponent has to spare.
        stretches: What a scale is multiplied with, in search of the one that falls best on the grid. Evenly spaced
            numbers gain nothing by it; floating ones have a coarsest binade, which is half empty above the maximum.
    """

    stored: np.dtype[Any]
    limits: tuple[float, float]
    reach: float
    nearest: Callable[[NDArray[np.floating]], NDArray[np.floating]]
    edges: NDArray[np.float64]
    affine: bool = False
    weight: Kind = "int8"
    opset: int = 13
    slack: float = 4.0
    stretches: tuple[float, ...] = (1.0,)

    def encode(self, steps: NDArray[np.floating]) -> NDArray[np.generic]:
        """Symmetric numbers of ``x / scale``: nearest, within ``reach``."""
        near = np.clip(self.nearest(steps), -self.reach, self.reach)
        return np.asarray(near.astype(self.stored))


_EVEN = np.linspace(0.0, 1.0, 129)

FORMATS: dict[Kind, Format] = {
    "int8": Format(np.dtype(np.int8), (-128, 127), 127, np.rint, _EVEN),
    "uint8": Format(np.dtype(np.uint8), (0, 255), 255, np.rint, _EVEN, affine=True),
    "fp8": Format(
        _E4M3,
        (-_E4M3_LARGEST, _E4M3_LARGEST),
        _E4M3_LARGEST,
        _to_e4m3,
        _e4m3_edges(),
        weight="fp8",
        opset=19,
        slack=64.0,
        stretches=tuple(2.0 ** (i / 8) for i in range(8)),
    ),
}
