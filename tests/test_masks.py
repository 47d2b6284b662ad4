"""Which numbers of a weight stay: counted, and compared with sorting by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.passes.numbers.masks import Pattern, keep_mask, keep_masks, largest, magnitude, saliency, wanda

RATIOS = st.floats(0.02, 0.9)


def scores_of(seed, k=16, n=6, *, ties=False):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 3, (k, n)).astype(np.float32) if ties else rng.random((k, n), np.float32)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), RATIOS, st.booleans())
def test_a_ratio_is_kept_to_the_number_whatever_the_ties(seed, ratio, ties):
    scores, pattern = scores_of(seed, ties=ties), Pattern(ratio)
    assert (~keep_mask(scores, pattern)).sum() == round(ratio * scores.size)
    assert ((~keep_mask(scores, pattern, "output")).sum(axis=0) == round(ratio * 16)).all()
    together = keep_masks([scores, scores_of(seed + 1, 4, 5, ties=ties)], pattern)
    assert sum((~mask).sum() for mask in together) == round(ratio * (scores.size + 20))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["2:4", "1:4", "3:4", "4:8", "1:2"]), st.booleans())
def test_of_every_m_consecutive_inputs_of_an_output_the_n_best_stay(seed, name, ties):
    scores = scores_of(seed, ties=ties)
    kept, group = map(int, name.split(":"))
    mask = keep_mask(scores, Pattern.parse(name))
    for column in range(scores.shape[1]):
        for start in range(0, len(scores), group):
            part = scores[start : start + group, column]
            best = sorted(range(group), key=lambda i, part=part: (-part[i], i))[:kept]
            assert sorted(np.flatnonzero(mask[start : start + group, column])) == sorted(best)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.booleans())
def test_the_largest_are_those_of_a_stable_sort(seed, count, ties):
    scores = scores_of(seed, 20, 3, ties=ties)
    wanted = np.zeros(scores.shape, bool)
    np.put_along_axis(wanted, np.argsort(-scores, axis=0, kind="stable")[:count], True, axis=0)
    assert np.array_equal(largest(scores, count), wanted)


def test_layers_that_compete_lose_where_their_scores_are_small():
    small, large = scores_of(0), 100 + scores_of(1)
    first, second = keep_masks([small, large], Pattern(0.5))
    assert not first.any()
    assert second.all()


def test_outputs_that_compete_alone_keep_as_many_numbers_each():
    scores = scores_of(0) * np.logspace(0, 3, 6)
    alone, layer = (keep_mask(scores, Pattern(0.5), per).sum(axis=0) for per in ("output", "layer"))
    assert list(alone) == [8] * 6
    assert layer[0] < 2
    assert layer[-1] > 12


def test_scores_are_what_the_papers_say():
    rng = np.random.default_rng(0)
    weight, gradient, x = rng.standard_normal((8, 3)), rng.standard_normal((8, 3)), rng.standard_normal((50, 8))
    assert np.array_equal(magnitude(weight), abs(weight))
    np.testing.assert_allclose(wanda(weight, x.T @ x), abs(weight) * np.linalg.norm(x, axis=0)[:, None])
    np.testing.assert_allclose(saliency(weight, gradient), abs(weight * gradient))


def test_a_weight_that_has_the_pattern_is_told_from_one_that_has_not():
    mask = keep_mask(scores_of(0), Pattern.parse("2:4"))
    assert Pattern.parse("2:4").fits(~mask)
    assert Pattern(0.5).fits(~mask)
    assert Pattern(0.5).fits(~mask, "output")
    assert not Pattern.parse("1:4").fits(~mask)
    worse = mask.copy()
    worse[np.argwhere(~mask)[0][0], np.argwhere(~mask)[0][1]] = True
    for pattern, per in ((Pattern.parse("2:4"), "layer"), (Pattern(0.5), "layer"), (Pattern(0.5), "output")):
        assert not pattern.fits(~worse, per)
    shifted = np.roll(np.tile([True, True, False, False], 4)[:, None], 2, axis=0)
    assert Pattern.parse("2:4").fits(shifted)
    assert not Pattern.parse("2:4").fits(np.repeat([True, False], 8)[:, None])
    assert not Pattern.parse("2:4").fits(np.ones((6, 2), bool))


def test_patterns_are_read_and_named():
    assert Pattern.parse("2:4") == Pattern(0.5, 4)
    assert (Pattern.parse("1:4").kept, Pattern.parse("1:4").ratio) == (1, 0.75)
    assert [Pattern.parse(text).name for text in ("2:4", "3:8", 0.4)] == ["2:4", "3:8", "40 %"]


@pytest.mark.parametrize("wrong", ["4:4", "4:2", "0:4", "2:", "2x4", "", "0.5", 0, 1, 1.5, -0.2, float("nan")])
def test_what_is_no_pattern_is_refused(wrong):
    with pytest.raises(ValueError, match=r"expected a share of zeros or n:m|above 0 and below 1"):
        Pattern.parse(wrong)


def test_a_pattern_that_leaves_nothing_or_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="leave none of 16"):
        keep_mask(scores_of(0), Pattern(0.98), "output")
    with pytest.raises(ValueError, match="do not divide 6 inputs"):
        keep_mask(scores_of(0, 6), Pattern.parse("2:4"))
    with pytest.raises(ValueError, match="do not compete"):
        keep_masks([scores_of(0)], Pattern.parse("2:4"))
    with pytest.raises(ValueError, match="have a share"):
        Pattern(0.1, 4)
