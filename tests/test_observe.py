"""What ``observe`` notes of each channel is what the samples hold, whatever their order."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qexport.calibration.observe import ROWS, Observe
from qexport.calibration.running.execute import open_model
from qexport.errors import DataInvalid, UsageError
from qexport.passes.folding.activation import MIXED, Activation, activation_of, transform, why_unknown
from qexport.passes.folding.axes import channel_ids
from qexport.passes.llm_int8 import LlmInt8
from qexport.passes.numbers.extreme import EXTREME_KEY
from qexport.passes.numbers.range import RANGE_KEY, Range
from qexport.passes.shift import Shift
from qexport.passes.smooth import Smooth

RNG = np.random.default_rng(0)
TEXT = """<ir_version: 10, opset_import: ["" : 21]> g (float[n, s, 16] x) => (float[n, s, 16] y, float[n, s, 16] z)
{ h = Relu(x)  y = MatMul(h, w)  z = MatMul(h, v) }"""
IMAGE = """<ir_version: 10, opset_import: ["" : 21]> g (float[n, 16, p, q] x) => (float[n, 16, p, q] y)
{ h = Relu(x)  y = Conv<pads=[1, 1, 1, 1]>(h, w) }"""
TWO_AXES = """<ir_version: 10, opset_import: ["" : 21]> g (float[n, 32, SIZE] x)
=> (float[n, 32, k] y, float[n, 24, SIZE] z) { h = LayerNormalization(x, g)  ENDS }"""
PRODUCT, CONVOLUTION = "y = MatMul(h, w)", "z = Conv<pads=[1, 1]>(h, v)"


def build(text, **shapes):
    proto = onnx.parser.parse_model(text)
    for name, shape in shapes.items():
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(RNG.standard_normal(shape).astype(np.float32), name)
        )
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


@pytest.fixture
def model():
    return build(TEXT, w=(16, 16), v=(16, 16))


@pytest.fixture
def data(outlier_model):
    return outlier_model.Samples(
        {"x": RNG.standard_normal((int(size), 16)).astype(np.float32)} for size in RNG.integers(1, 9, 20)
    )


def seen(model, name="h"):
    return activation_of({value.name: value for node in model.graph for value in node.outputs}[name])


def test_extremes_are_those_of_all_positions_of_all_samples(model, data):
    assert Observe(data=data)(model).modified
    rows = np.maximum(np.concatenate([sample["x"] for sample in data]), 0)
    found = seen(model)
    assert found.axis == -1
    assert np.array_equal(found.low, rows.min(axis=0))
    assert np.array_equal(found.high, rows.max(axis=0))
    assert np.array_equal(found.reach, np.abs(rows).max(axis=0))


def test_rows_are_positions_of_the_samples_as_many_of_each(model, data):
    Observe(data=data)(model)
    found, places = seen(model).rows, []
    assert found.shape == (len(data) * ROWS, 16)
    for row in found:
        (place,) = (i for i, sample in enumerate(data) if (np.maximum(sample["x"], 0) == row).all(axis=1).any())
        places.append(place)
    assert np.array_equal(np.bincount(places), [ROWS] * len(data))


def test_the_order_of_the_samples_makes_no_difference(model, data, outlier_model):
    other = model.clone()
    Observe(data=data)(model)
    Observe(data=outlier_model.Samples(reversed(data)))(other)
    for name in ("low", "high", "rows"):
        assert np.array_equal(getattr(seen(model), name), getattr(seen(other), name))


def test_a_second_run_changes_nothing_and_other_samples_do(model, data, outlier_model):
    Observe(data=data)(model)
    assert not Observe(data=data)(model).modified
    assert Observe(data=outlier_model.Samples(data[:3]))(model).modified


def test_the_number_of_samples_can_be_limited(model, data):
    Observe(data=data, samples=2)(model)
    rows = np.maximum(np.concatenate([sample["x"] for sample in data[:2]]), 0)
    assert np.array_equal(seen(model).high, rows.max(axis=0))


def test_channels_of_images_are_their_second_axis(outlier_model):
    model = build(IMAGE, w=(16, 16, 3, 3))
    data = outlier_model.Samples({"x": RNG.standard_normal((16, 5, 7)).astype(np.float32)} for _ in range(4))
    Observe(data=data)(model)
    pixels = np.maximum(np.stack([sample["x"] for sample in data]), 0)
    found = seen(model)
    assert found.axis == 1
    assert np.array_equal(found.high, pixels.max(axis=(0, 2, 3)))
    assert found.rows.shape == (4 * ROWS, 16)


def test_the_model_computes_what_it_did(model, data):
    feed = {"x": data[0]["x"][None]}
    before = open_model(model).run(feed)
    Observe(data=data)(model)
    after = open_model(model).run(feed)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_what_no_product_reads_is_not_looked_at(model, data):
    Observe(data=data)(model)
    assert seen(model, "y") is None
    assert activation_of(model.graph.inputs[0]) is None


def test_no_data_is_a_usage_error(model):
    with pytest.raises(UsageError) as caught:
        Observe()(model)
    assert "--calib" in caught.value.hint


def test_nan_and_infinity_are_told_with_sample_and_value(model, outlier_model):
    data = outlier_model.Samples({"x": np.full((2, 16), number, np.float32)} for number in (1, np.inf))
    with pytest.raises(DataInvalid) as caught:
        Observe(data=data)(model)
    assert "'h'" in str(caught.value)
    assert caught.value.where == "sample 1"


def test_what_no_sample_reached_is_left_out(model, outlier_model):
    Observe(data=outlier_model.Samples([{"x": np.zeros((0, 16), np.float32)}]))(model)
    assert seen(model) is None


def test_notes_follow_what_is_done_to_the_channels():
    value = ir.val("x", ir.DataType.FLOAT, ("n", 3))
    value.meta[RANGE_KEY], value.meta[EXTREME_KEY] = Range(-1.0, 2.0), object()
    numbers = np.array([[-1.0, 2.0, 4.0], [3.0, 6.0, 9.0]], np.float32)
    value.meta["qexport.activation"] = Activation(-1, numbers.min(0), numbers.max(0), numbers)
    transform(value, channel_ids(2, 1, 3)[:, ::-1], np.array([1.0, 2.0, 4.0]), np.array([1.0, 0.0, 2.0]))
    found = activation_of(value)
    expected = (numbers - [2, 0, 1]) / [4, 2, 1]
    assert np.allclose(found.rows, expected)
    assert np.allclose(found.low, expected.min(0))
    assert np.allclose(found.high, expected.max(0))
    assert RANGE_KEY not in value.meta
    assert EXTREME_KEY not in value.meta
    transform(value, channel_ids(2, 0, 3), np.ones(3), np.zeros(3))  # along another axis: nothing is known any more
    assert activation_of(value) is None


@pytest.fixture(params=[(64, True), (64, False), (32, True), (32, False)], ids=str)
def two_axes(request, outlier_model):
    """A value whose last axis is that of the channels for a product, and the one before it for a convolution."""
    size, first = request.param
    ends = f"{PRODUCT} {CONVOLUTION}" if first else f"{CONVOLUTION} {PRODUCT}"
    text = TWO_AXES.replace("SIZE", str(size)).replace("ENDS", ends)
    model = build(text, g=(size,), w=(size, 48), v=(24, 32, 3))
    Observe(
        data=outlier_model.Samples({"x": 9 * RNG.standard_normal((32, size)).astype(np.float32)} for _ in range(9))
    )(model)
    return model


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (Smooth(), 1),
        (Smooth(alpha=0.5, mul=True), 1),
        (Shift(), 1),
        (LlmInt8(target="ort-cpu"), 2),
        (LlmInt8(ranges="static"), 2),
    ],
    ids=str,
)
def test_a_value_with_channels_on_two_axes_is_left_alone_with_a_reason(two_axes, step, told):
    before = ir.to_proto(two_axes).SerializeToString()
    outcome = step(two_axes)
    assert not outcome.modified
    assert ir.to_proto(two_axes).SerializeToString() == before
    reasons = {d.op: d.reason for d in outcome.decisions}
    assert len(reasons) == told
    assert MIXED in reasons.values()
    assert set(reasons.values()) <= {MIXED, "not a matrix product"}


def test_a_mark_for_two_axes_stays_whatever_is_done_to_the_value(two_axes, outlier_model):
    value = next(node for node in two_axes.graph if node.op_type == "MatMul").inputs[0]
    size = value.shape[-1]
    data = outlier_model.Samples({"x": RNG.standard_normal((32, size)).astype(np.float32)} for _ in range(2))
    assert not Observe(data=data)(two_axes).modified
    transform(value, channel_ids(3, 1, 32), np.ones(32), np.ones(32))
    assert (activation_of(value), why_unknown(value)) == (None, MIXED)
