import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qexport.calibration.statistics.histogram import OCTAVES, Histogram
from qexport.errors import DataInvalid

ARRAYS = hnp.arrays(
    np.float32, st.integers(1, 60), elements=st.floats(-1e6, 1e6, width=32, allow_nan=False, allow_subnormal=True)
)


def filled(*arrays):
    histogram = Histogram()
    for array in arrays:
        histogram.add(array)
    return histogram


def same(one, other):
    assert (one.low, one.high, one.zeros, one.top) == (other.low, other.high, other.zeros, other.top)
    assert np.array_equal(one.counts, other.counts)


@given(st.lists(ARRAYS, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_counts_do_not_depend_on_batching_order_or_shards(arrays, random):
    whole = filled(np.concatenate(arrays))
    shuffled = list(arrays)
    random.shuffle(shuffled)
    same(filled(*shuffled), whole)
    cut = random.randrange(len(arrays) + 1)
    left, right = filled(*arrays[:cut]), filled(*arrays[cut:])
    left.merge(right)
    same(left, whole)


@given(ARRAYS)
def test_every_value_is_counted_once_and_the_extremes_are_exact(array):
    histogram = filled(array)
    assert histogram.total == array.size
    assert histogram.low == min(0.0, float(array.min()))
    assert histogram.high == max(0.0, float(array.max()))


@given(ARRAYS)
def test_bucket_centres_are_within_a_thousandth_of_the_values_they_stand_for(array):
    values, counts = filled(array).table()
    assert np.all(np.diff(values) > 0)
    approximate = np.repeat(values, counts)
    floor = np.abs(array).max() * 2.0 ** -(OCTAVES - 1)
    np.testing.assert_allclose(approximate, np.sort(array), rtol=1e-3, atol=max(floor, 1e-37))


def test_a_histogram_of_normal_values_has_the_moments_of_the_values():
    x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    values, counts = filled(x).table()
    assert counts @ values / x.size == pytest.approx(x.mean(), abs=1e-5)
    assert counts @ values**2 / x.size == pytest.approx(np.square(x).mean(), rel=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(DataInvalid, match="NaN or infinite"):
        filled(np.array([1.0, bad], np.float32))


def test_an_empty_array_counts_nothing():
    assert filled(np.zeros(0, np.float32)).total == 0
