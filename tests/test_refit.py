"""SparseGPT against the optimal brain surgeon from its definition, and least squares against a solver on the data."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.passes.numbers.gptq import inverse_factor
from qexport.passes.numbers.masks import Pattern, keep_mask, magnitude, wanda
from qexport.passes.numbers.refit import RIDGES, best_ridge, refit, refit_rows, refit_rows_and_bias
from qexport.passes.numbers.sparse_gpt import sparse_gpt

PATTERNS = [Pattern.parse("2:4"), Pattern.parse("1:4"), Pattern.parse("4:8"), Pattern(0.5), Pattern(0.3)]


def correlated(seed, rows=200, columns=24):
    """Rows whose columns depend on each other and differ in size, as those of real activations do."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns // 3)) @ rng.standard_normal((columns // 3, columns))
    return (x + 0.3 * rng.standard_normal((rows, columns))) * rng.lognormal(0, 1, columns)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def error(gap, hessian):
    return float(np.sum(gap * (hessian @ gap)))


def damped(hessian, share=0.01):
    return hessian + share * np.diag(hessian).mean() * np.eye(len(hessian))


def surgeon(weight, hessian, pattern, block):
    """SparseGPT from its definition: after every input, those behind it are solved for anew from the float weight.

    With the gap D_q of settled inputs fixed, the least tr(D^T H D) is at D_r = -H_rr^-1 H_rq D_q; what input k costs is
    w_k^2 / ((H_rr)^-1)_kk with r the inputs from k on.
    """
    k, n = weight.shape
    now, found, mask = weight.copy(), np.zeros((k, n)), np.zeros((k, n), bool)
    cost = np.array([1 / np.linalg.inv(hessian[i:, i:])[0, 0] for i in range(k)])[:, None]
    span = pattern.group or block
    for row in range(k):
        if row % span == 0:
            part = slice(row, min(row + span, k))
            mask[part] = keep_mask(now[part] ** 2 * cost[part], pattern)
        found[row] = now[row] * mask[row]
        done, rest = slice(0, row + 1), slice(row + 1, k)
        gap = weight[done] - found[done]
        now[rest] = weight[rest] + np.linalg.solve(hessian[rest, rest], hessian[rest, done] @ gap)
    return mask, found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(PATTERNS[:4]), st.sampled_from([8, 24]))
def test_masks_and_updates_are_those_of_solving_for_all_other_inputs_anew(seed, pattern, block):
    x, weight = correlated(seed), normal(seed, 24, 5)
    wanted_mask, wanted = surgeon(weight, damped(x.T @ x), pattern, block)
    mask, found = sparse_gpt(weight, x.T @ x, pattern, block=block)
    if np.array_equal(mask, wanted_mask):  # a tie may fall either way
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert (mask != wanted_mask).mean() < 0.02


@pytest.mark.parametrize("pattern", PATTERNS[:3])
@pytest.mark.parametrize("block", [1, 7, 16])
def test_the_block_of_updates_has_no_effect_on_groups(pattern, block):
    x, weight = correlated(0), normal(0, 24, 5)
    one, other = (sparse_gpt(weight, x.T @ x, pattern, block=size) for size in (block, 128))
    assert np.array_equal(one[0], other[0])
    np.testing.assert_allclose(one[1], other[1], atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.9), st.sampled_from(["layer", "output"]), st.sampled_from([5, 8, 128]))
def test_a_share_is_kept_to_the_number_over_all_blocks(seed, ratio, per, block):
    weight, x = normal(seed, 24, 5), correlated(seed)
    mask, found = sparse_gpt(weight, x.T @ x, Pattern(ratio), per=per, block=block)
    zeros = round(24 * ratio) if per == "output" else round(24 * 5 * ratio)
    counts = (~mask).sum(axis=0) if per == "output" else (~mask).sum()
    assert np.all(counts == zeros)
    assert np.array_equal(found != 0, mask)


