"""Buffers of keys and values: how they grow, what they keep, how far they go back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.errors import DataInvalid, UsageError
from qexport.runtime.cache import Cache, Room, bucket

F32 = np.dtype(np.float32)
SHAPES = {"a.key": (2, 4), "a.value": (2, 3)}


def cache(batch=1, **options):
    return Cache(SHAPES, F32, batch, Room(**options))


def counts(*numbers):
    return list(numbers)


def step(made, width, *valid):
    """A step as a graph does it: every row writes ``width`` columns of its own number, the padding as -1."""
    numbers = counts(*valid or [width] * made.lengths.size)
    start = made.lengths
    made.demand(numbers)
    made.reserve(width)
    for buffer in made.buffers.values():
        for row, (at, count) in enumerate(zip(start, numbers, strict=True)):
            buffer[row, :, at : at + width] = -1
            buffer[row, :, at : at + count] = np.arange(at, at + count)[:, None]
    made.advance(numbers)


def right(made):
    """Whether every row holds the numbers of its columns, as far as they count."""
    return all(
        (buffer[row, :, :length] == np.arange(length)[:, None]).all()
        for buffer in made.buffers.values()
        for row, length in enumerate(made.lengths)
    )


def test_a_reset_leaves_no_number_that_a_mask_would_not_hide():
    made = cache(2, least=16)
    step(made, 9, 9, 4)
    for buffer in made.buffers.values():
        buffer[:, :, :9] = np.nan
    made.rollback([0, 0])
    assert made.reset(2)
    assert all((buffer == 0).all() for buffer in made.buffers.values())
    assert not made.reset(3)


def test_buffers_are_zeros_of_the_asked_shape_and_type():
    made = Cache(SHAPES, np.dtype(np.float16), 3, Room(least=8))
    assert {name: buffer.shape for name, buffer in made.buffers.items()} == {
        "a.key": (3, 2, 8, 4),
        "a.value": (3, 2, 8, 3),
    }
    assert all(buffer.dtype == np.float16 and not buffer.any() for buffer in made.buffers.values())


def test_capacity_starts_small_and_grows_by_an_eighth_only_when_a_column_does_not_fit():
    made = cache()
    assert made.capacity == 64
    sizes = (64, 64), (65, 128), (200, 256), (256, 256), (257, 320), (512, 512), (513, 640), (3000, 3072)
    for length, capacity in sizes:
        step(made, length - int(made.lengths[0]))
        assert made.capacity == capacity
        assert right(made)


@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_buffers_are_new_only_when_they_grow_and_large_ones_are_freed_then(monkeypatch, kept):
    monkeypatch.setattr("qexport.runtime.cache.KEPT", kept)
    made = cache(least=4)
    before = dict(made.buffers)
    assert not made.reserve(4)
    assert all(made.buffers[name] is buffer for name, buffer in before.items())
    made.advance(counts(4))
    assert made.reserve(1) is (kept == 0)
    assert all(made.buffers[name] is not buffer for name, buffer in before.items())
    assert made.small is (kept > 0)


def test_small_buffers_are_used_again_with_nothing_left_in_them():
    made, seen = cache(least=4), []
    for _ in range(3):
        assert made.reset(1)
        assert not any(buffer.any() for buffer in made.buffers.values())
        for _ in range(10):
            step(made, 1)
            seen += [id(buffer) for buffer in made.buffers.values()]
            for buffer in made.buffers.values():
                assert not buffer[:, :, made.lengths[0] :].any()
        assert right(made)
        for buffer in made.buffers.values():
            buffer[:, :, 9:] = np.nan  # as what was proposed may have left
    assert len(set(seen)) == 3 * len(SHAPES)


def test_what_is_kept_has_a_bound(monkeypatch):
    monkeypatch.setattr("qexport.runtime.cache.KEPT", 2 * (4 + 8 + 12) * (4 + 3) * F32.itemsize)
    made, freed = cache(least=4), []
    for _ in range(20):
        before = dict(made.buffers)
        step(made, 1)
        freed.append(made.lengths[0] if made.buffers["a.key"] is not before["a.key"] and not made.small else None)
    assert [length for length in freed if length] == [13, 17]
    assert right(made)
    made.keep([0])
    assert right(made)
    assert made.reset(1) is False


@pytest.mark.parametrize(("most", "capacities"), [(6, [4, 6, 6]), (3, [3, None, None]), (None, [4, 8, 8])])
def test_capacity_never_goes_beyond_what_a_row_may_have(most, capacities):
    made = cache(least=4, most=most)
    for needed, capacity in zip((3, 5, 6), capacities, strict=True):
        more = needed - int(made.lengths[0])
        if capacity is None:
            with pytest.raises(DataInvalid, match=f"row 0 has 3 tokens and {more} more, the model has 3 positions"):
                made.demand(counts(more))
        else:
            step(made, more)
            assert made.capacity == capacity


def test_padding_beside_a_row_that_is_full_gets_room_without_columns_that_count():
    made = cache(2, least=4, most=6)
    step(made, 6, 6, 1)
    assert made.capacity == 6
    step(made, 3, 0, 3)
    assert made.capacity == 9
    assert made.lengths.tolist() == [6, 4]
    assert right(made)
    with pytest.raises(DataInvalid, match="row 0 has 6 tokens and 1 more, the model has 6 positions"):
        made.demand(counts(1, 1))


def test_going_back_touches_no_buffer_and_what_follows_overwrites():
    made = cache(2, least=16)
    step(made, 9)
    before = {name: buffer.copy() for name, buffer in made.buffers.items()}
    made.rollback(counts(4, 9))
    assert made.lengths.tolist() == [4, 9]
    assert all((made.buffers[name] == buffer).all() for name, buffer in before.items())
    step(made, 2)
    assert right(made)


@pytest.mark.parametrize("lengths", [(6, 5), (5, -1)])
def test_a_row_goes_back_no_further_than_it_came(lengths):
    made = cache(2)
    step(made, 5)
    with pytest.raises(DataInvalid, match=r"row [01] cannot go back to (6|-1) tokens, it has 5"):
        made.rollback(counts(*lengths))
    assert made.lengths.tolist() == [5, 5]
    with pytest.raises(DataInvalid, match="3 lengths for 2 rows"):
        made.rollback(counts(1, 1, 1))


def test_what_was_gone_back_over_does_not_come_back():
    made = cache()
    step(made, 5)
    made.rollback(counts(2))
    with pytest.raises(DataInvalid, match="cannot go back to 5 tokens, it has 2"):
        made.rollback(counts(5))


def test_rows_that_are_kept_bring_their_columns_and_the_others_are_gone():
    made = cache(4, least=8)
    step(made, 7, 3, 7, 0, 5)
    marks = {name: buffer + 100 * np.arange(4)[:, None, None, None] for name, buffer in made.buffers.items()}
    for name, buffer in made.buffers.items():
        buffer[...] = marks[name]
    made.keep([3, 1])
    assert (made.batch, made.lengths.tolist(), made.capacity) == (2, [5, 7], 8)
    for name, buffer in made.buffers.items():
        assert buffer.shape[0] == 2
        np.testing.assert_array_equal(buffer[0, :, :5], marks[name][3, :, :5])
        np.testing.assert_array_equal(buffer[1, :, :7], marks[name][1, :, :7])
        assert not buffer[0, :, 5:].any()


def test_a_row_may_be_kept_twice_and_each_goes_its_own_way():
    made = cache(2, least=4)
    step(made, 3)
    made.keep([1, 1, 0])
    made.rollback(counts(1, 3, 2))
    step(made, 2)
    assert made.lengths.tolist() == [3, 5, 4]
    assert right(made)


@pytest.mark.parametrize(("rows", "words"), [([2], "row 2 does not exist"), ([-1], "row -1"), ([], "no row is kept")])
def test_a_row_that_is_not_there_cannot_be_kept(rows, words):
    made = cache(2)
    step(made, 3)
    with pytest.raises(DataInvalid, match=words):
        made.keep(rows)
    assert made.lengths.tolist() == [3, 3]


def test_lengths_cannot_be_changed_from_outside():
    made = cache()
    made.lengths[0] = 7
    assert made.lengths[0] == 0


@pytest.mark.parametrize("least", [0, 3, -4])
def test_the_first_capacity_is_a_power_of_two(least):
    with pytest.raises(UsageError, match="expected a power of two"):
        cache(least=least)


def test_a_batch_has_rows():
    with pytest.raises(DataInvalid, match="the batch is 0"):
        cache(0)


@given(st.integers(1, 10**6), st.integers(0, 12), st.none() | st.integers(1, 10**6))
def test_a_bucket_holds_what_is_needed_and_is_no_larger_than_it_must(needed, power, most):
    found = bucket(needed, 1 << power, most)
    assert found >= needed
    assert found < needed + max(1 << power, needed / 4)
    if most is not None:
        assert found <= max(most, needed)


@pytest.mark.parametrize("least", [1, 16, 32])
def test_copies_of_a_buffer_that_grows_token_by_token_are_a_few_times_its_size(least):
    sizes = sorted({bucket(needed, least, None) for needed in range(1, 20001)})
    assert sum(sizes) < 9 * sizes[-1] + 9 * (8 * least)


STEPS = st.lists(
    st.tuples(st.integers(1, 6), st.tuples(st.integers(0, 6), st.integers(0, 6)), st.none() | st.floats(0, 1)),
    max_size=12,
)


@given(STEPS)
def test_any_steps_and_ways_back_keep_every_column_that_counts(steps):
    made = cache(2, least=2)
    for width, valid, back in steps:
        step(made, width, *(min(count, width) for count in valid))
        if back is not None:
            made.rollback((made.lengths * back).astype(int).tolist())
        assert right(made)
        assert made.capacity >= made.lengths.max()
