"""The sketch of a histogram against the values themselves, and that calibration leaves one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers import Samples, model_from
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qexport.calibration.calibrate import Calibrate
from qexport.calibration.statistics.histogram import Histogram
from qexport.calibration.statistics.methods import METHODS
from qexport.calibration.statistics.sketch import Sketch, sketch, sketch_of
from qexport.passes.numbers.notes import forget_range

ARRAYS = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-100, 100, width=32, allow_nan=False))
WIDTH = 1 / 64  # of a bucket, over its value


def counted(array):
    histogram = Histogram()
    histogram.add(np.asarray(array, np.float32))
    return histogram


def heavy_tailed(count=20_000):
    return np.random.default_rng(3).standard_t(3, count).astype(np.float32)


@given(ARRAYS)
def test_a_sketch_is_the_histogram_within_a_bucket(array):
    whole = counted(array)
    small = sketch(whole)
    values, counts = small.table()
    exact, exact_counts = whole.table()
    assert (small.low, small.high, small.zeros, small.total) == (whole.low, whole.high, whole.zeros, array.size)
    assert np.all(np.diff(values) >= 0)
    mine, theirs = np.repeat(values, counts), np.repeat(exact, exact_counts)
    assert np.all(np.abs(mine - theirs) <= WIDTH / 2 * np.abs(theirs) + 1e-30)


@given(ARRAYS, ARRAYS)
def test_sketches_of_merged_shards_are_those_of_the_whole(one, other):
    merged = counted(one)
    merged.merge(counted(other))
    together, apart = sketch(counted(np.concatenate([one, other]))), sketch(merged)
    assert np.array_equal(together.centres, apart.centres)
    assert np.array_equal(together.counts, apart.counts)


@given(ARRAYS, st.floats(-100, 0), st.floats(0, 100))
def test_the_clipped_share_is_that_of_the_values_up_to_the_buckets_at_both_ends(array, low, high):
    small = sketch(counted(array))
    outside = np.mean((array < low) | (array > high))
    at_the_ends = np.mean((np.abs(array - low) <= -low * WIDTH) | (np.abs(array - high) <= high * WIDTH))
    tiny = small.zeros / array.size  # what counts as zero may lie outside of a range that is narrower still
    assert abs(small.clipped(low, high) - outside) <= at_the_ends + tiny + 1e-12


@given(ARRAYS)
def test_nothing_is_clipped_at_the_extremes(array):
    small = sketch(counted(array))
    assert small.clipped(small.low, small.high) == 0


@given(ARRAYS, st.integers(1, 100))
def test_bins_hold_every_value_but_zeros_once(array, count):
    small = sketch(counted(array))
    edges, counts = small.bins(count)
    assert (len(edges), len(counts)) == (count + 1, count)
    assert counts.min() >= 0
    assert counts.sum() + small.zeros == array.size
    assert (edges[0], edges[-1]) == (small.low, small.high)


def test_bins_are_those_of_numpy_within_the_width_of_a_bucket():
    array = heavy_tailed()
    small = sketch(counted(array))
    edges, counts = small.bins(80)
    expected = np.cumsum(np.histogram(array, edges)[0])
    for edge, found, wanted in zip(edges[1:], np.cumsum(counts), expected, strict=True):
        reach = np.abs(edge) * WIDTH + (edges[-1] - edges[0]) * 1e-6
        assert abs(found - wanted) <= np.sum(np.abs(array - edge) <= reach) + small.zeros + 1


@pytest.mark.parametrize(("method", "kind"), list(itertools.product(METHODS, ["int8", "uint8"])))
def test_every_method_finds_nearly_the_range_that_it_finds_in_the_histogram(method, kind):
    whole = counted(np.random.default_rng(3).standard_t(5, 1_000_000))
    exact, found = METHODS[method](whole, kind), METHODS[method](sketch(whole), kind)
    for one, other in ((exact.low, found.low), (exact.high, found.high)):
        assert other == pytest.approx(one, rel=0.2 if method == "entropy" else 0.05)  # the divergence is flat there


def test_a_sketch_is_small():
    array = np.random.default_rng(0).standard_normal(2_000_000) * np.exp(
        np.random.default_rng(1).normal(size=2_000_000)
    )
    small = sketch(counted(array))
    assert small.centres.nbytes + small.counts.nbytes <= 22_000


MODEL = "g (float[n, 32] x) => (float[n, 32] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"


@pytest.fixture
def model():
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((32, 32)).astype(np.float32) for name in "wv"}
    return model_from(MODEL, opset=21, **weights)


def test_calibration_leaves_a_sketch_where_it_leaves_a_range_and_clones_keep_it(model):
    rng = np.random.default_rng(1)
    data = Samples([{"x": rng.standard_normal(32).astype(np.float32)} for _ in range(20)])
    step = Calibrate(data=data, method="minmax")
    assert step(model).modified
    x = model.graph.inputs[0]
    seen = sketch_of(x)
    assert isinstance(seen, Sketch)
    assert seen.total == 20 * 32
    assert seen.high == max(0.0, *(float(sample["x"].max()) for sample in data))
    assert not step(model).modified
    clone = model.clone()
    assert sketch_of(clone.graph.inputs[0]) is not None
    forget_range(x)
    assert sketch_of(x) is None
