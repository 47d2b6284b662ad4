"""Both rules against exact arithmetic: the distribution of a token is the target's, whatever was proposed."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.runtime.sampling.sampler import NotFiniteError, Sampler
from qexport.runtime.sampling.settings import Sampling
from qexport.runtime.speculation import rules
from qexport.runtime.speculation.proposal import NOTHING, Proposal, Row
from qexport.runtime.speculation.rules import equality, rejection, residual, verify

WEIGHTS = st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any)
ROW = Row([7, 8], 2)
DRAWN = Sampler(Sampling(temperature=1.0))


def logits_of(*rows):
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows, np.float64)).astype(np.float32)


def chances_of(weights):
    return np.array(weights) / np.sum(weights)


@given(WEIGHTS, WEIGHTS)
def test_accepting_by_the_ratio_and_drawing_from_what_is_left_gives_the_targets_distribution(target, draft):
    q, p = ([Fraction(w, sum(weights)) for w in weights] for weights in (target, draft))
    left = [max(a - b, Fraction(0)) for a, b in zip(q, p, strict=True)]
    taken = sum(min(a, b) for a, b in zip(q, p, strict=True))
    total = sum(left)
    for token in range(4):
        found = min(q[token], p[token]) + ((1 - taken) * left[token] / total if total else 0)
        assert found == q[token]
    theirs = residual(chances_of(target), chances_of(draft))
    if total:
        np.testing.assert_allclose(theirs / theirs.sum(), [float(x / total) for x in left], atol=1e-12)
    else:
        np.testing.assert_array_equal(theirs, chances_of(target))


class Numbers:
    """Uniform numbers on a grid: the rule's outcome over all of them is its exact distribution."""

    def __init__(self, monkeypatch):
        self.given = {}
        monkeypatch.setattr(Sampler, "number", lambda _self, _row, ahead, purpose: self.given[ahead, purpose.name])


@pytest.mark.parametrize(("target", "draft"), [([1, 2, 5, 0], [4, 3, 0, 1]), ([1, 1, 1, 1], [0, 0, 0, 1])])
def test_the_rejection_rule_over_a_grid_of_all_numbers_has_the_targets_distribution(monkeypatch, target, draft):
    numbers, steps = Numbers(monkeypatch), 48
    q, p = chances_of(target), chances_of(draft)
    logits, grid = logits_of(q, q), (np.arange(steps) + 0.5) / steps
    counts = np.zeros(4)
    for token in np.flatnonzero(p):
        proposal = Proposal((int(token),), np.stack([p]))
        for accept in grid:
            for left in grid:
                numbers.given = {(0, "ACCEPT"): accept, (0, "RESIDUAL"): left, (1, "TOKEN"): 0.5}
                counts[rejection(proposal, proposal.chances, logits, ROW, DRAWN).tokens[0]] += p[token]
    np.testing.assert_allclose(counts / steps**2, q, atol=2 / steps)


def test_what_stands_behind_the_last_token_goes_the_same_way_with_a_spare(monkeypatch):
    numbers = Numbers(monkeypatch)
    q0, q1, p = chances_of([1, 1, 0, 0]), chances_of([0, 1, 3, 0]), chances_of([1, 0, 1, 0])
    proposal = Proposal((0,), np.stack([p, p]), spare=2)
    numbers.given = {(0, "ACCEPT"): 0.9, (1, "ACCEPT"): 0.9}
    assert rejection(proposal, proposal.chances, logits_of(q0, q1), ROW, DRAWN) == rules.Verdict(1, (0, 2))
    refused = Proposal((0,), proposal.chances, spare=0)
    numbers.given[1, "RESIDUAL"] = 0.49
    assert rejection(refused, refused.chances, logits_of(q0, q1), ROW, DRAWN) == rules.Verdict(1, (0, 1))
    numbers.given[1, "RESIDUAL"] = 0.51
    assert rejection(refused, refused.chances, logits_of(q0, q1), ROW, DRAWN) == rules.Verdict(1, (0, 2))


def test_a_token_that_the_target_never_says_is_not_taken_whatever_the_number(monkeypatch):
    numbers = Numbers(monkeypatch)
    numbers.given = {(0, "ACCEPT"): 0.0, (0, "RESIDUAL"): 0.0, (1, "TOKEN"): 0.5}
    logits = logits_of(chances_of([0, 1, 1, 0]), chances_of([1, 1, 1, 1]))
    logits[0, [0, 3]] = -np.inf
    proposal = Proposal((0,), np.stack([chances_of([1, 1, 1, 1])]))
    assert rejection(proposal, proposal.chances, logits, ROW, DRAWN) == rules.Verdict(0, (1,))


def test_equality_takes_as_far_as_the_target_says_the_same():
    logits = logits_of([1, 5, 1, 1], [5, 1, 1, 1], [1, 1, 1, 5])
    greedy = Sampler(Sampling())
    assert equality(Proposal((1, 0)), logits, ROW, greedy) == rules.Verdict(2, (1, 0, 3))
    assert equality(Proposal((1, 2)), logits, ROW, greedy) == rules.Verdict(1, (1, 0))
    assert equality(Proposal((3, 0)), logits, ROW, greedy) == rules.Verdict(0, (1,))
    assert equality(NOTHING, logits[:1], ROW, greedy) == rules.Verdict(0, (1,))


@given(st.lists(WEIGHTS, min_size=4, max_size=4), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 99))
def test_proposals_without_chance_never_change_what_is_drawn(weights, proposed, seed):
    logits, sampler = logits_of(*weights), Sampler(Sampling(temperature=0.7, top_k=3, seed=seed))
    plain: list[int] = []
    for place in range(4):
        plain.append(sampler.token(logits[place], ROW, plain))
    found = verify(Proposal(tuple(proposed)), logits[: len(proposed) + 1], ROW, sampler).tokens
    assert list(found) == plain[: len(found)]


def test_numbers_that_are_none_matter_where_they_are_reached_only():
    logits = logits_of([1, 5, 1, 1], [1, 1, 1, 1])
    logits[1] = np.nan
    greedy = Sampler(Sampling())
    assert verify(Proposal((2,)), logits, ROW, greedy).tokens == (1,)
    with pytest.raises(NotFiniteError, match="position 3 is nan"):
        verify(Proposal((1,)), logits, ROW, greedy)
