"""What machine and model can do: peaks, costs counted from graphs, curves of calls, and the file they are kept in."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import cached_models
import numpy as np
import onnx_ir as ir
import pytest
from helpers import model_from

from qexport.errors import DataInvalid, QexportError, UsageError
from qexport.runtime.accounting import curve, machine
from qexport.runtime.accounting.costs import Costs, count_costs
from qexport.runtime.accounting.curve import Plan, Setting, measure_profile, profile_of, stored_profile
from qexport.runtime.accounting.machine import Fingerprint, Machine, fingerprint, measure_machine
from qexport.runtime.accounting.profiles import FILE, Profile, profiles_json, read_profiles
from qexport.runtime.decoder import Decoder
from qexport.runtime.session import SessionOptions

HERE = Fingerprint("processor", 2, "runtime 1")
COSTS = Costs(weights=100, kv=10, flops=200, flops_pair=4)
CURVE = ((1, 2.0), (2, 2.5), (4, 2.5), (8, 4.5))
KNOWN = Profile(HERE, threads=1, valid=128, batch=1, curve=CURVE, prefill=0.2, costs=COSTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tiny")
    (made / "model.onnx").write_bytes(cached_models.serialized(cached_models.portable(cached_models.Tiny())))
    return made


@pytest.fixture
def decoder(folder):
    return Decoder(folder / "model.onnx", SessionOptions(threads=1))


def keep(folder, *profiles):
    (folder / FILE).write_text(json.dumps(profiles_json(profiles)))
    return folder


# ---------------------------------------------------------------- the machine


def test_peaks_are_measured_quickly_and_are_those_of_a_machine():
    began = time.perf_counter()
    found = measure_machine(1)
    assert time.perf_counter() - began < 4  # two on a machine with nothing else to do
    assert [block for block, _ in found.bandwidth] == list(machine.BLOCKS)
    assert all(5e8 < rate < 5e12 for _, rate in found.bandwidth)
    assert 1e9 < found.flops < 1e13
    assert found.flops_int8 is not None
    assert found.fingerprint == fingerprint()
    assert json.loads(json.dumps(found.as_json()))["threads"] == 1


def test_reading_is_not_slower_than_a_plain_copy():
    block = 64 << 20
    source = np.ones(block // 4, np.float32)
    target = np.empty_like(source)
    copies = []
    for _ in range(5):
        began = time.perf_counter()
        np.copyto(target, source)
        copies.append(time.perf_counter() - began)
    assert measure_machine(1).memory > 0.5 * block / min(copies)


class Slow:
    """A device that takes as long as it is told to."""

    fingerprint, threads = Fingerprint("processor", 2, "driver 3", "a GPU"), 1

    def read(self, block, times):
        return lambda: time.sleep(1e-2)

    def multiply(self, size):
        return lambda: time.sleep(2e-2)

    def multiply_int8(self, size):
        return None


def test_another_device_brings_its_own_meter():
    found = measure_machine(meter=Slow())
    assert found.fingerprint.device == "a GPU"
    assert found.memory == pytest.approx(machine.BLOCKS[-1] / 1e-2, rel=0.3)
    assert found.bandwidth[0][1] == pytest.approx(found.memory, rel=0.3)
    assert found.flops == pytest.approx(2 * machine.SIZE**3 / 2e-2, rel=0.3)
    assert found.flops_int8 is None


def test_the_peak_depends_on_how_much_is_read_again_and_again():
    found = Machine(HERE, 1, ((1_000, 90.0), (10_000, 30.0), (100_000, 35.0)), flops=1.0)
    assert found.peak(500) == 90
    assert found.peak(1_000) == 90
    assert found.peak(5_000) == 35  # the largest block was read faster than the one in between: so can this
    assert found.peak(10**9) == found.memory == 35


def test_a_fingerprint_tells_machines_and_runtimes_apart():
    found = fingerprint()
    assert found == fingerprint()
    assert found.runtime.startswith("onnxruntime ")
    assert found.processor
    assert found != fingerprint("NVIDIA H200") != fingerprint("NVIDIA H200", "tensorrt 10")


# ---------------------------------------------------------------- costs


@pytest.mark.parametrize(("dtype", "size"), [(ir.DataType.FLOAT, 4), (ir.DataType.FLOAT16, 2)])
def test_costs_of_a_decoder_are_counted_from_its_graph(dtype, size):
    c = cached_models
    found = count_costs(c.portable(c.Tiny(), dtype))
    layer = 2 * c.WIDTH * c.HEADS * c.DIM + 2 * c.WIDTH * c.KV_HEADS * c.DIM + 3 * c.WIDTH * c.INNER
    products = c.LAYERS * layer + c.WIDTH * c.VOCABULARY
    assert found.flops == 2 * products
    assert found.flops_pair == 4 * c.LAYERS * c.HEADS * c.DIM
    assert found.kv == 2 * c.LAYERS * c.KV_HEADS * c.DIM * size
    norms = (2 * c.LAYERS + 1) * c.WIDTH
    assert 0 <= found.weights - size * (products + norms) < 300  # bytes of masks and shapes; no table of embeddings


def test_weights_count_as_they_are_stored_and_tables_that_are_multiplied_with_count_too():
    rng = np.random.default_rng(0)
    model = model_from(
        """g (int64[n] ids) => (float[n, 8] y) {
            table = DequantizeLinear(stored, scale)
            x = Gather(table, ids)
            turned = Transpose<perm=[1, 0]>(table)
            y = MatMul(x, turned) }""",
        stored=rng.integers(-9, 9, (8, 16)).astype(np.int8),
        scale=np.array(0.1, np.float32),
    )
    found = count_costs(model)
    assert found.weights == 8 * 16 + 4
    assert found.flops == 2 * 8 * 16


def test_pairs_in_attention_count_by_the_queries_and_not_by_what_the_layer_gives():
    model = model_from(
        """g (float[b, 6, n, 8] q, float[b, 2, m, 8] k, float[b, 2, m, 8] v) => (float[b, n, 5] y) {
            mixed = Attention(q, k, v)
            turned = Transpose<perm=[0, 2, 1, 3]>(mixed)
            rows = Reshape(turned, shape)
            y = MatMul(rows, w) }""",
        opset=24,
        shape=np.array([0, 0, 48]),
        w=np.zeros((48, 5), np.float32),
    )
    assert count_costs(model).flops_pair == 4 * 6 * 8


def test_costs_add_up_over_calls():
    assert COSTS.bytes_read(cached=7, calls=3) == 3 * 100 + 7 * 10
    assert COSTS.operations(tokens=5, pairs=11) == 5 * 200 + 11 * 4


# ---------------------------------------------------------------- the curve


class Clockwork:
    """A decoder that takes ``1 + width / 4`` ms, and now and then ten times as long."""

    def __init__(self, monkeypatch, positions=None, trouble=0.0):
        self.signature, self.limit = type("Signature", (), {"vocabulary": 11})(), positions
        self.now, self.length, self.calls, self.trouble = 0.0, 0, [], trouble
        self.rng = np.random.default_rng(1)
        monkeypatch.setattr(curve.time, "perf_counter", lambda: self.now)

    def reset(self, batch=1):
        self.length = 0

    def rollback(self, length):
        assert length <= self.length
        self.length = length

    def extend(self, ids):
        assert ids.max() < 11
        self.calls.append((self.length, *ids.shape))
        self.length += ids.shape[1]
        assert self.limit is None or self.length <= self.limit
        self.now += 1e-3 * (1 + ids.shape[1] / 4) * (10 if self.rng.random() < self.trouble else 1)


def test_the_curve_is_what_calls_take_whatever_disturbs_half_of_them(monkeypatch):
    clock = Clockwork(monkeypatch, trouble=0.5)
    found = measure_profile(clock, COSTS, Setting(HERE, 1), Plan(seconds=4.0))
    assert [width for width, _ in found.curve] == list(curve.WIDTHS)
    assert dict(found.curve) == pytest.approx({width: 1 + width / 4 for width in curve.WIDTHS})
    assert (found.fingerprint, found.threads, found.valid, found.batch) == (HERE, 1, 128, 1)
    steps = clock.calls[2:]
    assert {before for before, _, _ in steps} == {128}
    assert clock.length == 0


def test_a_slow_decoder_is_measured_once(monkeypatch):
    clock = Clockwork(monkeypatch)
    found = measure_profile(clock, COSTS, Setting(HERE, 1), Plan(seconds=1e-9))
    assert len(clock.calls) == 1 + 2 * len(curve.WIDTHS)  # the prompt, the warm-up, one round
    assert found.prefill == pytest.approx((1 + 128 / 4) / 128)


def test_what_is_measured_fits_into_the_positions_of_the_model(monkeypatch):
    found = measure_profile(Clockwork(monkeypatch, positions=40), COSTS, Setting(HERE, 1))
    assert (found.valid, found.curve[-1][0]) == (24, 16)
    found = measure_profile(Clockwork(monkeypatch, positions=3), COSTS, Setting(HERE, 1))
    assert (found.valid, [width for width, _ in found.curve]) == (0, [1, 2, 3])


def test_rows_of_a_batch_are_measured_together(monkeypatch):
    clock = Clockwork(monkeypatch)
    found = measure_profile(clock, COSTS, Setting(HERE, 1), Plan(batch=3, widths=(1, 5)))
    assert found.batch == 3
    assert {(rows, width) for _, rows, width in clock.calls} == {(3, 128), (3, 1), (3, 5)}


def test_the_curve_of_a_real_decoder_has_its_shape(decoder):
    began = time.perf_counter()
    found = measure_profile(decoder, COSTS, Setting(fingerprint(), 1), Plan(seconds=0.2))
    assert time.perf_counter() - began < 2
    times = [milliseconds for _, milliseconds in found.curve]
    assert times == sorted(times)
    assert all(0 < value < 100 for value in times)
    assert 0 < found.prefill < times[-1]
    assert decoder.lengths.tolist() == [0]


@pytest.mark.parametrize("wrong", [{"widths": ()}, {"widths": (0, 1)}, {"valid": -1}, {"batch": 0}])
def test_plans_that_measure_nothing_are_refused(wrong):
    with pytest.raises(UsageError, match="widths are"):
        Plan(**wrong)


def test_between_widths_times_lie_on_lines_and_go_on_behind_the_last():
    assert [KNOWN.milliseconds(width) for width in (1, 2, 3, 4, 6, 8)] == [2, 2.5, 2.5, 2.5, 3.5, 4.5]
    assert KNOWN.milliseconds(10) == 5.5
    flat = replace(KNOWN, curve=((1, 2.0), (2, 3.0), (4, 2.5)))
    assert flat.milliseconds(100) == 2.5
    assert replace(KNOWN, curve=((1, 2.0),)).milliseconds(7) == 2


# ---------------------------------------------------------------- the file


def test_a_profile_comes_back_as_it_was_kept(tmp_path):
    other = replace(KNOWN, threads=2, curve=((1, 1.5),))
    assert read_profiles(keep(tmp_path, KNOWN, other) / FILE) == [KNOWN, other]
    assert stored_profile(tmp_path, Setting(HERE, 2)) == other


@pytest.mark.parametrize(
    "elsewhere",
    [
        Setting(replace(HERE, processor="another"), 1),
        Setting(replace(HERE, cores=64), 1),
        Setting(replace(HERE, runtime="runtime 2"), 1),
        Setting(replace(HERE, device="a GPU"), 1),
        Setting(HERE, 3),
    ],
)
def test_a_profile_of_another_machine_runtime_or_number_of_threads_is_not_used(tmp_path, elsewhere):
    keep(tmp_path, KNOWN)
    assert stored_profile(tmp_path, Setting(HERE, 1)) == KNOWN
    assert stored_profile(tmp_path, elsewhere) is None
    assert stored_profile(tmp_path, Setting(HERE, 1), batch=2) is None


def test_no_threads_are_as_many_as_there_are_cores(tmp_path):
    keep(tmp_path, replace(KNOWN, threads=machine.count_threads(0)))
    assert stored_profile(tmp_path, Setting(HERE, 0)) is not None


def test_loading_uses_what_is_stored_or_measures(folder, decoder, tmp_path):
    for name in ("model.onnx",):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    measured = profile_of(tmp_path, decoder, Setting(HERE, 1))
    assert measured.costs == count_costs(cached_models.portable(cached_models.Tiny()))
    assert measured.curve != KNOWN.curve
    keep(tmp_path, KNOWN)
    assert profile_of(tmp_path, decoder, Setting(HERE, 1)) == KNOWN
    (tmp_path / FILE).write_text("{}")
    assert profile_of(tmp_path, decoder, Setting(HERE, 1)).curve != KNOWN.curve


@pytest.mark.parametrize("content", [None, b"no graph"])
def test_a_folder_without_a_graph_is_an_error_of_ours_unless_its_profile_is_known(decoder, tmp_path, content):
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(QexportError, match=r"no graph|no such"):
        profile_of(tmp_path, decoder, Setting(HERE, 1))
    keep(tmp_path, KNOWN)
    assert profile_of(tmp_path, decoder, Setting(HERE, 1)) == KNOWN


def _broken():
    told = profiles_json([KNOWN])
    entry = told["profiles"][0]
    yield "{"
    yield "[]"
    yield "[" * 100_000
    yield json.dumps(told | {"schema": "qexport.profile/9"})
    changes = ({"curve": []}, {"curve": [[2, 1.0], [1, 1.0]]}, {"curve": [[1, float("nan")]]}, {"curve": [[1, -1.0]]})
    changes += ({"threads": 0}, {"threads": True}, {"prefill": "fast"}, {"costs": {}}, {"fingerprint": None})
    changes += ({"curve": [[1, 10**400]]}, {"curve": [[1, 1.0], [10**400, 2.0]]}, {"curve": [[1, 1e308], [2, 1e308]]})
    changes += ({"curve": [[1, 1e-310]]}, {"prefill": 10**400}, {"costs": entry["costs"] | {"flops": 10**400}})
    for change in changes:
        yield json.dumps(told | {"profiles": [entry | change]})
    del entry["valid"]
    yield json.dumps(told)


@pytest.mark.parametrize("text", list(_broken()), ids=lambda text: text[:8] + str(len(text)))
def test_a_file_that_is_no_profile_is_refused_and_not_used(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DataInvalid, match="no profile of a decoder"):
        read_profiles(tmp_path / FILE)
    assert stored_profile(tmp_path, Setting(HERE, 1)) is None
