"""How far to look ahead: against formulas, worked numbers and simulated rounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.runtime.accounting.acceptance import expected_tokens, predict_speedup
from qexport.runtime.speculation.pace import APART, PRIOR, STEP, Outlook, Times, best

MOST = 8
CHANCES = st.lists(st.floats(0, 1), min_size=MOST, max_size=MOST)


def curve(**points):
    """Straight between points given as ``t4=1.4``."""
    known = {int(name[1:]): value for name, value in points.items()}
    return lambda width: float(np.interp(width, list(known), list(known.values())))


# ---------------------------------------------------------------- K


@given(CHANCES, st.lists(st.floats(0, 1), min_size=MOST, max_size=MOST), st.floats(0, 0.5))
def test_the_best_number_has_the_highest_predicted_speed(chances, steps, each):
    heights = 1 + np.cumsum([0, *steps])

    def target(width):
        return float(heights[int(width) - 1])

    times = Times(target, lambda ahead: each * ahead, most=MOST)
    speeds = [predict_speedup(chances, ahead, target, lambda ahead: each * ahead) for ahead in range(1, MOST + 1)]
    found = best(chances, times.round, MOST)
    assert speeds[found - 1] == pytest.approx(max(speeds))


@pytest.mark.parametrize(
    ("verify", "chosen", "speed"),
    [
        (curve(t1=1, t2=1.3, t4=1.4, t5=1.9, t8=2.8), 3, 1.49),  # weights in 4 bits: from the fifth on tokens cost
        (curve(t1=1, t5=1.0, t8=1.2), 4, 1.98),  # 8 bits: five tokens cost what one does
    ],
)
def test_acceptance_of_70_percent_and_a_draft_of_a_tenth_give_the_worked_speeds(verify, chosen, speed):
    times = Times(verify, lambda ahead: 0.1 * ahead, most=7)
    found = best([0.7] * 7, times.round, 7)
    assert found == chosen
    tokens = (1 - 0.7 ** (found + 1)) / 0.3
    assert tokens * times.round(0) / times.round(found) == pytest.approx(speed, abs=0.005)


def test_a_draft_that_is_never_right_is_asked_for_one_token_and_a_free_one_that_always_is_for_all():
    times = Times(curve(t1=1, t9=1), lambda ahead: 0.0, most=MOST)
    assert best([0.0] * MOST, times.round, MOST) == 1
    assert best([1.0] * MOST, times.round, MOST) == MOST


def test_what_is_chosen_is_the_best_of_simulated_rounds_too():
    rng, chances = np.random.default_rng(0), [0.8, 0.75, 0.7, 0.6, 0.5, 0.3, 0.3, 0.3]
    times = Times(curve(t1=1, t2=1.1, t9=1.9), lambda ahead: 0.12 * ahead, most=MOST)
    measured = []
    for ahead in range(1, MOST + 1):
        taken = (rng.random((20000, ahead)) < chances[:ahead]).cumprod(axis=1).sum(axis=1)
        measured.append(times.round(ahead) / (1 + taken.mean()))
    found = best(chances, times.round, MOST)
    assert measured[found - 1] < 1.01 * min(measured)
    assert min(measured) < 0.97 * measured[0]


# ---------------------------------------------------------------- acceptance


def test_nothing_seen_is_the_prior_and_positions_never_seen_have_the_rate_of_all():
    outlook = Outlook()
    assert outlook.conditional(3) == [PRIOR] * 3
    for _ in range(400):
        outlook.observe(2, 2)
    first, second, third = outlook.conditional(3)
    assert first == second > 0.98
    assert 0.95 < third <= 1


def test_each_position_is_learned_by_itself():
    rng, truth, outlook = np.random.default_rng(1), [0.9, 0.5, 0.8], Outlook()
    kept = []
    for number in range(4000):
        accepted = int((rng.random(3) < truth).cumprod().sum())
        outlook.observe(3, accepted)
        if number > 500:
            kept.append(outlook.conditional(3))
    learned, rate = np.mean(kept, axis=0), np.average(truth, weights=[1, 0.9, 0.45])
    assert all(
        abs(one - rate) < abs(real - rate) for one, real in zip(learned, truth, strict=True)
    )  # leans on the rest
    assert learned == pytest.approx(truth, abs=0.12)
    assert np.std(kept, axis=0).max() < 0.1


def test_tokens_behind_the_first_that_is_not_taken_tell_nothing():
    one, other = Outlook(), Outlook()
    one.observe(1, 0)
    other.observe(5, 0)
    assert one.conditional(1) == other.conditional(1)
    assert (
        other.conditional(5)[1:] == [other.conditional(1)[0]] * 4 or other.conditional(5)[1] > other.conditional(5)[0]
    )


def test_what_was_seen_long_ago_counts_little():
    outlook = Outlook()
    for _ in range(1000):
        outlook.observe(1, 1)
    for _ in range(40):
        outlook.observe(1, 0)
    assert outlook.conditional(1)[0] < 0.15


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5))))
def test_chances_stay_between_0_and_1(rounds):
    outlook = Outlook()
    for proposed, accepted in rounds:
        outlook.observe(proposed, min(proposed, accepted))
    assert all(0 <= chance <= 1 for chance in outlook.conditional(6))


# ---------------------------------------------------------------- times


def test_a_draft_that_is_slower_than_its_curve_says_is_taken_for_that_after_some_rounds():
    times = Times(curve(t1=2.0, t9=2.8), lambda ahead: 0.1 * ahead, most=MOST)
    assert times.round(4) == pytest.approx(2.0 + 0.4 + 0.4)
    for _ in range(60):
        times.observe_draft(4, 0.8)
        times.observe_rest(0.05)
    assert times.round(0) == pytest.approx(2.05)
    assert times.round(2) == pytest.approx(2.2 + 0.4 + 0.05, rel=1e-3)


def test_a_rest_that_rounds_to_less_than_nothing_is_none():
    times = Times(curve(t1=2.0, t9=2.8), None, most=MOST)
    for _ in range(300):
        times.observe_rest(-1e-15)
    assert times.round(0) == 2.0


def test_one_disturbed_round_moves_little():
    times = Times(curve(t1=1.0, t9=1.0), lambda ahead: 0.1 * ahead, most=MOST)
    times.observe_draft(4, 400.0)
    assert times.round(4) == pytest.approx(1 + 0.4 * (1 + (APART - 1) * STEP))


def test_load_is_how_much_longer_a_call_took_than_its_curve_says():
    times = Times(curve(t1=1.0, t9=5.0), None, most=MOST)
    assert times.load(2, 6.0) == 3.0
    assert times.round(2) == 2.0
    times.observe_draft(2, 1.0)  # there is none
    assert times.round(2) == 2.0


def test_what_verifying_adds_is_told_as_shares_of_a_plain_round():
    times = Times(curve(t1=1.0, t9=1.8), None, most=4)
    assert times.verifying() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    times.observe_rest(1.0)
    assert times.verifying() == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_k_stays_where_another_is_hardly_better():
    chances, most = [0.7] * 6, 6
    each = [(1 + 0.225 * k) / expected_tokens(chances, k) for k in range(1, most + 1)]
    chosen = best(chances, lambda k: 1 + 0.225 * k, most)
    assert chosen == 1 + each.index(min(each))
    for now in range(1, most + 1):
        kept = best(chances, lambda k: 1 + 0.225 * k, most, now)
        assert kept == (now if each[now - 1] <= 1.01 * min(each) else chosen)
    assert {best(chances, lambda k: 1 + 0.225 * k, most, now) for now in range(1, most + 1)} > {chosen}
