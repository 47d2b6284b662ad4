from itertools import pairwise

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import UsageError
from qexport.passes.numbers.groups import (
    CODES_KEY,
    Grid,
    as_matrix,
    check_group,
    codes_of,
    decode,
    encode,
    misfit_groups,
    quantize_groups,
    scales_for,
)
from qexport.passes.placement import Site

SEEDS = st.integers(0, 2**32 - 1)
BITS = st.sampled_from([8, 4, 3])
GRIDS = st.builds(Grid, BITS, st.sampled_from([0, 16, 32, 64]), st.booleans())


def weights(seed, k=64, n=12, spread=1.5):
    """A matrix with channels of very different size and, in some, mostly one sign."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((k, n)) * rng.lognormal(0, spread, (k, 1)) + rng.normal(0, 1, n)
    return w.astype(np.float32)


def by_hand(w, bits, group, symmetric):
    """The definition, group by group and output by output, in float64: the weights and the levels' distance."""
    found, steps = np.empty_like(w, np.float64), np.empty_like(w, np.float64)
    for column in range(w.shape[1]):
        for start in range(0, w.shape[0], group):
            part = w[start : start + group, column].astype(np.float64)
            low, high = min(part.min(), 0), max(part.max(), 0)
            if symmetric:
                low, high = -np.abs(part).max(), np.abs(part).max()
            scale = (high - low) / (2**bits - 1)
            zero = 0 if symmetric else np.rint(-low / scale) - 2 ** (bits - 1)
            codes = np.clip(np.rint(part / scale) + zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            found[start : start + group, column] = (codes - zero) * scale
            steps[start : start + group, column] = scale
    return found, steps


def error(w, codes):
    return float(np.square(codes.dequantize().astype(np.float64) - w).sum())


@settings(max_examples=12, deadline=None)
@given(SEEDS, BITS, st.sampled_from([16, 32, 64]), st.booleans())
def test_codes_are_those_of_the_definition(seed, bits, group, symmetric):
    w = weights(seed)
    found = quantize_groups(w, Grid(bits, group, symmetric)).dequantize()
    expected, steps = by_hand(w, bits, group, symmetric)
    near_a_tie = np.isclose(np.abs(found - w), steps / 2, rtol=1e-3)
    np.testing.assert_allclose(np.where(near_a_tie, w, found), np.where(near_a_tie, w, expected), rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(SEEDS, GRIDS, st.booleans())
def test_no_weight_is_farther_than_half_a_step_from_its_code(seed, grid, half):
    w = weights(seed)
    codes = quantize_groups(w, grid, half=half)
    reach = np.repeat(codes.scale, grid.rows(len(w)), axis=0) / 2
    assert np.all(np.abs(codes.dequantize() - w) <= reach * (1 + 1e-4))


@settings(max_examples=12, deadline=None)
@given(SEEDS, GRIDS, st.booleans())
def test_codes_stay_inside_the_grid_and_zero_is_exact(seed, grid, half):
    w = weights(seed)
    w[::5] = 0
    codes = quantize_groups(w, grid, half=half, clip=True)
    assert codes.values.dtype == np.int8
    assert codes.values.min() >= {8: -128, 4: -8, 3: -4}[grid.bits]
    assert codes.values.max() <= {8: 127, 4: 7, 3: 3}[grid.bits]
    assert not codes.dequantize()[::5].any()
    assert (codes.zero is None) == grid.symmetric
    assert codes.scale.shape == (len(w) // grid.rows(len(w)), w.shape[1])


@settings(max_examples=8, deadline=None)
@given(SEEDS, BITS, st.booleans())
def test_smaller_groups_lose_next_to_nothing_and_win_much_where_some_channels_are_outliers(seed, bits, symmetric):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((1024, 8)).astype(np.float32)
    w[rng.choice(1024, 6, replace=False)] *= 40
    errors = [error(w, quantize_groups(w, Grid(bits, group, symmetric))) for group in (0, 512, 128, 64, 32, 16)]
    assert all(after < 1.05 * before for before, after in pairwise(errors))  # where all are coarse it is chance
    assert errors[-1] < errors[0] / 3


@settings(max_examples=8, deadline=None)
@given(SEEDS, st.sampled_from([0, 32]), st.booleans())
def test_more_bits_never_lose(seed, group, symmetric):
    w = weights(seed)
    errors = [error(w, quantize_groups(w, Grid(bits, group, symmetric))) for bits in (3, 4, 8)]
    assert errors == sorted(errors, reverse=True)


@settings(max_examples=8, deadline=None)
@given(SEEDS, GRIDS, st.booleans())
def test_the_clip_search_never_loses(seed, grid, half):
    w = weights(seed)
    assert error(w, quantize_groups(w, grid, half=half, clip=True)) <= error(w, quantize_groups(w, grid, half=half))


def test_the_clip_search_gives_up_an_outlier_for_the_rest():
    w = np.linspace(-1, 1, 128, dtype=np.float32)[:, None]
    w[7] = 1.9
    plain, clipped = (quantize_groups(w, Grid(3, 0), clip=clip) for clip in (False, True))
    assert clipped.scale < 0.8 * plain.scale
    assert error(w, clipped) < 0.8 * error(w, plain)


@pytest.mark.parametrize("bits", [3, 4])
def test_a_zero_point_halves_the_step_of_weights_of_one_sign(bits):
    w = np.abs(weights(1))
    symmetric, affine = (quantize_groups(w, Grid(bits, 32, kind)) for kind in (True, False))
    np.testing.assert_allclose(affine.scale, symmetric.scale / 2, rtol=1e-5)
    assert error(w, affine) < error(w, symmetric) / 2.5


@settings(max_examples=8, deadline=None)
@given(SEEDS, GRIDS, st.sampled_from([1e-6, 1.0, 1e3]))
def test_half_precision_scales_are_normal_float16_numbers(seed, grid, size):
    scale = quantize_groups(weights(seed) * np.float32(size), grid, half=True).scale
    np.testing.assert_array_equal(scale.astype(np.float16).astype(np.float32), scale)
    assert scale.min() >= 2.0**-14


def test_scales_too_small_or_too_large_for_float16_and_weights_that_are_no_numbers_are_told():
    grid = Grid(4, 16)
    w = weights(0)
    assert misfit_groups(w, grid, half=True) is None
    assert "too small" in misfit_groups(w * np.float32(1e-6), grid, half=True)
    assert "too large" in misfit_groups(w * np.float32(1e6), grid, half=True)
    assert misfit_groups(w * np.float32(1e-6), grid, half=False) is None
    w[3, 3] = np.nan
    assert "finite" in misfit_groups(w, grid, half=False)
    assert misfit_groups(np.zeros((32, 4), np.float32), grid, half=True) is None


def test_a_column_at_a_time_gives_the_codes_of_the_whole():
    w, grid = weights(5), Grid(4, 16, symmetric=False)
    whole = quantize_groups(w, grid)
    for group in range(4):
        block = w[16 * group : 16 * group + 16]
        scale, zero = scales_for(block, grid)
        np.testing.assert_array_equal(scale, whole.scale[group])
        for k, row in enumerate(block):
            codes = encode(row, scale, zero, grid)
            np.testing.assert_array_equal(codes, whole.values[16 * group + k])
            np.testing.assert_array_equal(decode(codes, scale, zero), whole.dequantize()[16 * group + k])


@pytest.mark.parametrize(("k", "near"), [(100, "20, 25, 50"), (97, "no group divides it"), (384, "96, 128, 192")])
def test_a_group_that_does_not_divide_names_the_node_its_inputs_and_what_fits(k, near):
    with pytest.raises(UsageError, match=f"does not divide the {k} inputs of node 'fc1'") as caught:
        check_group(Grid(4, 160), k, "fc1")
    assert near in caught.value.hint
    check_group(Grid(4, 0), k, "fc1")


@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_is_a_matrix_of_inputs_by_outputs_whatever_its_node_says(axis):
    w = weights(2)
    held = w if axis == 1 else np.ascontiguousarray(w.T)
    value = ir.Value(name="w", const_value=ir.tensor(held))
    x = ir.Value(name="x")
    site = Site(ir.node("Gemm", [x, value], {"transB": 1 - axis}), (0,), 1, axis)
    np.testing.assert_array_equal(as_matrix(site), w)
    assert codes_of(value) is None
    value.meta[CODES_KEY] = quantize_groups(w, Grid(4))
    assert codes_of(value) is value.meta[CODES_KEY]
    assert codes_of(None) is None
