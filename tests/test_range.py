import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qexport.passes.numbers.range import Range, half_precision, integers_for
from qexport.passes.numbers.weights import quantize_weight

BOUNDS = st.tuples(st.floats(-1e4, 0, width=32), st.floats(0, 1e4, width=32))


@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (-2.0, -1.0), (0.0, np.inf), (np.nan, 1.0)])
def test_a_range_must_be_finite_and_contain_zero(low, high):
    with pytest.raises(ValueError, match="contain zero"):
        Range(low, high)


def test_the_textbook_vector_of_absmax_comes_out():
    x = np.array([1.2, -0.5, -4.3, 1.2, -3.1, 0.8, 2.4, 5.4])  # Dettmers et al. 2022, figure 2: absmax 5.4
    numbers = integers_for(Range(-4.3, 5.4), "int8")
    assert np.rint(x / numbers.scale).astype(int).tolist() == [28, -12, -101, 28, -73, 19, 56, 127]


@given(BOUNDS, st.sampled_from(["int8", "uint8"]))
def test_zero_is_exact_and_values_inside_the_range_come_back_within_half_a_step(bounds, kind):
    span = Range(*map(float, bounds))
    numbers = integers_for(span, kind)
    x = np.linspace(span.low, span.high, 41)
    assert numbers.apply(np.zeros(1))[0] == 0
    assert np.all(np.abs(numbers.apply(x) - x) <= numbers.scale * 0.501 + (numbers.scale if kind == "uint8" else 0))


@given(st.floats(0, 1000))
def test_scales_are_normal_float16_numbers_never_below_what_was_asked(scale):
    found = half_precision(scale)
    assert np.float16(found) == found
    assert found >= scale
    assert found >= np.finfo(np.float16).tiny
    assert found <= max(scale, np.finfo(np.float16).tiny) * 1.001


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_come_back_within_half_a_step_of_their_own_channel(axis):
    w = np.random.default_rng(0).standard_normal((6, 8)) * np.logspace(-2, 1, 8)
    integers, scale = quantize_weight(w, axis)
    wide = np.expand_dims(scale, 1 - axis)
    assert integers.dtype == np.int8
    assert scale.shape == (w.shape[axis],)
    assert integers.min() >= -127
    assert np.all(np.abs(integers * wide - w) <= wide * 0.5001)


def test_a_channel_of_zeros_gets_a_positive_scale():
    integers, scale = quantize_weight(np.zeros((3, 4)), 0)
    assert np.all(scale > 0)
    assert not integers.any()