def test_what_the_first_input_costs_is_what_is_lost_without_it_when_all_others_make_up_for_it():
    x, weight = correlated(3, columns=9)[:, :4], normal(3, 4, 20)
    mask, found = sparse_gpt(weight, x.T @ x, Pattern(0.25, 4), damping=0.0)
    factor = inverse_factor(x.T @ x, 0.0)
    for column in range(20):
        wanted = x @ weight[:, column]
        costs = np.square(weight[:, column] / np.diag(factor))
        left = np.linalg.lstsq(x[:, 1:], wanted, rcond=None)[0]
        assert costs[0] == pytest.approx(np.square(wanted - x[:, 1:] @ left).sum(), rel=1e-6)
        assert list(np.flatnonzero(~mask[:, column])) == [int(np.argmin(costs))]
        assert (found[0, column] == 0) == (np.argmin(costs) == 0)


def test_inputs_that_nothing_went_through_go_first_and_move_no_other():
    x, weight = correlated(1), normal(1, 24, 6)
    dead = np.isin(np.arange(24), [1, 2, 9, 23])
    x[:, dead] = 0
    mask, found = sparse_gpt(weight, x.T @ x, Pattern(0.25), damping=0.0)
    assert not mask[dead].any()
    alone_mask, alone = sparse_gpt(weight[~dead], x[:, ~dead].T @ x[:, ~dead], Pattern(0.1), damping=0.0)
    assert alone_mask.sum() == mask[~dead].sum()
    np.testing.assert_allclose(found[~dead], alone, atol=1e-9)
    kept, still = sparse_gpt(weight, np.zeros((24, 24)), Pattern.parse("2:4"))
    assert np.array_equal(still, weight * kept)


def test_groups_that_do_not_divide_or_a_share_that_leaves_nothing_are_refused():
    with pytest.raises(ValueError, match="do not divide 6 inputs"):
        sparse_gpt(normal(0, 6, 2), np.eye(6), Pattern.parse("2:4"))
    with pytest.raises(ValueError, match="leave none of 8"):
        sparse_gpt(normal(0, 8, 2), np.eye(8), Pattern(0.97), per="output")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 0.9))
def test_what_stays_is_what_a_solver_finds_on_the_rows_themselves(seed, ratio):
    x, weight = correlated(seed), normal(seed, 24, 5)
    mask = keep_mask(normal(seed + 1, 24, 5), Pattern(ratio))
    found = refit(weight, x.T @ x, mask, ridge=0.0)
    for column in range(5):
        stay = mask[:, column]
        wanted = np.linalg.lstsq(x[:, stay], x @ weight[:, column], rcond=None)[0]
        np.testing.assert_allclose(found[stay, column], wanted, rtol=1e-5, atol=1e-6)
        assert not found[~stay, column].any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 0.9), st.sampled_from([0.0, 1e-4, 0.1, 10.0]), st.integers(3, 60))
def test_repair_never_makes_the_output_worse_even_where_rows_are_few(seed, ratio, ridge, rows):
    x, weight = correlated(seed, rows), normal(seed, 24, 5)
    mask, hessian = keep_mask(normal(seed + 1, 24, 5), Pattern(ratio)), x.T @ x
    before, after = (error(weight - w, hessian) for w in (weight * mask, refit(weight, hessian, mask, ridge)))
    assert after <= before * (1 + 1e-9)


def test_a_mask_of_ones_changes_nothing_and_one_of_zeros_leaves_nothing():
    x, weight = correlated(0), normal(0, 24, 5)
    assert np.array_equal(refit(weight, x.T @ x, np.ones((24, 5), bool), ridge=0.1), weight)
    assert not refit(weight, x.T @ x, np.zeros((24, 5), bool)).any()


def test_outputs_with_one_mask_are_solved_as_they_would_be_alone():
    x, weight = correlated(0), normal(0, 24, 6)
    mask = keep_mask(normal(1, 24, 2), Pattern(0.5), "output")[:, [0, 1, 0, 0, 1, 0]]
    found = refit(weight, x.T @ x, mask)
    for column in range(6):
        alone = refit(weight[:, [column]], x.T @ x, mask[:, [column]])
        np.testing.assert_allclose(found[:, [column]], alone, atol=1e-9)


def test_inputs_that_nothing_went_through_stay_as_they_are():
    x, weight = correlated(1), normal(1, 24, 6)
    x[:, 5] = 0
    mask = keep_mask(normal(2, 24, 6), Pattern(0.5))
    found = refit(weight, x.T @ x, mask)
    np.testing.assert_allclose(found[5], weight[5] * mask[5], atol=1e-12)
    assert np.array_equal(refit(weight, np.zeros((24, 24)), mask), weight * mask)


