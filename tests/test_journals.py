"""What calibration measures is kept: run again it is read, killed it goes on, damaged it is measured anew and told."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Samples, model_from

from qexport.calibration.calibrate import Calibrate
from qexport.calibration.extremes import Extremes
from qexport.calibration.observe import Observe
from qexport.calibration.reading.data import sample_digest
from qexport.calibration.running import execute
from qexport.calibration.statistics import collect, store
from qexport.calibration.statistics.store import Store
from qexport.errors import IntegrityError
from qexport.passes.folding.activation import activation_of
from qexport.passes.numbers.extreme import extreme_of
from qexport.passes.numbers.range import RANGE_KEY
from qexport.safe_io import Cache

RNG = np.random.default_rng(3)
TEXT = "g (float[n, s, 32] x) => (float[n, s, 16] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"
PASSES = {"observe": Observe, "extremes": Extremes, "calibrate": Calibrate}


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture
def model():
    return model_from(TEXT, w=normal(32, 24), v=normal(24, 16))


@pytest.fixture
def data():
    return Samples({"x": normal(int(RNG.integers(1, 20)), 32)} for _ in range(20))


@pytest.fixture(params=PASSES)
def measure(request, model, data):
    """Measure by one of the passes: all that it leaves on the model."""

    def run(cache=None, **options):
        work = model.clone()
        PASSES[request.param](data=data, store=Store(cache or Cache()), **options)(work)
        return notes(work)

    return run


def notes(model):
    """Everything the passes leave on values, as bytes."""
    found = {}
    for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
        activation, extreme, span = activation_of(value), extreme_of(value), value.meta.get(RANGE_KEY)
        arrays = () if activation is None else (activation.low, activation.high, activation.rows)
        axis = None if activation is None else activation.axis
        found[value.name] = (axis, [array.tobytes() for array in arrays], extreme, span)
    return found


def test_what_was_measured_is_not_measured_again(tmp_path, measure, monkeypatch):
    expected = measure()
    assert any(note != (None, [], None, None) for note in expected.values())
    assert measure(Cache(tmp_path)) == expected
    monkeypatch.setattr(collect, "open_model", None)
    cache = Cache(tmp_path)
    assert measure(cache) == expected
    assert cache.doubts == []


def test_what_was_interrupted_goes_on(tmp_path, measure, data, monkeypatch):
    monkeypatch.setattr(collect, "JOURNAL_EVERY", 8)  # samples are counted one by one
    expected = measure()
    left = [12]

    def interrupt():
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(Cache(tmp_path), advance=interrupt)
    run = []
    original = execute.open_model

    def spied(*args, **options):
        session = original(*args, **options)
        real = session.run
        monkeypatch.setattr(session, "run", lambda feeds, taps: run.append(feeds) or real(feeds, taps))
        return session

    monkeypatch.setattr(collect, "open_model", spied)
    assert measure(Cache(tmp_path)) == expected
    assert len(run) < len(data)
    missing = {sample_digest({"x": feeds["x"][0]}) for feeds in run}
    assert missing <= {sample_digest(sample) for sample in data[-len(run) :]}


@pytest.mark.parametrize("every", [1, 7])
def test_long_measurements_are_kept_on_the_way(tmp_path, measure, monkeypatch, every):
    for module in (store, collect):
        monkeypatch.setattr(module, "JOURNAL_EVERY", 8 * every if module is collect else every)
    written = []
    monkeypatch.setattr(Cache, "prune", lambda self, limit: written.append(limit))
    expected = measure()
    assert measure(Cache(tmp_path)) == expected
    assert len(written) > 1 or every == 7


def test_damage_is_told_and_measured_anew(tmp_path, measure):
    expected = measure(Cache(tmp_path))
    (path,) = tmp_path.glob("statistics/*")
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="damaged"):
        measure(Cache(tmp_path, strict=True))
    cache = Cache(tmp_path)
    assert measure(cache) == expected
    assert len(cache.doubts) == 1
    assert path.read_bytes() == sound


def test_what_another_program_has_sealed_is_told_and_measured_anew(tmp_path, measure):
    expected = measure(Cache(tmp_path))
    (path,) = tmp_path.glob("statistics/*")
    cache = Cache(tmp_path)
    for content in (b"no safetensors", store.save({"seen": np.zeros((0, 32), np.uint8)})):
        assert cache.entry("statistics", path.name).write(content)
        assert measure(cache) == expected
        assert cache.entry("statistics", path.name).write(content)
        with pytest.raises(IntegrityError, match="says something else"):
            measure(Cache(tmp_path, strict=True))
    assert all("says something else" in doubt for doubt in cache.doubts)


def test_each_pass_has_an_entry_of_its_own(tmp_path, model, data):
    for made in PASSES.values():
        made(data=data, store=Store(Cache(tmp_path)))(model.clone())
    assert len(list(tmp_path.glob("statistics/*"))) == 3
