"""Whether the numbers behind a run are uniform, and independent of each other.

Draft and acceptance that share a number, or numbers that return a position later, leave every single decision
plausible and the output wrong. So the numbers are tested for each purpose by themselves, and in pairs by a contingency
table of their ranks: at the same position, at neighbouring ones, and acceptance against which token was drafted.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from qexport.runtime.certifying import gtest
from qexport.runtime.certifying.evidence import Evidence
from qexport.runtime.certifying.gtest import Fit, Table
from qexport.runtime.sampling.noise import Purpose, uniform

Values = NDArray[np.float64]

_BINS, _MOST_GROUPS = 20, 5
_NUMBERS = 2048
_RANKS = (0, 1, 3, 10)  # of drafted tokens: the likeliest, the second, the next two ...
_PAIRS = (
    (Purpose.DRAFT, Purpose.ACCEPT, 0),
    (Purpose.DRAFT, Purpose.RESIDUAL, 0),
    (Purpose.ACCEPT, Purpose.RESIDUAL, 0),
    (Purpose.DRAFT, Purpose.DRAFT, 1),
    (Purpose.ACCEPT, Purpose.ACCEPT, 1),
    (Purpose.ACCEPT, Purpose.DRAFT, 1),
    (Purpose.DRAFT, Purpose.ACCEPT, 1),
    (Purpose.RESIDUAL, Purpose.DRAFT, 1),
    (Purpose.RESIDUAL, Purpose.ACCEPT, 1),
)


def outputs(evidence: Evidence, rng: np.random.Generator) -> Fit:
    """Whether the tokens of long rows have the target's distribution, each given those before it."""
    low, high = np.array(evidence.outputs).reshape(-1, 2).T
    return spread(low + (high - low) * rng.random(low.size))


def used_numbers(evidence: Evidence, rng: np.random.Generator) -> Iterator[tuple[str, Fit]]:
    """Tests of the numbers that decisions were made by, with their names."""
    found = {purpose: evidence.places(purpose, rng) for purpose in Purpose}
    for purpose, places in found.items():
        if places:
            yield f"{purpose.name.lower()} numbers uniform", spread(np.array(list(places.values())))
    for one, other, behind in _PAIRS:
        here, there = found[one], found[other]
        both = [(value, there[later]) for key, value in here.items() if (later := _behind(key, behind)) in there]
        if both:
            where = "at the next position" if behind else "at the same position"
            yield f"{one.name.lower()} and {other.name.lower()} {where}", independent(*np.array(both).T)
    accepts = [reading for reading in evidence.readings if reading.purpose is Purpose.ACCEPT]
    if accepts:
        places = found[Purpose.ACCEPT]
        values = np.array([places[reading.run, reading.row, reading.position] for reading in accepts])
        kinds = np.searchsorted(_RANKS, [reading.rank for reading in accepts], side="right")
        yield "acceptance and the drafted token", independent(values, kinds.astype(np.float64))


def looked_up_numbers(seed: int) -> Iterator[tuple[str, Fit]]:
    """Tests of the numbers as they are looked up: purposes, positions, sequences and seeds against each other."""
    numbers = {purpose: _numbers(seed, 0, purpose) for purpose in Purpose}
    for purpose, values in numbers.items():
        yield f"{purpose.name.lower()} looked up, uniform", spread(values)
    for one, other in combinations(Purpose, 2):
        yield f"{one.name.lower()} and {other.name.lower()} looked up", independent(numbers[one], numbers[other])
    token = numbers[Purpose.TOKEN]
    yield "neighbouring positions looked up", independent(token[:-1], token[1:])
    yield "neighbouring rows looked up", independent(token, _numbers(seed, 1, Purpose.TOKEN))
    yield "neighbouring seeds looked up", independent(token, _numbers(seed + 1, 0, Purpose.TOKEN))


def spread(values: Values) -> Fit:
    """Test that values are uniform on [0, 1], by twenty classes."""
    places = np.minimum((values * _BINS).astype(np.int64), _BINS - 1)
    return gtest.fit([Table(np.bincount(places, minlength=_BINS), np.full(_BINS, 1 / _BINS))])


def independent(one: Values, other: Values) -> Fit:
    """Test that pairs are independent, by a table of the ranks of both (with Williams' correction for tables)."""
    groups = max(2, min(_MOST_GROUPS, int(np.sqrt(one.size / gtest.LEAST))))
    counts = np.zeros((groups, groups))
    np.add.at(counts, (_group(one, groups), _group(other, groups)), 1)
    counts = counts[counts.any(axis=1)][:, counts.any(axis=0)]
    rows, columns, total = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    freedom = (rows.size - 1) * (columns.size - 1)
    if not freedom:
        return Fit(0.0, 0, 1.0, int(total))
    there = counts > 0
    expected = np.outer(rows, columns) / total
    statistic = 2 * float((counts[there] * np.log(counts[there] / expected[there])).sum())
    excess = (total * (1 / rows).sum() - 1) * (total * (1 / columns).sum() - 1)
    statistic /= 1 + float(excess) / (6 * float(total) * freedom)
    return Fit(statistic, freedom, gtest.tail(statistic, freedom), int(total))


def _group(values: Values, groups: int) -> NDArray[np.int64]:
    """Groups of about as many values each; equal values are in the same."""
    edges = np.quantile(values, np.arange(1, groups) / groups)
    return np.searchsorted(edges, values, side="right").astype(np.int64)


def _behind(key: tuple[int, int, int], count: int) -> tuple[int, int, int]:
    return key[0], key[1], key[2] + count


def _numbers(seed: int, stream: int, purpose: Purpose) -> Values:
    return np.array([uniform(seed, stream, position, purpose) for position in range(_NUMBERS)])
