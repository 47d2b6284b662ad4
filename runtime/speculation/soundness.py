"""Whether a target can verify: its logits must not depend on the tokens behind them, which may never come to be.

A graph with a causal mask is not enough. One that finds the range of an activation at every call, over all tokens of
the call together (DynamicQuantizeLinear), lets rejected tokens and neighbours in the batch into every number: int8 of
that kind changes most greedy texts when it is asked for several tokens at once. So it is measured, on the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qexport.errors import ModelInvalid
from qexport.runtime.decoder import Decoder, Logits

PREFIX, AHEAD = 8, 4
MOST_LEAK = 1e-4


@dataclass(frozen=True, slots=True)
class Soundness:
    """What a token's logits depend on beside the tokens before it; in standard deviations of logits.

    Attributes:
        leak: Largest change by other tokens behind it in the same call.
        width: Largest change by the number of tokens in the call: another kernel adds up in another order, or rounds
            activations in another way. Near ties may fall to the other side by it.
    """

    leak: float
    width: float

    @property
    def sound(self) -> bool:
        """Whether what comes behind does not matter."""
        return self.leak <= MOST_LEAK


def measure_soundness(decoder: Decoder) -> Soundness:
    """Read a token alone, and in two wide calls with different tokens behind it; the decoder is reset before."""
    rng = np.random.default_rng(0)
    vocabulary = decoder.signature.vocabulary
    limit = PREFIX + AHEAD if decoder.limit is None else min(decoder.limit, PREFIX + AHEAD)
    length = max(1, limit - AHEAD)
    if limit - length < 2:
        return Soundness(0.0, 0.0)  # there is no room to look ahead
    prefix = rng.integers(0, vocabulary, (1, length))
    ahead = rng.integers(0, vocabulary, (2, limit - length))
    ahead[:, 0] = ahead[0, 0]  # the token that is looked at; what stands behind it differs
    decoder.reset(1)
    decoder.extend(prefix)
    found: list[Logits] = []
    for tokens in (ahead[:1, :1], ahead[:1], ahead[1:]):
        found.append(decoder.extend(tokens)[0, 0])
        decoder.rollback(length)
    narrow, wide, other = found
    if not np.isfinite(found).all():
        return Soundness(0.0, 0.0)  # requests find that themselves
    spread = float(narrow.std()) or 1.0
    return Soundness(float(np.abs(wide - other).max()) / spread, float(np.abs(wide - narrow).max()) / spread)


def demand_sound(found: Soundness, where: str) -> None:
    """Raise :class:`ModelInvalid` for a target that would say something else when it is asked ahead."""
    if found.sound:
        return
    what = (
        f"logits change by {found.leak:.2g} standard deviations with the tokens behind them, "
        "so decoding ahead would change what the model says"
    )
    hint = "activations are quantized over whole calls; build it with int8, smoothquant-o1 or weights only"
    raise ModelInvalid(what, where=where, hint=hint)
