"""What certification rests on: exact distributions, tests that reject as often as they say, power that is there."""

from __future__ import annotations

import itertools
import sys
from functools import cache

import cached_models
import numpy as np
import pytest
from certified_pairs import ONE, prompts_of, subject, tiny_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qexport.errors import EnvironmentMismatch
from qexport.runtime.certifying import gtest, independence, reference
from qexport.runtime.certifying.evidence import bounds, output_bounds
from qexport.runtime.certifying.exact import LESS, MORE, Grain, classes, enumerate_tokens
from qexport.runtime.certifying.gtest import Table
from qexport.runtime.certifying.subject import DRAFT
from qexport.runtime.certifying.trials import Arm, Counted, by_seed, count
from qexport.runtime.decoder import Decoder
from qexport.runtime.sampling.distribution import adjust, distribution, draw
from qexport.runtime.sampling.settings import Sampling

pair = cache(tiny_pair)
PURE = Sampling(temperature=1.0)


def softmax(scores):
    chances = np.exp(scores - scores.max())
    return chances / chances.sum()


@cache
def truth(prefix):
    """The next token of the tiny model with six tokens, by the forward in numpy."""
    return softmax(cached_models.forward(pair(6)[2], prefix)[-1])


def test_a_small_vocabulary_is_enumerated_whole():
    tree = enumerate_tokens(Decoder(pair(6)[0], ONE), [1, 2, 3], PURE, Grain(3, 6))
    assert tree.chances.size == 6**3
    assert tree.chances.sum() == pytest.approx(1)
    for outcome in itertools.product(range(6), repeat=3):
        steps = [truth((1, 2, 3, *outcome[:place]))[token] for place, token in enumerate(outcome)]
        assert tree.chances[tree.cell(outcome)] == pytest.approx(np.prod(steps), rel=1e-5)


def test_tokens_without_a_class_of_their_own_are_pooled_by_whether_the_draft_likes_them_more():
    files = pair(50)
    target, draft = Decoder(files[0], ONE), Decoder(files[1], ONE)
    tree = enumerate_tokens(target, [1, 2, 3], PURE, Grain(2, 3), draft)
    assert tree.chances.size == 2 + 3 * (3 + 2)
    assert tree.chances.sum() == pytest.approx(1)
    scores = [reference.last(one, [[1, 2, 3]])[0].astype(float) for one in (target, draft)]
    mine, other = map(softmax, scores)
    rest = np.argsort(-mine)[3:]
    for token in rest:
        likes = rest[other[rest] > mine[rest]] if other[token] > mine[token] else rest[other[rest] <= mine[rest]]
        assert tree.chances[tree.cell((token, 0))] == pytest.approx(mine[likes].sum(), rel=1e-5)


def test_truncation_leaves_outcomes_without_a_chance():
    tree = enumerate_tokens(Decoder(pair(50)[0], ONE), [1, 2, 3], Sampling(temperature=1.0, top_k=2), Grain(3, 4))
    assert np.count_nonzero(tree.chances) == 2**3
    assert 0 < tree.edge < 1


def test_classes_leave_out_what_has_no_chance():
    assert classes(np.array([0.5, 0.0, 0.5, 0.0]), 3, None).tolist() == [0, LESS, 2, LESS]
    assert classes(np.array([0.5, 0.1, 0.3, 0.1]), 2, np.array([0.1, 0.2, 0.7, 0.0])).tolist() == [0, MORE, 2, LESS]


@settings(max_examples=150, deadline=None)
@given(
    scores=st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=12),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    cut=st.tuples(st.integers(0, 6), st.sampled_from([1.0, 0.9, 0.35]), st.sampled_from([0.0, 0.11, 0.47])),
    penalty=st.sampled_from([1.0, 1.3, 0.8]),
    bias=st.floats(-3, 3),
)
def test_the_runtime_samples_from_what_the_definition_says(scores, temperature, cut, penalty, bias):
    logits, seen = np.array(scores, np.float32), {0, len(scores) // 2}
    asked = Sampling(temperature, *cut, repetition_penalty=penalty, logit_bias={0: bias})
    wanted = reference.wanted(logits, asked, list(seen))
    if wanted.edge > 1e-9:
        np.testing.assert_allclose(distribution(adjust(logits, asked, seen), asked), wanted.chances, atol=1e-12)


def test_greedy_requests_want_the_best_token_alone():
    wanted = reference.wanted(np.array([1.0, 3.0, 3.0, 2.0], np.float32), Sampling(), [])
    assert wanted.chances.tolist() == [0, 1, 0, 0]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any), st.floats(0, 1, exclude_max=True))
def test_bounds_are_those_between_which_a_token_is_drawn(weights, number):
    chances = np.array(weights, float)
    low, high = bounds(draw(chances, number), chances)
    assert low - 1e-12 <= number <= high + 1e-12


def test_places_of_outputs_are_ordered_by_what_the_draft_likes():
    target, draft = np.array([0.4, 0.4, 0.2]), np.array([0.1, 0.6, 0.3])
    assert output_bounds(1, target, draft) == pytest.approx((0.0, 0.6))  # equal ratios are one class
    assert output_bounds(0, target, draft) == pytest.approx((0.6, 1.0))
    assert output_bounds(2, target, None) == pytest.approx((0.0, 0.2))


