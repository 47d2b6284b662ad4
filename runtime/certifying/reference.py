"""What a request asks for, from its definition: written apart from the runtime's own, which is held against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.errors import DataInvalid
from qexport.runtime.decoder import Decoder
from qexport.runtime.sampling.settings import Sampling

Scores: TypeAlias = NDArray[np.floating[Any]]  # [vocabulary]
Chances: TypeAlias = NDArray[np.float64]  # [vocabulary], adds up to 1

PIECE = 1 << 24  # logits that are made by a call, at most
FAR = 1.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """The distribution of one token.

    Attributes:
        chances: ``[vocabulary]``, or all of it on the best token for greedy requests.
        edge: How near truncation comes to another choice: the least change of a score (top-k) or of a share (top-p,
            min-p) that keeps one token more or less. 1 where nothing is cut.
    """

    chances: Chances
    edge: float


def wanted(logits: Scores, settings: Sampling, before: Sequence[int]) -> Wanted:
    """Bias, repetition penalty, temperature, top-k, top-p, min-p, in this order.

    Args:
        logits: Of the model.
        settings: What is asked for.
        before: All tokens so far.

    Raises:
        DataInvalid: The model gave no numbers.
    """
    scores = adjusted(logits, settings, before)
    if not np.isfinite(scores.max()):
        what = f"the largest logit of the model behind {len(before)} tokens is {scores.max()}"
        raise DataInvalid(what, hint="nothing can be certified of what has no numbers")
    if settings.greedy:
        return Wanted(np.eye(1, scores.size, int(np.argmax(scores)))[0], FAR)
    scores /= settings.temperature
    if not settings.truncated:
        chances = np.exp(scores - scores.max())
        return Wanted(chances / chances.sum(), FAR)
    order = np.lexsort((np.arange(scores.size), -scores))  # likeliest first, of equals the lower id
    ranked = scores[order]
    chances, edges = np.exp(ranked - ranked[0]), [FAR]
    if 0 < settings.top_k < ranked.size:
        last = ranked[settings.top_k - 1]
        gone = ranked < last
        edges.append(_gap(ranked, gone))
        chances[gone] = 0
    chances /= chances.sum()
    if settings.top_p < 1:
        before_it = np.concatenate([[0.0], np.cumsum(chances)[:-1]])
        gone = before_it >= settings.top_p
        edges += [float(np.abs(before_it - settings.top_p).min()), _gap(ranked, gone)]
        chances[gone] = 0
        chances /= chances.sum()
    if settings.min_p > 0:
        share = chances[chances > 0] / chances[0]
        edges.append(float(np.abs(share - settings.min_p).min()))
        chances[chances < settings.min_p * chances[0]] = 0
        chances /= chances.sum()
    found = np.empty_like(chances)
    found[order] = chances
    return Wanted(found, min(edges))


def _gap(ranked: NDArray[np.float64], gone: NDArray[np.bool_]) -> float:
    """Between the last score that stays and the first that does not."""
    return float(ranked[~gone][-1] - ranked[gone][0]) if gone.any() else FAR


def adjusted(logits: Scores, settings: Sampling, before: Sequence[int]) -> NDArray[np.float64]:
    """Logits with bias and repetition penalty, a new array."""
    scores = np.array(logits, np.float64)
    for token, bias in settings.logit_bias.items():
        scores[token] += bias
    for token in set(before) if settings.repetition_penalty != 1 else ():
        up = scores[token] < 0
        scores[token] *= settings.repetition_penalty if up else 1 / settings.repetition_penalty
    return scores


def whole(decoder: Decoder, ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits after each token of one row ``[tokens, vocabulary]``, read from its start in as few calls as may be."""
    decoder.reset(1)
    piece = max(1, PIECE // decoder.signature.vocabulary)
    row = np.array([ids], np.int64)
    parts = [decoder.extend(row[:, first : first + piece])[0].copy() for first in range(0, len(ids), piece)]
    found: NDArray[np.float32] = np.concatenate(parts)
    return found


def last(decoder: Decoder, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """Logits after the last token of each row ``[rows, vocabulary]``; all rows are as long."""
    ids = np.array(rows, np.int64)
    most = max(1, PIECE // (ids.shape[1] * decoder.signature.vocabulary))
    found = []
    for first in range(0, len(ids), most):
        part = ids[first : first + most]
        decoder.reset(len(part))
        found.append(decoder.extend(part)[:, -1].copy())
    return np.concatenate(found)
