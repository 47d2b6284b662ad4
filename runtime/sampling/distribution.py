"""From logits to the distribution that a request asks for: pure functions of arrays."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.runtime.sampling.settings import Sampling

Scores: TypeAlias = NDArray[np.floating[Any]]  # [vocabulary], log-probabilities up to a constant
Chances: TypeAlias = NDArray[np.float64]  # [vocabulary], adds up to 1

_FEW = 64  # tokens that mostly have nearly all of the probability together


def adjust(logits: Scores, settings: Sampling, seen: Collection[int]) -> Scores:
    """Logits with bias and repetition penalty; the very array where neither is asked for.

    Args:
        logits: ``[vocabulary]``.
        settings: What is asked for.
        seen: Tokens of the prompt and the output so far.

    Returns:
        ``[vocabulary]``, float64 where something was changed.
    """
    if not settings.adjusts:
        return logits
    scores = logits.astype(np.float64)
    for token, bias in settings.logit_bias.items():
        scores[token] += bias
    if settings.remembers and seen:
        there = np.fromiter(seen, np.int64, len(seen))
        found, penalty = scores[there], settings.repetition_penalty
        scores[there] = np.where(found > 0, found / penalty, found * penalty)
    return scores


def distribution(scores: Scores, settings: Sampling) -> Chances:
    """Softmax at the temperature, with what top-k, top-p and min-p leave out at zero, ``[vocabulary]``.

    Tokens that are as likely as the last one to stay, stay too, but for top-p, where the lower id stays.
    """
    if not 0 < settings.top_k < scores.size:
        return _reduce(softmax(scores.astype(np.float64) / settings.temperature), settings)
    least = np.partition(scores, -settings.top_k)[-settings.top_k]
    likely = np.flatnonzero(scores >= least)
    chances = np.zeros(scores.size)
    chances[likely] = _reduce(softmax(scores[likely].astype(np.float64) / settings.temperature), settings)
    return chances


def _reduce(chances: Chances, settings: Sampling) -> Chances:
    """What top-p and min-p leave."""
    if settings.top_p < 1:
        chances = _nucleus(chances, settings.top_p)
    if settings.min_p > 0:
        chances[chances < settings.min_p * chances.max()] = 0
        chances /= chances.sum()
    return chances


def softmax(scores: NDArray[np.float64]) -> Chances:
    """exp(s) / sum exp(s), shifted by the largest so that nothing overflows."""
    chances: Chances = np.exp(scores - scores.max())
    chances /= chances.sum()
    return chances


def _nucleus(chances: Chances, share: float) -> Chances:
    """The likeliest tokens until they have ``share`` together, the one that reaches it included."""
    order = _likeliest(chances, share)
    ordered = chances[order]
    before = np.cumsum(ordered) - ordered
    kept = np.zeros_like(chances)
    stays = order[before < share]
    kept[stays] = chances[stays]
    kept /= kept.sum()
    return kept


def _likeliest(chances: Chances, share: float) -> NDArray[np.intp]:
    """Tokens in order of their chances, equals by their ids: as many as have ``share`` together, and some more."""
    few = _FEW
    while few < chances.size:
        least = np.partition(chances, -few)[-few]
        found = np.flatnonzero(chances >= least)
        if chances[found].sum() >= share:
            return found[np.argsort(-chances[found], kind="stable")]
        few *= 8
    return np.argsort(-chances, kind="stable")


def draw(chances: Chances, uniform: float) -> int:
    """The token at ``uniform`` of the cumulated distribution; never one without a chance.

    Args:
        chances: ``[vocabulary]``, zero or more, not all zero; may add up to anything.
        uniform: In [0, 1).
    """
    cumulated = np.cumsum(chances)
    place = int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right"))
    if place < chances.size:
        return place
    return int(np.flatnonzero(chances)[-1])  # rounding reached the very end