def test_a_ridge_holds_back_from_what_the_samples_do_not_say():
    x, weight = correlated(0, rows=6), normal(0, 24, 5)
    mask = keep_mask(normal(1, 24, 5), Pattern(0.5))
    moved = [np.abs(refit(weight, x.T @ x, mask, ridge) - weight * mask).max() for ridge in (1e-6, 1e-2, 1e4)]
    assert moved[0] > moved[1] > moved[2]
    assert moved[2] < 1e-3


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 23))
def test_rows_that_stay_make_up_for_those_that_go(seed, count):
    x, weight = correlated(seed), normal(seed, 24, 5)
    keep = np.arange(24) < count
    found = refit_rows(weight, x.T @ x, keep, ridge=0.0)
    np.testing.assert_allclose(found, np.linalg.lstsq(x[:, keep], x @ weight, rcond=None)[0], rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 23))
def test_a_bias_takes_up_the_means(seed, count):
    x, weight = correlated(seed) + normal(seed, 24) * 5, normal(seed, 24, 5)
    keep = np.arange(24) < count
    found, shift = refit_rows_and_bias(weight, x.T @ x, x.sum(axis=0), len(x), keep, ridge=0.0)
    with_one = np.column_stack([x[:, keep], np.ones(len(x))])
    wanted = np.linalg.lstsq(with_one, x @ weight, rcond=None)[0]
    np.testing.assert_allclose(found, wanted[:-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(shift, wanted[-1], rtol=1e-4, atol=1e-4)


def test_every_criterion_loses_less_than_the_one_before_and_repair_wins_with_each():
    ratios = {name: [] for name in ("magnitude", "wanda", "surgeon", "repaired")}
    for seed, pattern in itertools.product(range(8), (Pattern.parse("2:4"), Pattern(0.5))):
        x, weight = correlated(seed, 400, 48), normal(seed, 48, 16)
        hessian = x.T @ x
        masks = [keep_mask(magnitude(weight), pattern, "output"), keep_mask(wanda(weight, hessian), pattern, "output")]
        mask, updated = sparse_gpt(weight, hessian, pattern)
        found = [*(weight * m for m in masks), updated, refit(weight, hessian, mask, 1e-3)]
        for name, sparse in zip(ratios, found, strict=True):
            ratios[name].append(error(weight - sparse, hessian) / error(weight, hessian))
        for m in masks:
            assert error(weight - refit(weight, hessian, m, 1e-3), hessian) < 0.5 * error(weight * ~m, hessian)
    means = [float(np.mean(ratios[name])) for name in ratios]
    assert means == sorted(means, reverse=True)
    assert means[3] < 0.25 * means[0]
    assert all(after < before for before, after in zip(ratios["surgeon"], ratios["repaired"], strict=True))


@pytest.mark.parametrize("noise", [0.02, 2.0])
def test_the_ridge_that_two_halves_choose_is_near_the_best_on_rows_that_were_not_seen(noise):
    """Little noise wants next to no ridge, much noise on few rows wants much of it."""
    asked = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((600, 16)) @ rng.standard_normal((16, 48)) + noise * rng.standard_normal((600, 48))
        weight = normal(seed, 48, 16)
        halves = (x[0:100:2].T @ x[0:100:2], x[1:100:2].T @ x[1:100:2])
        seen, unseen = halves[0] + halves[1], x[100:].T @ x[100:]
        mask = keep_mask(wanda(weight, seen), Pattern.parse("2:4"))
        errors = {r: error(weight - refit(weight, seen, mask, r), unseen) for r in (1e-6, *RIDGES, 10.0)}
        ridge = best_ridge(weight, halves, mask)
        asked.append(ridge)
        assert error(weight - refit(weight, seen, mask, ridge), unseen) < 1.1 * min(errors.values())
        assert error(weight - refit(weight, seen, mask, ridge), unseen) < 0.9 * max(errors.values())
    assert (np.mean(asked) < 0.01) == (noise < 1)
