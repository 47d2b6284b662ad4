import tracemalloc

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import Samples
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.calibration.calibrate import Calibrate
from qexport.calibration.reading.data import sample_digest
from qexport.calibration.statistics.collect import Statistics, collect
from qexport.calibration.statistics.excerpts import LIMIT, Excerpts
from qexport.calibration.statistics.store import Entry, Store
from qexport.errors import DataInvalid, UsageError
from qexport.passes.numbers.range import RANGE_KEY, SQNR_KEY
from qexport.safe_io import Cache

RNG = np.random.default_rng(0)
TAPS = {"x": (), "r": ()}
TEXT = "g (float[n, s, 32] x) => (float[n, s, 16] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"


def model_from(text=TEXT, **weights):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
    for name, array in (weights or {"w": normal(32, 24), "v": normal(24, 16)}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def samples(count=40):
    return Samples({"x": normal(int(RNG.integers(1, 20)), 32)} for _ in range(count))


def ranges(model):
    return {v.name: v.meta[RANGE_KEY] for node in model.graph for v in node.inputs if v.meta.get(RANGE_KEY)}


def calibrated(model, data, **options):
    work = model.clone()
    Calibrate(data=data, **options)(work)
    return work


def test_min_max_ranges_are_those_of_numpy():
    model, data = model_from(), samples()
    found = ranges(calibrated(model, data, method="minmax"))
    w = model.graph.initializers["w"].const_value.numpy()
    everything = np.concatenate([sample["x"] for sample in data])
    assert (found["x"].low, found["x"].high) == (everything.min(), everything.max())
    assert found["r"].low == 0
    assert found["r"].high == pytest.approx((everything @ w).max(), rel=1e-5)


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse", "output-mse"])
def test_ranges_are_bit_identical_in_any_order(method):
    model, data = model_from(), samples()
    shuffled = Samples(data)
    RNG.shuffle(shuffled)
    assert ranges(calibrated(model, data, method=method)) == ranges(calibrated(model, shuffled, method=method))


def test_statistics_of_shards_merge_into_those_of_the_whole():
    model, data = model_from(), samples()
    whole = collect(model, TAPS, data)
    left, right = collect(model, TAPS, data[:13]), collect(model, TAPS, data[13:])
    for name, statistics in left.items():
        statistics.merge(right[name])
        assert np.array_equal(statistics.histogram.counts, whole[name].histogram.counts)
        assert statistics.histogram.high == whole[name].histogram.high
        one, other = statistics.excerpts.stacked(), whole[name].excerpts.stacked()
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_second_run_changes_nothing():
    model, data = model_from(), samples()
    assert Calibrate(data=data)(model).modified
    assert not Calibrate(data=data)(model).modified


def test_the_rated_sqnr_is_the_one_that_the_quantized_layer_has():
    model, data = model_from(), samples(200)
    work = calibrated(model, data, method="minmax")
    rated = work.graph[0].meta[SQNR_KEY]
    x = np.concatenate([sample["x"] for sample in data]).astype(np.float64)
    w = model.graph.initializers["w"].const_value.numpy()
    step, steps = np.abs(x).max() / 127, np.abs(w).max(axis=0) / 127
    y = x @ w
    noise = y - (np.rint(x / step) * step) @ (np.rint(w / steps) * steps)
    assert rated == pytest.approx(10 * np.log10(np.square(y).sum() / np.square(noise).sum()), abs=0.7)


def test_output_mse_clips_an_outlier_that_no_weight_reads():
    w = normal(32, 24)
    w[0] = 0
    text = "g (float[n, s, 32] x) => (float[n, s, 24] y) { y = MatMul(x, w) }"
    data = samples()
    for sample in data:
        sample["x"][:, 0] = 40.0
    model = model_from(text, w=w)
    wide = ranges(calibrated(model, data, method="minmax"))["x"].high
    assert wide == 40
    assert ranges(calibrated(model, data, method="output-mse"))["x"].high < 15  # near the smallest candidate


def test_only_so_many_samples_are_used():
    model, data = model_from(), samples(20)
    data[-1]["x"][:] = 1000
    assert ranges(calibrated(model, data, method="minmax", samples=19))["x"].high < 100


def test_no_data_and_an_unknown_method_are_usage_errors():
    with pytest.raises(UsageError, match="calibration data"):
        Calibrate()(model_from())
    with pytest.raises(UsageError, match="known: minmax"):
        Calibrate(data=samples(), method="best")(model_from())


def test_an_activation_that_overflows_is_named():
    text = "g (float[n, s, 32] x) => (float[n, s, 24] y) { h = Exp(x)  y = MatMul(h, w) }"
    data = samples(3)
    data[1]["x"][:] = 1000
    with pytest.raises(DataInvalid, match=r"sample 1: .*'h'"):
        Calibrate(data=data)(model_from(text, w=normal(32, 24)))


def test_a_stored_measurement_is_not_run_again(tmp_path, monkeypatch):
    model, data = model_from(), samples()
    first = calibrated(model, data, store=Store(Cache(tmp_path)))
    assert len(list(tmp_path.glob("statistics/*"))) == 1
    monkeypatch.setattr("qexport.calibration.statistics.collect.open_model", None)
    assert ranges(calibrated(model, data, store=Store(Cache(tmp_path)))) == ranges(first)


def test_a_killed_measurement_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("qexport.calibration.statistics.collect.JOURNAL_EVERY", 8)
    model, data = model_from(), samples(20)

    def kill_after(count):
        left = [count]

        def advance():
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        return advance

    with pytest.raises(KeyboardInterrupt):
        calibrated(model, data, store=Store(Cache(tmp_path)), advance=kill_after(18))
    observed = []
    original = Statistics.add

    def observe(self, digests, values):
        observed.extend(digests)
        original(self, digests, values)

    monkeypatch.setattr(Statistics, "add", observe)
    resumed = calibrated(model, data, store=Store(Cache(tmp_path)))
    assert observed
    assert set(observed) <= {sample_digest(sample) for sample in data[16:]}
    monkeypatch.undo()
    assert ranges(resumed) == ranges(calibrated(model, data))


def test_other_weights_and_other_data_have_other_entries(tmp_path):
    data = samples()
    for model in (model_from(), model_from()):
        calibrated(model, data, store=Store(Cache(tmp_path)))
    calibrated(model, Samples(data[1:]), store=Store(Cache(tmp_path)))
    assert len(list(tmp_path.glob("statistics/*"))) == 3


def test_the_first_samples_of_another_order_have_an_entry_of_their_own(tmp_path):
    model, data = model_from(), samples(20)
    turned = Samples(data[::-1])
    expected = ranges(calibrated(model, turned, samples=10))
    assert ranges(calibrated(model, data, samples=10, store=Store(Cache(tmp_path)))) != expected
    assert ranges(calibrated(model, turned, samples=10, store=Store(Cache(tmp_path)))) == expected


def test_equal_samples_count_once_wherever_they_stand():
    model, data = model_from(), samples(10)
    for doubled in (data[:1] * 2 + data[1:], data + data[:1]):
        assert collect(model, TAPS, doubled)["x"].histogram.total == collect(model, TAPS, data)["x"].histogram.total


LAYERS = {
    "a product of a 4-D value": ("float[n, 8, 6, 32] x", "y = MatMul(x, w)", (32, 24), (8, 6, 32)),
    "time": ("float[n, 16, t] x", "y = Conv(x, w)", (24, 16, 3), (16, 40)),
    "space and time": ("float[n, 16, t, h, s] x", "y = Conv(x, w)", (24, 16, 3, 3, 3), (16, 5, 14, 14)),
    "a tiny map": ("float[n, 16, 2, 2] x", "y = Conv <pads = [1, 1, 1, 1]> (x, w)", (24, 16, 3, 3), (16, 2, 2)),
    "a far reach": ("float[n, 16, h, s] x", "y = Conv <dilations = [9, 9]> (x, w)", (24, 16, 3, 3), (16, 40, 40)),
    "transposed": ("float[n, 16, h, s] x", "y = ConvTranspose <strides = [2, 2]> (x, w)", (16, 24, 3, 3), (16, 7, 7)),
    "a batch of four": ("float[4, 32] x", "y = MatMul(x, w)", (32, 24), (32,)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers_of_every_shape_are_rated(case):
    inputs, body, weight, shape = LAYERS[case]
    model = model_from(f"g ({inputs}) => (float y) {{ {body} }}", w=normal(*weight))
    work = calibrated(model, Samples({"x": normal(*shape)} for _ in range(20)))
    assert 25 < work.graph[0].meta[SQNR_KEY] < 60


def test_a_value_that_a_product_and_a_convolution_read_is_rated_for_the_convolution():
    text = "g (float[n, 16, 20, 32] x) => (float y, float z) { y = Conv(x, w)  z = MatMul(x, v) }"
    model = model_from(text, w=normal(24, 16, 3, 3), v=normal(32, 24))
    work = calibrated(model, Samples({"x": normal(16, 20, 32)} for _ in range(4)), method="output-mse")
    assert 25 < work.graph[0].meta[SQNR_KEY] < 60
    assert SQNR_KEY not in work.graph[1].meta


def test_a_sample_that_leaves_a_value_empty_is_no_obstacle():
    text = "g (float[n, 32] x, bool[n] keep) => (float y) { k = Compress <axis = 0> (x, keep)  y = MatMul(k, w) }"
    data = Samples({"x": normal(32), "keep": np.array(kept)} for kept in (True, False, True))
    work = calibrated(model_from(text, w=normal(32, 24)), data, method="minmax")
    assert ranges(work)["k"].high == max(data[0]["x"].max(), data[2]["x"].max())


@pytest.mark.parametrize("damage", [b"", b"garbage", b"\xff" * 100_000])
def test_a_damaged_entry_is_passed_over_and_replaced(tmp_path, damage):
    model, data = model_from(), samples()
    expected = ranges(calibrated(model, data, store=Store(Cache(tmp_path))))
    (entry,) = tmp_path.glob("statistics/*")
    sound = entry.read_bytes()
    entry.write_bytes(damage or sound[:1000])
    assert ranges(calibrated(model, data, store=Store(Cache(tmp_path)))) == expected
    assert entry.read_bytes() == sound


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """An entry of a store, the bytes of its file and what they say."""
    folder = tmp_path_factory.mktemp("store")
    model, data = model_from(), samples(6)
    entry = Store(Cache(folder)).entry(model, TAPS, data.digests)
    collect(model, TAPS, data, journal=entry)
    return entry, entry.place.path.read_bytes(), told(entry.state)


def told(state):
    """Everything that a state says, to be compared."""
    statistics, seen = state
    return seen, [(name, *numbers(known.histogram), *excerpts(known)) for name, known in statistics.items()]


def numbers(histogram):
    return histogram.low, histogram.high, histogram.zeros, histogram.top, histogram.counts.tobytes()


def excerpts(known):
    return sorted((digest, rows.tobytes()) for digest, rows in known.excerpts.kept.items())


@settings(max_examples=300, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.booleans(), st.integers(1, 255))
def test_one_damaged_byte_of_an_entry_never_changes_what_it_says(stored, place, head, damage):
    entry, sound, expected = stored
    position = int(place * (4096 if head else len(sound)))  # names and sizes stand in the head
    entry.place.path.write_bytes(sound[:position] + bytes([sound[position] ^ damage]) + sound[position + 1 :])
    state = entry.state
    assert state is None or told(state) == expected


def test_an_entry_under_the_name_of_another_counts_as_absent(stored):
    entry, sound, expected = stored
    other = Entry(entry.place.cache.entry("statistics", "0" * 64))
    entry.place.path.write_bytes(sound)
    other.place.path.write_bytes(sound)
    assert other.state is None
    assert told(entry.state) == expected


def test_statistics_of_other_values_than_the_tapped_ones_are_passed_over():
    model, data = model_from(), samples(6)
    known = collect(model, TAPS, data)

    class Other:
        state = {"x": known["x"], "gone": known["r"]}, frozenset(data.digests)

        def write(self, statistics, seen):
            self.state = statistics, seen

    journal = Other()
    found = collect(model, TAPS, data, journal=journal)
    assert found.keys() == journal.state[0].keys() == set(TAPS)
    assert found["r"].histogram.high == known["r"].histogram.high


def test_excerpts_hold_a_bounded_number_of_samples():
    excerpts = Excerpts()
    for index in range(3 * LIMIT):
        x = np.full((1, 4, 8), index, np.float32)
        excerpts.add(sample_digest({"x": x}), x)
    assert len(excerpts.kept) == LIMIT


def test_memory_is_flat_in_the_number_of_samples():
    model = model_from()

    def peak(count):
        data = (({"x": np.random.default_rng(i).standard_normal((50, 32)).astype(np.float32)}) for i in range(count))
        tracemalloc.start()
        collect(model, TAPS, data)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(600) < 1.3 * peak(200)


def test_convolutions_are_rated_on_windows_of_images():
    text = """g (float[n, 16, 20, 20] x) => (float[n, 8, 10, 10] y) {
        y = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w) }"""
    model = model_from(text, w=normal(8, 16, 3, 3))
    data = Samples({"x": normal(16, 20, 20)} for _ in range(10))
    work = calibrated(model, data)
    assert 30 < work.graph[0].meta[SQNR_KEY] < 50
