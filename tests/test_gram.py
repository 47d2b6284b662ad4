import tracemalloc

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model_from
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.calibration.statistics.gram import Gram, Tap, by_tap, cut, grams, groups, measure
from qexport.calibration.statistics.patches import Patch
from qexport.errors import DataInvalid
from qexport.passes.placement import Site, plan
from qexport.passes.target import find_target
from qexport.runtime.backends.ort import OrtSession

RNG = np.random.default_rng(0)
CHAIN = "g (float[n, s, 32] x) => (float[n, s, 16] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def chain():
    return model_from(CHAIN, w=normal(32, 24), v=normal(24, 16))


def samples(count=30):
    return [{"x": normal(int(RNG.integers(1, 40)), 32)} for _ in range(count)]


def sites(model):
    return list(plan(model, find_target("tensorrt-rtx")).roots)


def test_gram_matrices_are_those_of_numpy():
    model, data = chain(), samples(100)
    taps, refused = by_tap(sites(model))
    found = {tap.value: gram for tap, gram in grams(model, taps, data)}
    x = np.concatenate([sample["x"] for sample in data]).astype(np.float64)
    r = np.maximum(x @ model.graph.initializers["w"].const_value.numpy(), 0)
    assert not refused
    for name, rows in (("x", x), ("r", r)):
        np.testing.assert_allclose(found[name].hessian, rows.T @ rows, rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(found[name].magnitude, np.abs(rows).sum(axis=0), rtol=1e-5)
        assert found[name].rows == len(rows)


def test_the_error_of_a_gap_is_the_squared_difference_of_outputs():
    model, data, gap = chain(), samples(), normal(32, 5)
    found = measure(model, [Tap("x", 32)], data)[Tap("x", 32)]
    x = np.concatenate([sample["x"] for sample in data])
    assert found.error(gap) == pytest.approx(np.square(x @ gap).sum(), rel=1e-4)


def test_products_of_one_value_are_measured_once():
    text = "g (float[n, 32] x) => (float y, float z) { y = MatMul(x, w)  z = Gemm <transB = 1> (x, v) }"
    model = model_from(text, w=normal(32, 24), v=normal(16, 32))
    ((tap, readers),) = by_tap(sites(model))[0].items()
    assert (tap.value, tap.size, len(readers)) == ("x", 32, 2)


def test_the_budget_decides_how_many_are_held_at_once():
    taps = [Tap(str(i), 10) for i in range(5)]
    assert [len(group) for group in groups(taps, 1600)] == [2, 2, 1]
    assert [len(group) for group in groups(taps, 1)] == [1] * 5


def test_a_small_budget_changes_no_number():
    model, data = chain(), samples()
    taps = list(by_tap(sites(model))[0])
    rounds = [0]

    def advance():
        rounds[0] += 1

    for (tap, one), (other_tap, other) in zip(
        grams(model, taps, data), grams(model, taps, data, budget=1, advance=advance), strict=True
    ):
        assert tap == other_tap
        assert np.array_equal(one.hessian, other.hessian)
    assert rounds[0] == 2 * len(data)


def test_early_layers_run_without_later_ones():
    model = chain()
    small = cut(model, ["h"])
    assert [node.op_type for node in small.graph] == ["MatMul"]
    assert list(small.graph.initializers) == ["w"]
    assert [node.op_type for node in model.graph] == ["MatMul", "Relu", "MatMul"]
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_equal_samples_count_once():
    model, data = chain(), samples(5)
    tap = Tap("x", 32)
    assert np.array_equal(measure(model, [tap], data)[tap].hessian, measure(model, [tap], data + data)[tap].hessian)


def test_infinity_is_told_with_sample_and_value():
    data = samples(3)
    data[2]["x"][0, 0] = np.inf
    with pytest.raises(DataInvalid, match=r"sample 2: .*'x'"):
        measure(chain(), [Tap("x", 32)], data)


def test_no_sample_leaves_no_rows():
    tap = Tap("x", 32)
    assert measure(chain(), [tap], [])[tap].rows == 0


def test_memory_is_flat_in_the_number_of_samples():
    model = chain()

    def peak(count):
        data = ({"x": np.random.default_rng(i).standard_normal((50, 32)).astype(np.float32)} for i in range(count))
        tracemalloc.start()
        measure(model, [Tap("x", 32), Tap("r", 24)], data)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(600) < 1.3 * peak(200)


def test_a_convolution_in_groups_and_a_transposed_one_are_refused():
    text = """g (float[n, 32, 8, 8] x) => (float y, float z) {
        y = Conv <group = 2> (x, w)  z = ConvTranspose (x, v) }"""
    model = model_from(text, w=normal(16, 16, 3, 3), v=normal(32, 16, 2, 2))
    taps, refused = by_tap(Site(node, (0,), 1) for node in model.graph)
    assert not taps
    assert ["groups" in reason or "ConvTranspose" in reason for reason in refused.values()] == [True, True]


WALKS = [
    "",
    "pads = [1, 2, 0, 1]",
    "strides = [2, 3], dilations = [2, 1]",
    'auto_pad = "SAME_UPPER", strides = [2, 2]',
    'auto_pad = "SAME_LOWER", strides = [3, 1]',
    'auto_pad = "VALID"',
]


@pytest.mark.parametrize("attributes", WALKS)
def test_patches_times_kernel_are_the_convolution(attributes):
    text = f"g (float[n, 4, 11, 10] x) => (float y) {{ y = Conv {f'<{attributes}>' if attributes else ''} (x, w) }}"
    w, x = normal(6, 4, 3, 2), normal(1, 4, 11, 10)
    model = model_from(text, w=w)
    y = OrtSession(ir.to_proto(model).SerializeToString()).run({"x": x})["y"]
    (tap,) = by_tap([Site(model.graph[0], (0,), 1)])[0]
    rows = np.concatenate(list(tap.rows(x)))
    np.testing.assert_allclose((rows @ w.reshape(6, -1).T).T.reshape(y[0].shape), y[0], rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2))
def test_patches_in_one_and_three_dimensions_match_a_loop(side, stride, dilation, pad):
    walk = Patch((side,), (stride,), (dilation,), (pad, pad))
    x = np.arange(2 * 3 * 9, dtype=np.float32).reshape(2, 3, 9)
    padded = np.pad(x, [(0, 0), (0, 0), (pad, pad)])
    places = range(0, padded.shape[2] - (side - 1) * dilation, stride)
    wanted = [picture[:, i : i + side * dilation : dilation].ravel() for picture in padded for i in places]
    np.testing.assert_array_equal(np.concatenate(list(walk.rows(x))), np.stack(wanted))
    total, count = walk.sums(x)
    assert count == len(wanted)
    np.testing.assert_allclose(total, np.sum(wanted, axis=0, dtype=np.float64), atol=1e-5)
    cube = Patch((side,) * 3, (stride,) * 3, (dilation,) * 3, (pad,) * 6)
    assert next(cube.rows(np.ones((1, 2, 9, 9, 9), np.float32))).shape[1] == 2 * side**3


def test_large_images_are_walked_in_chunks(monkeypatch):
    walk = Patch((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    image = normal(1, 4, 32, 32)
    whole = np.concatenate(list(walk.rows(image)))
    monkeypatch.setattr("qexport.calibration.statistics.patches.CHUNK_BYTES", 32 * 36 * 4 * 2)
    pieces = list(walk.rows(image))
    assert len(pieces) == 16
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_rows_wait_in_bounded_numbers():
    gram = Gram(8)
    for _ in range(100):
        gram.add(normal(300, 8))
        assert sum(map(len, gram._waiting)) < 1024