def test_g_is_that_of_scipy_and_chances_of_zero_are_certain():
    counts, chances = np.array([22, 35, 18, 25]), np.array([0.25, 0.3, 0.2, 0.25])
    theirs = stats.power_divergence(counts, 100 * chances, lambda_="log-likelihood")
    williams = 1 + ((1 / chances).sum() - 1) / (6 * 100 * 3)
    found = gtest.fit([Table(counts, chances)])
    assert found.statistic == pytest.approx(theirs.statistic / williams)
    assert found.p == pytest.approx(stats.chi2.sf(found.statistic, 3))
    both = gtest.fit([Table(counts, chances), Table(counts, chances)])
    assert (both.freedom, both.samples) == (6, 200)
    wrong = gtest.fit([Table(np.array([50, 49, 1]), np.array([0.5, 0.5, 0.0]))])
    assert (wrong.p, wrong.impossible) == (0.0, 1)


def test_cells_that_expect_little_are_one_and_never_alone_with_too_little():
    cells = gtest.pools(np.array([0.5, 0.001, 0.3, 0.002, 0.0, 0.197]), 100)
    assert cells[4] == -1
    assert cells[1] == cells[3] == cells[5] == 0
    assert sorted(cells[[0, 2]]) == [1, 2]
    assert gtest.pools(np.array([0.6, 0.4]), 100).tolist() == [1, 0]


def test_tests_of_sound_counts_reject_as_often_as_they_say():
    rng, chances = np.random.default_rng(3), np.random.default_rng(1).dirichlet(np.full(40, 0.4))
    values = np.array([gtest.fit([Table(rng.multinomial(400, chances), chances)]).p for _ in range(800)])
    assert gtest.uniformity(values) > 1e-3
    assert 0.02 < (values < 0.05).mean() < 0.08


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_a_deviation_of_the_size_that_is_told_is_found_in_99_of_100_cases(share):
    rng, chances, level, samples = np.random.default_rng(5), np.full(20, 0.05), 1e-4, 3000
    size = gtest.power(19, samples, level)
    moved = chances.copy()
    up = round(20 * share)
    moved[:up] += size / up
    moved[up:] -= size / (20 - up)
    found = [gtest.fit([Table(rng.multinomial(samples, moved), chances)]).p < level for _ in range(500)]
    assert np.mean(found) >= 0.98
    assert gtest.power(19, 4 * samples, level) == pytest.approx(size / 2)
    weaker = chances + (moved - chances) / 3
    assert np.mean([gtest.fit([Table(rng.multinomial(samples, weaker), chances)]).p < level for _ in range(50)]) < 0.5


def test_nothing_is_found_where_nothing_was_counted():
    assert gtest.power(0, 100, 0.01) == gtest.power(5, 0, 0.01) == 1
    assert gtest.fit([]).p == 1


def test_holm_rejects_step_by_step():
    assert gtest.holm([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert gtest.holm([0.02, 0.9], 0.05) == [True, False]
    assert gtest.holm([], 0.05) == []


def test_tables_of_ranks_find_dependence_and_nothing_else():
    rng = np.random.default_rng(2)
    sound = [independence.independent(*rng.random((2, 300))).p for _ in range(300)]
    assert gtest.uniformity(np.array(sound)) > 1e-3
    one = rng.random(2000)
    assert independence.independent(one, (one + 0.5 * rng.random(2000)) % 1).p < 1e-6
    assert independence.independent(one, np.abs(one - 0.5)).p < 1e-6  # no correlation
    assert independence.independent(one, np.ones(2000)).freedom == 0


def test_p_values_of_seeds_are_uniform_for_chances_that_are_right_and_not_for_others():
    rng, chances = np.random.default_rng(8), np.random.default_rng(1).dirichlet(np.full(30, 0.5))

    class Made:
        def __init__(self):
            self.chances = chances

    def values(drawn):
        counts = rng.multinomial(20, drawn, 60)
        return by_seed([Counted(Arm("made", PURE, 1, DRAFT), [Made()], [counts])], rng)

    assert gtest.uniformity(values(chances)) > 1e-3
    assert gtest.uniformity(values(np.sqrt(chances) / np.sqrt(chances).sum())) < 1e-6


def test_p_values_of_fifty_seeds_of_the_real_loop_are_uniform():
    loop, sampling = subject(pair(6)), Sampling(temperature=1.0)
    trees = [enumerate_tokens(loop.truth, prompt, sampling, Grain(3, 6)) for prompt in prompts_of(6, 2)]
    counted = count(loop, Arm("draft", sampling, 2, DRAFT), trees, range(50), 2000)
    assert gtest.uniformity(by_seed([counted], np.random.default_rng(0))) > 1e-3
    assert counted.fit().p > 1e-4


def test_without_scipy_there_is_word_of_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(EnvironmentMismatch, match=r"pip install 'qexport\[certify\]'"):
        gtest.load_scipy()
