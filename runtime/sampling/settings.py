"""What a request asks of sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qexport.errors import UsageError
from qexport.runtime.demands import is_integer, is_number

_RANGES: tuple[tuple[str, Callable[[object], bool], Callable[[Any], bool], str], ...] = (
    ("temperature", is_number, lambda value: value == 0 or 1e-30 <= value <= 1e30, "0 for greedy, or 1e-30 to 1e30"),
    ("top_k", is_integer, lambda value: value >= 0, "0 for all, or above"),
    ("top_p", is_number, lambda value: 0 < value <= 1, "above 0, up to 1"),
    ("min_p", is_number, lambda value: 0 <= value <= 1, "from 0 to 1"),
    ("repetition_penalty", is_number, lambda value: 1e-9 <= value <= 1e9, "1e-9 to 1e9"),
    ("seed", is_integer, lambda value: 0 <= value < 2**63, "from 0 to 2^63 - 1"),
)
_MOST_BIAS = 1e30
"""What settings may be: within these, no logit in single precision becomes infinite in double precision."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; the defaults are greedy.

    The order is that of transformers: bias, repetition penalty, temperature, top-k, top-p, min-p; what each leaves is
    renormalized for the next.

    Attributes:
        temperature: Logits are divided by it; 0 takes the most likely token.
        top_k: Keep the ``k`` most likely tokens (Fan et al. 2018); 0 keeps all.
        top_p: Keep the fewest tokens that have this probability together (nucleus, Holtzman et al. 2020); 1 keeps all.
        min_p: Keep tokens with at least this share of the most likely one's probability (Nguyen et al. 2024).
        repetition_penalty: Divides positive logits of tokens that were there, multiplies negative ones (CTRL, Keskar
            et al. 2019, section 4.1); 1 does nothing.
        logit_bias: Added to the logits of tokens, by id.
        seed: Of all randomness. The same seed, prompt and number in the request give the same tokens, unless a draft
            takes part as far as times say (``speculate="auto"`` with the rule of rejection).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` on the first value that is no number, or out of its range."""
        for name, kind, fits, expected in _RANGES:
            value = getattr(self, name)
            if not (kind(value) and fits(value)):
                raise UsageError(f"{name} is {value!r}, expected {expected}")
        if not isinstance(self.logit_bias, Mapping):
            raise UsageError(f"logit_bias is a {type(self.logit_bias).__name__}, expected numbers by token")
        for token, bias in self.logit_bias.items():
            if not (is_integer(token) and token >= 0 and is_number(bias) and abs(bias) <= _MOST_BIAS):
                what = f"logit_bias is {bias!r} for token {token!r}, expected a number for an id"
                raise UsageError(what, hint=f"{-_MOST_BIAS} to {_MOST_BIAS}; no logit is as large")
        if self.greedy and self.truncated:
            told = "top_k, top_p and min_p choose among tokens"
            raise UsageError(f"temperature is 0, which is greedy, but {told}", hint="give a temperature above 0")

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature == 0

    @property
    def truncated(self) -> bool:
        """Whether tokens are left out."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before anything else."""
        return bool(self.logit_bias) or self.remembers

    @property
    def remembers(self) -> bool:
        """Whether logits depend on the tokens before other than through the model."""
        return self.repetition_penalty != 1
