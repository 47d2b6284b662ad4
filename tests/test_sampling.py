"""Settings, distributions and random numbers against plain numpy, transformers' definitions and statistics."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qexport.errors import DataInvalid, UsageError
from qexport.runtime.sampling.distribution import adjust, distribution, draw, softmax
from qexport.runtime.sampling.noise import Purpose, uniform
from qexport.runtime.sampling.sampler import Sampler
from qexport.runtime.sampling.settings import Sampling
from qexport.runtime.speculation.proposal import Row

SCORES = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=40).map(lambda x: np.array(x, np.float32))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"temperature": -0.5}, "temperature is -0.5, expected 0 for greedy"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0, expected above 0"),
        ({"temperature": 1.0, "top_p": float("nan")}, "top_p is nan"),
        ({"temperature": 1.0, "min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**70}, "seed is 1180591620717411303424"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias is 1.0 for token -1"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias is nan for token 3"),
        ({"top_k": 5}, "temperature is 0, which is greedy"),
        ({"top_p": 0.5}, "temperature is 0, which is greedy"),
        ({"min_p": 0.5}, "temperature is 0, which is greedy"),
    ],
)
def test_a_setting_out_of_its_range_is_named_with_what_was_expected(asked, told):
    with pytest.raises(UsageError, match=told):
        Sampling(**asked)


@given(SCORES, st.floats(0.2, 3), st.integers(0, 12), st.floats(0.05, 1), st.floats(0, 0.6))
def test_a_distribution_is_what_sorting_and_cutting_by_hand_gives(scores, temperature, top_k, top_p, min_p):
    found = distribution(scores, Sampling(temperature, top_k, top_p, min_p))
    assert found.sum() == pytest.approx(1)
    pairs = [(float(s) / temperature, token) for token, s in enumerate(scores)]
    if top_k:
        least = sorted((s for s, _ in pairs), reverse=True)[min(top_k, len(pairs)) - 1]
        pairs = [pair for pair in pairs if pair[0] >= least]
    weights = _normalized({token: np.exp(s - max(pairs)[0]) for s, token in pairs})
    kept, total = {}, 0.0
    for token, weight in sorted(weights.items(), key=lambda pair: (-pair[1], pair[0])):
        if top_p < 1 and total >= top_p - 1e-12:
            break
        kept[token], total = weight, total + weight
    kept = _normalized(kept)
    kept = _normalized({token: w for token, w in kept.items() if w >= min_p * max(kept.values()) * (1 - 1e-12)})
    # a cut that falls on a sum to the last bit may go either way
    if set(np.flatnonzero(found)) == set(kept):
        np.testing.assert_allclose([found[token] for token in kept], list(kept.values()), rtol=1e-9)
    else:
        assert abs(len(kept) - np.count_nonzero(found)) <= 1


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1), st.floats(0, 6), st.booleans())
def test_the_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(seed, share, spread, ties):
    scores = np.random.default_rng(seed).normal(0, spread, 3000)
    scores = np.round(scores) if ties else scores
    found = distribution(scores, Sampling(1.0, top_p=share))
    chances = softmax(scores)
    order = sorted(range(3000), key=lambda token: (-chances[token], token))
    before = np.cumsum(chances[order]) - chances[order]
    sure = np.abs(before - share) > 1e-9  # the last bit of a sum may fall to either side
    assert all((found[token] > 0) == (sum_ < share) for token, sum_, s in zip(order, before, sure, strict=True) if s)


def test_the_token_that_reaches_the_share_is_the_last():
    assert np.flatnonzero(distribution(np.zeros(4), Sampling(1.0, top_p=0.5))).tolist() == [0, 1]


def _normalized(weights):
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


@pytest.mark.torch
def test_settings_mean_what_they_mean_in_transformers():
    torch = pytest.importorskip("torch")
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(0)
    for trial in range(40):
        scores = rng.normal(0, 3, 50).astype(np.float32)
        history = rng.integers(0, 50, 12)
        asked = Sampling(
            temperature=float(rng.uniform(0.3, 2)),
            top_k=int(rng.integers(1, 30)) if trial % 2 else 0,
            top_p=float(rng.uniform(0.3, 0.99)) if trial % 3 else 1.0,
            min_p=float(rng.uniform(0.01, 0.3)) if trial % 5 else 0.0,
            repetition_penalty=float(rng.uniform(0.8, 1.5)),
        )
        theirs, ids = torch.tensor(scores)[None], torch.tensor(history)[None]
        steps = [logits_process.RepetitionPenaltyLogitsProcessor(asked.repetition_penalty)]
        steps.append(logits_process.TemperatureLogitsWarper(asked.temperature))
        steps += [logits_process.TopKLogitsWarper(asked.top_k)] if asked.top_k else []
        steps += [logits_process.TopPLogitsWarper(asked.top_p)] if asked.top_p < 1 else []
        steps += [logits_process.MinPLogitsWarper(asked.min_p)] if asked.min_p else []
        for step in steps:
            theirs = step(ids, theirs)
        ours = distribution(adjust(scores, asked, set(history.tolist())), asked)
        np.testing.assert_allclose(ours, theirs[0].softmax(-1).numpy(), atol=2e-6)


def test_bias_and_penalty_leave_the_logits_they_were_given_alone():
    scores = np.array([1.0, -1.0, 2.0], np.float32)
    found = adjust(scores, Sampling(repetition_penalty=2.0, logit_bias={2: 0.5}), {0, 1, 2})
    np.testing.assert_allclose(found, [0.5, -2.0, 1.25])
    np.testing.assert_array_equal(scores, [1, -1, 2])
    assert adjust(scores, Sampling(), {0}) is scores


def test_drawing_reaches_every_token_with_a_chance_and_no_other():
    chances = np.array([0.0, 0.25, 0.0, 0.75, 0.0])
    assert [draw(chances, u) for u in (0.0, 0.2499, 0.25, 0.999999)] == [1, 1, 3, 3]
    assert draw(chances, np.nextafter(1, 0)) == 3
    assert draw(np.array([0.1] * 3 + [0.0]), np.nextafter(1, 0)) == 2


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31), st.integers(0, 10**6))
def test_a_number_is_one_word_of_philox_at_its_position(seed, stream, position):
    raw = np.random.Philox(key=[seed, stream], counter=position).random_raw(4)
    for purpose in Purpose:
        assert uniform(seed, stream, position, purpose) == float(raw[purpose] >> np.uint64(11)) * 2.0**-53


def test_numbers_are_uniform_and_those_of_different_places_have_nothing_to_do_with_each_other():
    table = np.array(
        [[[uniform(seed, stream, t, p) for p in Purpose] for t in range(200)] for seed in (0, 1) for stream in (0, 1)]
    )
    assert stats.kstest(table.ravel(), "uniform").pvalue > 1e-3
    columns = table.transpose(0, 2, 1).reshape(16, 200)
    correlation = np.corrcoef(columns)[np.triu_indices(16, 1)]
    assert np.abs(correlation).max() < 4.5 / np.sqrt(200)
    shifted = np.corrcoef(columns[:, 1:], columns[:, :-1])[:16, 16:]
    assert np.abs(shifted).max() < 4.5 / np.sqrt(200)


def test_logits_without_a_largest_number_are_refused_where_they_are():
    row = Row([1, 2, 3], 3)
    for bad in ([np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]):
        for asked in (Sampling(), Sampling(temperature=1.0)):
            with pytest.raises(DataInvalid, match="largest logit at position 4 is"):
                Sampler(asked).token(np.array(bad, np.float32), row, (5,))
    assert Sampler(Sampling()).token(np.array([-np.inf, 1.0], np.float32), row) == 1


def test_greedy_takes_the_lowest_of_equals_and_minds_what_was_said():
    row = Row([2], 1)
    logits = np.array([1.0, 3.0, 3.5, 3.0], np.float32)
    assert Sampler(Sampling()).token(logits, row) == 2
    penalized = Sampler(Sampling(repetition_penalty=2.0))
    assert [penalized.token(logits, row, ahead) for ahead in ((), (1,), (1, 3))] == [1, 3, 2]
