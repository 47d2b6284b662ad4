"""The order in which units go: every cost against least squares on the rows themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.passes.numbers.removal import System, inputs_of, merge, merge_costs, removal_costs

NONE = 1e-12  # a ridge that is none


def correlated(seed, rows=150, columns=12):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns // 2)) @ rng.standard_normal((columns // 2, columns))
    return (x + 0.4 * rng.standard_normal((rows, columns))) * rng.lognormal(0, 0.7, columns)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def share_lost(x, weight, stay):
    """Squared output error over squared output once the inputs that stay are fitted, on the rows."""
    fitted = np.linalg.lstsq(x[:, stay], x @ weight, rcond=None)[0] if stay.any() else np.zeros((0, weight.shape[1]))
    return np.square(x @ weight - x[:, stay] @ fitted).sum() / np.square(x @ weight).sum()


def greedy(readers, count):
    """Units one after the other, by trying each that is left: the order, and the error once it is gone."""
    alive, order, errors = list(range(count)), [], [0.0]
    while alive:
        trials = [sum(share_lost(x, w, ~np.isin(units, [*order, unit])) for x, w, units in readers) for unit in alive]
        errors.append(min(trials))
        order.append(alive.pop(int(np.argmin(trials))))
    return order, np.diff(errors)


def systems(readers, count, ridge=NONE):
    return [System.of(w, x.T @ x, units, count, ridge) for x, w, units in readers]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3]), st.integers(1, 2), st.booleans())
def test_costs_are_those_of_refitting_the_others_each_time(seed, size, products, free):
    count = 12 // size
    readers = []
    for number in range(products):
        units = np.random.default_rng(seed).permutation(np.repeat(np.arange(count), size))
        if free:
            units = np.where(units == count - 1, -1, units)
        readers.append((correlated(seed + number), normal(seed + number, 12, 5), units))
    count -= free
    order, costs = greedy(readers, count)
    found = removal_costs(systems(readers, count))
    assert np.argsort(found).tolist() == order
    assert found[order] == pytest.approx(np.maximum.accumulate(costs), rel=1e-4, abs=1e-7)
    assert (np.diff(found[order]) > 0).all()


def test_units_of_different_sizes_and_none_cost_what_they_hold():
    first, second = np.array([0, 0, 1, 2, 3, -1]), np.array([3, 4, 4, 4, 3, 0])  # none of 4, none of 1 and 2
    readers = [(correlated(n, columns=6), normal(n, 6, 3), units) for n, units in enumerate((first, second))]
    order, costs = greedy(readers, 5)
    found = removal_costs(systems(readers, 5))
    assert np.argsort(found).tolist() == order
    assert found[order] == pytest.approx(np.maximum.accumulate(costs), rel=1e-4)


def test_one_step_leaves_the_weight_that_least_squares_finds():
    x, weight, units = correlated(1), normal(1, 12, 4), np.repeat(np.arange(6), 2)
    (system,) = systems([(x, weight, units)], 6)
    system.remove(np.array([1, 4]))
    stay = ~np.isin(units, [1, 4])
    wanted = np.linalg.lstsq(x[:, stay], x @ weight, rcond=None)[0]
    assert system.weight[stay] == pytest.approx(wanted, rel=1e-5, abs=1e-8)
    assert not system.weight[~stay].any()
    assert system.inverse[np.ix_(stay, stay)] == pytest.approx(np.linalg.inv(x[:, stay].T @ x[:, stay]), rel=1e-4)


@pytest.mark.parametrize("rounds", [256, 8])
def test_of_two_units_that_say_the_same_one_costs_nothing_and_the_other_does(rounds):
    x = normal(3, 400, 32)
    x[:, 8:16] = -2 * x[:, :8]
    found = removal_costs([System.of(normal(4, 32, 6), x.T @ x, np.arange(32), 32, 1e-9)], rounds)
    pairs = np.sort(np.stack([found[:8], found[8:16]]), axis=0)
    assert pairs[0].max() < 1e-6
    assert pairs[1].min() > 1e-3
    assert found[16:].min() > 1e-3


def test_fewer_rounds_find_nearly_the_same_order():
    x, weight = correlated(5, 600, 48), normal(5, 48, 8)
    one, other = (removal_costs(systems([(x, weight, np.arange(48))], 48), rounds) for rounds in (256, 12))
    fast, slow = (share_lost(x, weight, np.argsort(np.argsort(found)) >= 24) for found in (other, one))
    assert fast < 1.15 * slow
    assert slow < 0.7 * share_lost(x, weight, np.argsort(np.argsort(np.square(weight).sum(axis=1))) >= 24)


def test_units_that_are_never_on_go_first_and_the_last_that_is_on_stays():
    x = normal(6, 100, 8)
    x[:, [0, 1, 2, 3, 4, 5, 7]] = 0
    found = removal_costs([System.of(normal(7, 8, 3), x.T @ x, np.arange(8), 8)])
    assert found.argmax() == 6
    assert np.delete(found, 6).max() < 1e-9
    assert found[6] == pytest.approx(1, rel=0.05)


def test_inputs_are_those_of_each_unit_in_their_order():
    assert inputs_of(np.array([1, -1, 0, 1, 0]), 2).tolist() == [[2, 4], [0, 3]]
    assert inputs_of(np.array([2, 0, 0, 2]), 4).tolist() == [[1, 2], [4, 5], [0, 3], [4, 5]]


def likenesses(x):
    size = np.linalg.norm(x, axis=0)
    return np.abs(x.T @ x / np.outer(size, size))


@pytest.mark.parametrize("sign", [2.0, -0.5])
def test_merged_duplicates_leave_the_function_as_it_was(sign):
    x, weight, units = normal(8, 60, 6), normal(9, 6, 4), np.arange(6)
    x[:, 4] = sign * x[:, 1]
    found = merge_costs(x.T @ x, weight, units, 6)
    assert found.argmin() in (1, 4)
    keep = found > found.min()
    assert found.min() < 1e-9 < 0.1 < np.sort(found)[1]
    merged = merge(x.T @ x, weight, units, keep)
    assert not merged[~keep].any()
    assert x @ merged == pytest.approx(x @ weight, rel=1e-9)


def test_of_two_that_are_alike_the_one_with_less_output_goes():
    x = normal(10, 60, 4)
    x[:, 3] = 3 * x[:, 0]
    weight = np.ones((4, 2))
    assert merge_costs(x.T @ x, weight, np.arange(4), 4).argmin() == 0
    weight[0] = 10
    assert merge_costs(x.T @ x, weight, np.arange(4), 4).argmin() == 3


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_costs_of_merging_are_those_of_looking_at_all_pairs_each_time(seed):
    x, weight = correlated(seed, columns=8), normal(seed, 8, 3)
    energy = np.linalg.norm(x, axis=0) * np.linalg.norm(weight, axis=1)
    alive, wanted = list(range(8)), []
    while len(alive) > 1:
        table = likenesses(x[:, alive]) - 2 * np.eye(len(alive))
        pair = [alive[place] for place in np.unravel_index(table.argmax(), table.shape)]
        wanted.append(min(pair, key=lambda unit: energy[unit]))
        alive.remove(wanted[-1])
    assert np.argsort(merge_costs(x.T @ x, weight, np.arange(8), 8)).tolist() == [*wanted, *alive]


def test_units_of_several_inputs_merge_place_by_place():
    x, weight = normal(11, 60, 9), normal(12, 9, 4)
    units = np.tile(np.arange(3), 3)
    x[:, units == 2] = -x[:, units == 0]
    keep = np.array([True, True, False])
    assert merge_costs(x.T @ x, weight, units, 3).argmin() in (0, 2)
    assert x @ merge(x.T @ x, weight, units, keep) == pytest.approx(x @ weight)
    with pytest.raises(ValueError, match="different numbers"):
        merge_costs(x.T @ x, weight, np.where(units == 2, 1, units), 3)


def test_what_is_never_on_goes_before_all_that_merges_and_adds_nothing():
    x, weight = normal(13, 60, 5), normal(14, 5, 4)
    x[:, [1, 3]] = 0
    found = merge_costs(x.T @ x, weight, np.arange(5), 5)
    assert set(np.argsort(found)[:2]) == {1, 3}
    keep = ~np.isin(np.arange(5), [1, 3])
    assert np.array_equal(merge(x.T @ x, weight, np.arange(5), keep)[keep], weight[keep])
