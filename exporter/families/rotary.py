"""Rotary positions (Su et al. 2021): how config.json says that positions become angles, and the angles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

Frequencies = NDArray[np.floating[Any]]  # [head_dim / 2], radians per position


class Rope(BaseModel):
    """How positions become angles: ``rope_parameters``, or the older ``rope_scaling`` with ``rope_theta`` beside it.

    The last four fields say how frequencies are scaled; see ``SCALINGS``.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    rope_type: Literal["default", "linear", "llama3"] = "default"
    rope_theta: float = Field(default=10000.0, gt=0)
    partial_rotary_factor: float = Field(default=1.0, ge=1, le=1)
    factor: float = Field(default=1.0, ge=1)
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)
    original_max_position_embeddings: int = Field(default=8192, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Rope:
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError("low_freq_factor is not below high_freq_factor")
        return self


def spell_out_rope(known: dict[str, Any]) -> None:
    """Bring the older spelling of the rotary settings into ``rope_parameters``, in place."""
    rope = known.get("rope_parameters", known.get("rope_scaling", {}))
    if isinstance(rope, dict):
        outer = {key: known[key] for key in ("rope_theta", "partial_rotary_factor") if key in known}
        known["rope_parameters"] = {**outer, "rope_type": rope.get("type", "default"), **rope}


def rotary_angles(rope: Rope, dim: int, positions: int) -> NDArray[np.float32]:
    """Angle of every position and pair, float32 [positions, dim / 2] (Su et al. 2021, eq. 15)."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequencies = SCALINGS[rope.rope_type](1 / np.float32(rope.rope_theta) ** exponents, rope)
    return np.outer(np.arange(positions, dtype=np.float32), frequencies.astype(np.float32))


def _llama3(frequencies: Frequencies, rope: Rope) -> Frequencies:
    """Long waves are stretched by ``factor``, short ones stay, a ramp lies between (Llama 3.1's reference code)."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    ramp = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    scaled: Frequencies = (1 - ramp) * frequencies / rope.factor + ramp * frequencies
    return scaled


SCALINGS: dict[str, Callable[[Frequencies, Rope], Frequencies]] = {
    "default": lambda frequencies, rope: frequencies,
    "linear": lambda frequencies, rope: frequencies / rope.factor,
    "llama3": _llama3,
}
"""By ``rope_type``."""
