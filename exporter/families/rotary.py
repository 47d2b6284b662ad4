"""Rotary positions (Su et al. 2021): how config.json says that positions become angles, and the angles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from qexport.exporter.families.settings import Settings

Frequencies = NDArray[np.floating[Any]]  # [pairs], radians per position

_NEED_A_FACTOR = ("linear", "dynamic", "llama3")


class Rope(Settings):
    """How positions become angles: ``rope_parameters``, or the older ``rope_scaling`` with ``rope_theta`` beside it.

    ``rope_type`` says how frequencies are scaled, see ``SCALINGS``; the fields behind ``factor`` belong to some types.
    ``partial_rotary_factor`` is the part of each head, from its start, that is turned at all.
    """

    rope_type: Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"] = "default"
    rope_theta: float = Field(default=10000.0, gt=1)
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1)
    factor: float | None = Field(default=None, ge=1, le=1 << 20)
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)
    attention_factor: float | None = Field(default=None, gt=0)
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    original_max_position_embeddings: int = Field(default=8192, gt=1)
    max_position_embeddings: int = Field(default=8192, gt=0)

    @model_validator(mode="after")
    def _complete(self) -> Rope:
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError("low_freq_factor is not below high_freq_factor")
        if not self.beta_slow < self.beta_fast:
            raise ValueError("beta_slow is not below beta_fast")
        if self.rope_type in _NEED_A_FACTOR and self.factor is None:
            raise ValueError(f"rope_type {self.rope_type!r} needs a factor")
        return self

    @model_validator(mode="after")
    def _one_set_of_frequencies(self) -> Rope:
        """LongRoPE has one set for short texts and one for long: a graph has room for one."""
        longest, short = self.max_position_embeddings, self.original_max_position_embeddings
        if self.rope_type == "longrope" and longest > short and self.short_factor != self.long_factor:
            raise ValueError(
                f"longrope turns by short_factor up to {short} tokens and by long_factor behind them, which one graph "
                f"cannot; for texts of up to {short} tokens set max_position_embeddings to {short} and, in the rotary "
                f"settings, attention_factor to {attention_factor(self):.8g}"
            )
        return self

    @property
    def stretch(self) -> float:
        """``factor``, or how much longer texts are than those of the first training."""
        return self.max_position_embeddings / self.original_max_position_embeddings if not self.factor else self.factor

    def pairs(self, dim: int) -> int:
        """How many pairs of a head of size ``dim`` are turned; ``ValueError`` when that is no whole number of them."""
        turned = int(dim * self.partial_rotary_factor)
        if turned < 2 or turned % 2:
            raise ValueError(f"partial_rotary_factor turns {turned} of {dim} numbers, which are no pairs")
        for name, factors in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            if self.rope_type == "longrope" and (len(factors) != turned // 2 or min(factors) <= 0):
                raise ValueError(f"{name} are not {turned // 2} numbers above 0")
        return turned // 2


def spell_out_rope(known: dict[str, Any]) -> None:
    """Bring what config.json says of rotary positions into ``rope_parameters``, in place.

    Raises:
        ValueError: Settings by kind of layer, or in both spellings at once.
    """
    rope, older = (known.get(name, {}) for name in ("rope_parameters", "rope_scaling"))
    if rope and older and rope != older:
        raise ValueError("rope_parameters and rope_scaling say different things: leave one of them out")
    rope = rope or older
    if not isinstance(rope, dict):
        return
    if any(isinstance(setting, dict) for setting in rope.values()):
        raise ValueError(f"rotary settings for each kind of layer ({', '.join(rope)}) are not supported")
    longest = known.get("max_position_embeddings", 8192)
    outer = {key: known[key] for key in ("rope_theta", "partial_rotary_factor") if key in known}
    inner = {key: value for key, value in rope.items() if value is not None}
    first = {"original_max_position_embeddings": longest, "rope_type": inner.get("type", "default")}
    known["rope_parameters"] = {**outer, **first, **inner, "max_position_embeddings": longest}
    if "original_max_position_embeddings" in known:  # beside the rotary settings it has the last word
        known["rope_parameters"]["original_max_position_embeddings"] = known["original_max_position_embeddings"]


def rotary_angles(rope: Rope, dim: int, positions: int) -> NDArray[np.float32]:
    """Angle of every position and pair, float32 [positions, pairs] (Su et al. 2021, eq. 15), for heads of ``dim``."""
    pairs = rope.pairs(dim)
    exponents = np.arange(0, 2 * pairs, 2, dtype=np.float32) / np.float32(2 * pairs)
    frequencies = SCALINGS[rope.rope_type](1 / np.float32(rope.rope_theta) ** exponents, rope)
    return np.outer(np.arange(positions, dtype=np.float32), frequencies.astype(np.float32))


def attention_factor(rope: Rope) -> float:
    """What the turned numbers are multiplied by: 1 but for YaRN and LongRoPE, which sharpen attention by it."""
    if rope.rope_type not in ATTENTION_FACTORS:
        return 1.0
    return ATTENTION_FACTORS[rope.rope_type](rope) if rope.attention_factor is None else rope.attention_factor


def _llama3(frequencies: Frequencies, rope: Rope) -> Frequencies:
    """Long waves are stretched by ``factor``, short ones stay, a ramp lies between (Llama 3.1's reference code)."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    ramp = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    scaled: Frequencies = (1 - ramp) * frequencies / rope.stretch + ramp * frequencies
    return scaled


def _yarn(frequencies: Frequencies, rope: Rope) -> Frequencies:
    """The same idea with the ramp over the index of pairs (Peng et al. 2023, section 3.2, and its code's rounding)."""
    pairs, span = len(frequencies), rope.original_max_position_embeddings / (2 * math.pi)
    ends = [pairs * math.log(span / turns, rope.rope_theta) for turns in (rope.beta_fast, rope.beta_slow)]
    if rope.truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], 2 * pairs - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(pairs, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    scaled: Frequencies = ramp * frequencies / np.float32(rope.stretch) + (1 - ramp) * frequencies
    return scaled


def _longrope(frequencies: Frequencies, rope: Rope) -> Frequencies:
    """A factor for each pair, found by search (Ding et al. 2024)."""
    factors: Frequencies = np.array(rope.short_factor, np.float32)
    scaled: Frequencies = frequencies / factors
    return scaled


SCALINGS: dict[str, Callable[[Frequencies, Rope], Frequencies]] = {
    "default": lambda frequencies, rope: frequencies,
    "linear": lambda frequencies, rope: frequencies / np.float32(rope.stretch),
    "dynamic": lambda frequencies, rope: frequencies,  # they change behind max_position_embeddings, where graphs end
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
"""By ``rope_type``."""


def _yarn_factor(rope: Rope) -> float:
    """``0.1 ln s + 1`` (Peng et al. 2023, eq. 22), or the ratio that DeepSeek made of it."""
    if not (rope.mscale and rope.mscale_all_dim):
        return _magnitude(rope.stretch, 1.0)
    return _magnitude(rope.stretch, rope.mscale) / _magnitude(rope.stretch, rope.mscale_all_dim)


def _magnitude(stretch: float, scale: float) -> float:
    return 0.1 * scale * math.log(stretch) + 1 if stretch > 1 else 1.0


def _longrope_factor(rope: Rope) -> float:
    """Ding et al. 2024, as Phi-3 has it."""
    if rope.stretch <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.stretch) / math.log(rope.original_max_position_embeddings))


ATTENTION_FACTORS: dict[str, Callable[[Rope], float]] = {"yarn": _yarn_factor, "longrope": _longrope_factor}
"""By ``rope_type``, where config.json does not give it."""
