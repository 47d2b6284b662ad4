"""Orders of inputs in which a pattern of zeros costs least.

Sparse tensor cores read 2:4 in groups of consecutive inputs. Where inputs may change places, an order in which every
group mixes large and small weights keeps more of them (Pool and Yu 2021, "Channel Permutations for N:M Sparsity").
From the given order on, two inputs of different groups change places for as long as that raises the sum of the scores
that stay: the best exchange of every pair of groups is known for all pairs at once, and in a round each group takes
part in one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qexport.passes.numbers.masks import Pattern, Scores

Order = NDArray[np.int64]  # [K]
COLUMNS = 128  # outputs that exchanges are looked for on; what is found is judged on all
WORK = 4_000_000_000  # comparisons in all: a few seconds
BLOCK = 4_000_000  # of them at a time
LEAST = 1e-5  # share of what stays that a round must win for another one to follow


def retained(scores: Scores, pattern: Pattern) -> float:
    """The sum of the scores that stay, of ``[K, N]``."""
    groups = scores.reshape(len(scores) // pattern.group, pattern.group, scores.shape[1])
    return float(np.sort(groups, axis=1)[:, -pattern.kept :].sum(dtype=np.float64))


def group_order(scores: Scores, pattern: Pattern) -> Order:
    """An order of the inputs that keeps at least as much as the given one, ``[K]``: ``scores[order]``.

    Args:
        scores: What each weight is worth, ``[K, N]``, not negative.
        pattern: Zeros in groups, which must divide K.

    Raises:
        ValueError: The pattern has no groups, or they do not divide K.
    """
    k, n = scores.shape
    if not pattern.group or k % pattern.group:
        raise ValueError(f"groups of {pattern.group} do not divide {k} inputs")
    order = np.arange(k)
    exact = np.asarray(scores, np.float32)
    seen = exact[:, np.linspace(0, n - 1, min(n, COLUMNS)).round().astype(int)] if n else exact
    table, stale, work = np.zeros((k, k), np.float32), order, WORK
    while len(stale) and work > 0 and k > pattern.group:
        table[stale] = _filled(_thresholds(seen, order, pattern)[stale], seen)
        work -= len(stale) * k * seen.shape[1]
        before = order
        order, gain = _exchanged(exact, order, pattern, table)
        if gain <= LEAST * retained(exact[order], pattern):
            break
        changed = (before != order).reshape(-1, pattern.group).any(axis=1)
        stale = order.reshape(-1, pattern.group)[changed].ravel()
    return order if retained(scores[order], pattern) >= retained(scores, pattern) else np.arange(k)


def _thresholds(scores: Scores, order: Order, pattern: Pattern) -> Scores:
    """What another input must beat to stay in an input's place, ``[K, N]``: the last that stays among the others."""
    groups = scores[order].reshape(len(order) // pattern.group, pattern.group, scores.shape[1])
    ranked = np.sort(groups, axis=1)
    last, next_one = ranked[:, -pattern.kept, None], ranked[:, -pattern.kept - 1, None]
    found = np.empty_like(scores)
    found[order] = np.where(groups >= last, next_one, last).reshape(scores.shape)
    return found


def _filled(thresholds: Scores, scores: Scores) -> Scores:
    """What the last place is worth with each input in place of each, ``[rows, K]``."""
    k, n = scores.shape
    found = np.empty((len(thresholds), k), np.float32)
    rows = max(1, BLOCK // max(k * n, 1))
    for start in range(0, len(thresholds), rows):
        part = thresholds[start : start + rows, None]
        found[start : start + rows] = np.maximum(part, scores).sum(axis=2)
    return found


def _exchanged(scores: Scores, order: Order, pattern: Pattern, table: Scores) -> tuple[Order, float]:
    """The order after one round, and what it won.

    An input in place of another one leaves the rest of that group as it is, so what two inputs win by changing places
    is a sum over both groups, of numbers of ``table``.
    """
    size = pattern.group
    ranked = table[np.ix_(order, order)]
    own = np.diagonal(ranked)
    gains = ranked + ranked.T - own[:, None] - own
    count = len(order) // size
    blocks = gains.reshape(count, size, count, size).transpose(0, 2, 1, 3).reshape(count, count, size * size)
    pairs = np.argwhere(np.triu(np.ones((count, count), bool), 1))
    best = blocks.max(axis=2)[tuple(pairs.T)]
    ranks = np.argsort(-best, kind="stable")
    free, moved, won = np.ones(count, bool), order.copy(), 0.0
    for one, other in pairs[ranks[best[ranks] > 0]]:
        if free[one] and free[other]:
            first, second = divmod(int(blocks[one, other].argmax()), size)
            gain = _exchange(scores, moved, pattern, (one * size + first, other * size + second))
            won += gain
            free[one] = free[other] = gain <= 0
    return moved, won


def _exchange(scores: Scores, order: Order, pattern: Pattern, places: tuple[int, int]) -> float:
    """Let the inputs at two places change them if more stays then; what that wins."""
    starts = [place - place % pattern.group for place in places]
    both = np.concatenate([np.arange(start, start + pattern.group) for start in starts])
    before = retained(scores[order[both]], pattern)
    one, other = places
    order[one], order[other] = order[other], order[one]
    gain = retained(scores[order[both]], pattern) - before
    if gain <= 0:
        order[one], order[other] = order[other], order[one]
        return 0.0
    return gain
