"""Batches: every sample once, padding only where a mask hides it, the same whatever the order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.calibration.reading.batching import batches
from qexport.errors import UsageError


def text_sample(ids: list[int]) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.array(ids, np.int64),
        "attention_mask": np.ones(len(ids), np.int64),
        "token_type_ids": np.ones(len(ids), np.int64),
    }


texts = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6).map(text_sample), max_size=20)
plain = st.lists(st.integers(1, 3).map(lambda size: {"x": np.full((size, 2), size, np.float32)}), max_size=20)


@given(texts, st.integers(1, 7), st.sampled_from([1, 300, 1 << 20]))
def test_every_sample_is_in_exactly_one_batch_and_unchanged_but_for_hidden_zeros(samples, size, window):
    seen = []
    for positions, batch in batches(samples, size, window=window):
        assert 1 <= len(positions) <= size
        lengths = [len(samples[position]["input_ids"]) for position in positions]
        assert lengths == sorted(lengths, reverse=True)
        for row, position in enumerate(positions):
            length = lengths[row]
            assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (lengths[0] - length)
            for name, array in samples[position].items():
                assert batch[name].dtype == array.dtype
                np.testing.assert_array_equal(batch[name][row, :length], array)
                assert not batch[name][row, length:].any()
        seen += positions
    assert sorted(seen) == list(range(len(samples)))


@given(plain, st.integers(1, 7))
def test_without_a_mask_only_equal_shapes_meet(samples, size):
    seen = []
    for positions, batch in batches(samples, size):
        np.testing.assert_array_equal(batch["x"], np.stack([samples[position]["x"] for position in positions]))
        seen += positions
    assert sorted(seen) == list(range(len(samples)))


@given(texts, st.integers(1, 7), st.randoms())
def test_the_batches_are_the_same_for_any_order_of_the_samples(samples, size, random):
    shuffled = samples.copy()
    random.shuffle(shuffled)
    one, other = ([batch for _, batch in batches(given, size)] for given in (samples, shuffled))
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


def test_the_last_batch_of_each_shape_may_be_small_and_no_other():
    samples = [text_sample([1] * (1 + n % 5)) for n in range(22)]
    assert [len(positions) for positions, _ in batches(samples, 8)] == [8, 8, 6]


def test_axes_as_long_as_the_mask_are_padded_and_no_others():
    samples = [
        {
            "attention_mask": np.ones((1, size), np.int64),
            "bias": np.ones((size, size, 4), np.float32),
            "flag": np.array(1),
        }
        for size in (2, 3)
    ]
    ((positions, batch),) = batches(samples, 2)
    assert positions == [1, 0]
    assert {name: array.shape for name, array in batch.items()} == {
        "attention_mask": (2, 1, 3),
        "bias": (2, 3, 3, 4),
        "flag": (2,),
    }
    assert batch["flag"].tolist() == [1, 1]
    assert batch["bias"][1].sum() == 2 * 2 * 4


def test_samples_that_differ_on_another_axis_do_not_meet():
    samples = [{"attention_mask": np.ones(4, np.int64), "pixels": np.ones((size, size))} for size in (5, 6)]
    assert [len(positions) for positions, _ in batches(samples, 8)] == [1, 1]


def test_samples_are_held_by_the_window_and_not_all_together():
    produced = 0

    def produce():
        nonlocal produced
        for n in range(100):
            produced += 1
            yield {"x": np.full(256, n, np.float32)}

    stream = batches(produce(), 4, window=8 * 1024)
    next(stream)
    assert produced == 8


def test_a_window_closes_after_a_full_batch():
    samples = [{"x": np.full(256, n, np.float32)} for n in range(24)]
    assert [len(positions) for positions, _ in batches(samples, 4, window=5 * 1024)] == [4] * 6


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_below_one_is_refused(size):
    with pytest.raises(UsageError, match="batch size"):
        list(batches([], size))
