"""Which proposed tokens are taken, and what stands in the place of the first that is not.

Both rules leave the target's distribution as it is. *Equality*: the target chooses at every position as if nothing had
been proposed; what was proposed only decides how far one call carries. *Rejection* (Leviathan et al. 2023, algorithm
1; Chen et al. 2023, theorem 1): a token x drawn from p is taken with probability min(1, q(x) / p(x)), else one is drawn
from (q - p)+ normalized; of all rules that look at one token it takes the most, 1 - TV(p, q).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qexport.runtime.sampling.distribution import Chances, draw
from qexport.runtime.sampling.noise import Purpose
from qexport.runtime.sampling.sampler import Sampler
from qexport.runtime.speculation.proposal import Logits, Proposal, Row


class Verdict(NamedTuple):
    """What comes of one row's proposal.

    Attributes:
        accepted: How many proposed tokens are taken.
        tokens: Those and the one behind them, which the target's own call gives for free.
    """

    accepted: int
    tokens: tuple[int, ...]


def verify(proposal: Proposal, logits: Logits, row: Row, sampler: Sampler) -> Verdict:
    """Decide on a proposal.

    Args:
        proposal: ``k`` tokens, zero or more.
        logits: The target's, ``[k + 1, vocabulary]``: row ``i`` follows ``i`` proposed tokens.
        row: What was decided before.
        sampler: Settings and randomness.

    Raises:
        NotFiniteError: Logits that are needed are no numbers.
    """
    if proposal.chances is None or sampler.settings.greedy:
        return equality(proposal, logits, row, sampler)
    return rejection(proposal, proposal.chances, logits, row, sampler)


def equality(proposal: Proposal, logits: Logits, row: Row, sampler: Sampler) -> Verdict:
    """Take proposed tokens for as long as each is the one that the target chooses itself."""
    ids = proposal.ids
    chosen = sampler.tokens(logits, row, ids)
    for place, (wanted, token) in enumerate(zip(ids, chosen, strict=False)):
        if token != wanted:
            return Verdict(place, (*ids[:place], token))
    return Verdict(len(ids), (*ids, next(chosen)))


def rejection(proposal: Proposal, chances: Chances, logits: Logits, row: Row, sampler: Sampler) -> Verdict:
    """Take tokens drawn from ``chances`` with min(1, q / p); the first that is not is drawn anew from (q - p)+.

    The position behind the last goes the same way with ``proposal.spare``, if there is one.
    """
    ids = proposal.ids
    for place, wanted in enumerate(ids):
        target = sampler.chances(logits[place], row, ids[:place])
        token = _decide(wanted, chances[place], target, row, place, sampler)
        if token is not None:
            return Verdict(place, (*ids[:place], token))
    last = len(ids)
    target = sampler.chances(logits[last], row, ids)
    if proposal.spare is None:
        return Verdict(last, (*ids, draw(target, sampler.number(row, last, Purpose.TOKEN))))
    token = _decide(proposal.spare, chances[last], target, row, last, sampler)
    return Verdict(last, (*ids, proposal.spare if token is None else token))


def _decide(wanted: int, draft: Chances, target: Chances, row: Row, place: int, sampler: Sampler) -> int | None:
    """``None`` if the drafted token is taken, else the one in its place."""
    if sampler.number(row, place, Purpose.ACCEPT) * draft[wanted] < target[wanted]:
        return None
    return draw(residual(target, draft), sampler.number(row, place, Purpose.RESIDUAL))


def residual(target: Chances, draft: Chances) -> Chances:
    """(q - p)+, not normalized; q itself where rounding leaves nothing of it."""
    left: Chances = np.maximum(target - draft, 0)
    return left if left.sum() > 0 else target
