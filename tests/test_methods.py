import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.calibration.statistics.histogram import Histogram
from qexport.calibration.statistics.methods import METHODS, entropy, minmax, mse, percentile, squared_error
from qexport.passes.numbers.range import Range, integers_for


def histogram_of(x):
    histogram = Histogram()
    histogram.add(np.asarray(x, np.float32))
    return histogram


def outliers(seed=0, size=200_000):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size)
    x[:20] *= 20
    return x.astype(np.float32)


def test_minmax_is_the_extremes_with_zero_inside():
    assert minmax(histogram_of([1.0, 3.0]), "uint8") == Range(0.0, 3.0)
    assert minmax(histogram_of([-2.0, 3.0]), "int8") == Range(-2.0, 3.0)


def test_percentile_agrees_with_numpy_on_the_raw_values():
    x = outliers()
    span = percentile(histogram_of(x), "int8")
    assert span.high == pytest.approx(np.quantile(np.abs(x), 0.99999, method="inverted_cdf"), rel=2e-3)
    assert span.high < x.max()


def test_percentile_of_one_sided_values_clips_that_side_only():
    span = percentile(histogram_of(np.abs(outliers())), "uint8")
    assert span.low == 0.0
    assert 0 < span.high < np.abs(outliers()).max()


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_mse_finds_the_clip_that_brute_force_on_the_raw_values_finds(kind):
    x = outliers()
    shares = np.linspace(0.2, 1.0, 81)
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    errors = [np.square(integers_for(Range(low * c, high * c), kind).apply(x) - x).sum() for c in shares]
    span = mse(histogram_of(x), kind)
    best = float(np.min(errors))
    found = np.square(integers_for(span, kind).apply(x) - x).sum()
    assert found <= best * 1.02
    assert span.high < high


def test_mse_keeps_the_extremes_where_clipping_does_not_pay():
    x = np.repeat(np.linspace(-1, 1, 255), 10)
    assert mse(histogram_of(x), "int8") == Range(-1.0, 1.0)


def test_the_error_of_a_histogram_is_the_error_of_its_values():
    x = outliers(size=50_000)
    span = Range(-3.0, 3.0)
    raw = np.square(integers_for(span, "int8").apply(x) - x).sum()
    assert squared_error(*histogram_of(x).table(), span, "int8") == pytest.approx(raw, rel=1e-2)


def test_entropy_clips_outliers_and_keeps_the_body():
    x = outliers()
    span = entropy(histogram_of(x), "int8")
    assert np.quantile(np.abs(x), 0.95) < span.high < 0.7 * np.abs(x).max()


def test_entropy_keeps_the_whole_range_of_evenly_spread_values():
    x = np.random.default_rng(0).uniform(-1, 1, 200_000)
    assert entropy(histogram_of(x), "int8").high == pytest.approx(1.0, rel=0.02)


@given(st.sampled_from(sorted(METHODS)), st.sampled_from(["int8", "uint8"]), st.integers(0, 1000))
def test_every_method_stays_inside_the_extremes_and_gives_a_usable_scale(name, kind, seed):
    x = np.random.default_rng(seed).standard_normal(50) * 10.0 ** (seed % 7 - 3)
    known = histogram_of(x)
    span = METHODS[name](known, kind)
    assert known.low <= span.low <= 0 <= span.high <= known.high
    numbers = integers_for(span, kind)
    assert np.isfinite(numbers.scale)
    assert numbers.scale >= np.finfo(np.float16 if kind == "int8" else np.float32).tiny


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_a_constant_zero_tensor_gets_a_range_and_a_positive_scale(name, kind):
    assert integers_for(METHODS[name](histogram_of(np.zeros(5)), kind), kind).scale > 0
