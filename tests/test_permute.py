"""Orders of inputs that lose least to a pattern of zeros."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.passes.numbers.masks import Pattern, keep_mask
from qexport.passes.numbers.permute import group_order, retained

TWO = Pattern.parse("2:4")


def scores_of(k, n, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    return np.abs(rng.standard_normal((k, n))) * np.exp(spread * rng.standard_normal((k, 1)))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 9), st.sampled_from(["2:4", "1:4", "1:2", "3:8", "4:8"])
)
def test_an_order_has_every_input_once_and_never_keeps_less(seed, groups, n, name):
    pattern = Pattern.parse(name)
    scores = scores_of(groups * pattern.group, n, seed)
    order = group_order(scores, pattern)
    assert sorted(order) == list(range(len(scores)))
    assert retained(scores[order], pattern) >= retained(scores, pattern)
    assert np.array_equal(group_order(scores.copy(), pattern), order)


def test_what_is_kept_is_what_the_mask_keeps():
    scores = scores_of(32, 7)
    assert retained(scores, TWO) == pytest.approx(scores[keep_mask(scores, TWO)].sum())


def test_inputs_that_all_matter_do_not_stay_together():
    scores = np.repeat([5.0] * 4 + [0.1] * 4, 3).reshape(8, 3)
    order = group_order(scores, TWO)
    assert retained(scores[order], TWO) == pytest.approx(scores[:4].sum())
    assert [sum(place < 4 for place in group) for group in order.reshape(2, 4)] == [2, 2]


@pytest.mark.parametrize("seed", range(8))
def test_two_groups_end_close_to_the_best_of_all_their_splits(seed):
    scores = scores_of(8, 12, seed)
    every = (np.array([*part, *(set(range(8)) - set(part))]) for part in combinations(range(8), 4) if 0 in part)
    known = [retained(scores[order], TWO) for order in every]
    assert len(known) == 35
    found = retained(scores[group_order(scores, TWO)], TWO)
    assert found >= np.quantile(known, 0.9)
    assert found <= max(known) + 1e-6


def test_no_exchange_of_two_inputs_wins_much_afterwards():
    scores = scores_of(32, 20, seed=3)
    order = group_order(scores, TWO)
    kept = retained(scores[order], TWO)
    for one, other in combinations(range(32), 2):
        swapped = order.copy()
        swapped[[one, other]] = swapped[[other, one]]
        assert retained(scores[swapped], TWO) <= kept * (1 + 1e-4)


def test_outputs_that_are_not_looked_at_count_all_the_same():
    scores = scores_of(64, 700, seed=5)
    order = group_order(scores, TWO)
    lost, left = (scores.sum() - retained(scores[rows], TWO) for rows in (np.arange(64), order))
    assert left < 0.85 * lost


def test_scores_that_are_all_alike_stay_in_their_order():
    for scores in (np.zeros((16, 5)), np.ones((16, 5)), np.ones((4, 5)), np.ones((8, 0))):
        assert group_order(scores, TWO).tolist() == list(range(len(scores)))


def test_a_pattern_without_groups_and_inputs_that_they_do_not_divide_are_errors():
    with pytest.raises(ValueError, match="divide"):
        group_order(np.ones((8, 2)), Pattern(0.5))
    with pytest.raises(ValueError, match="groups of 4 do not divide 10 inputs"):
        group_order(np.ones((10, 2)), TWO)
