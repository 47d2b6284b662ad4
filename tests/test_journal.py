"""What a build finds out is kept for an equal one: recalled as it was, told, and never taken for something else."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from helpers import save_model

import qexport
from qexport.errors import Busy, IntegrityError
from qexport.exporter.engines.engine import EngineOptions
from qexport.exporter.engines.kept import plan_once
from qexport.exporter.engines.timing import keep_timings, open_timings
from qexport.exporter.load import load_source
from qexport.exporter.options import BuildOptions, Silent
from qexport.exporter.outcome.result import EngineInfo, Latency, Quality
from qexport.exporter.outcome.summary import summary_lines
from qexport.exporter.precision.recalled import RecallingBench
from qexport.exporter.precision.regions import Region
from qexport.exporter.recipe_files import load_recipe, override
from qexport.exporter.resume import journal
from qexport.exporter.resume.journal import FRESH, Journal, build_key, open_journal
from qexport.exporter.samples import open_samples
from qexport.runtime.backends.artefact import PLAN
from qexport.runtime.profile import Kernel
from qexport.safe_io import Cache, publish

KEY = "0" * 64


@pytest.fixture(autouse=True)
def everything_counts(monkeypatch):
    monkeypatch.setattr(journal, "WORTH", 0.0)


@pytest.fixture
def known(tmp_path):
    """A journal as the next process would open it."""
    return lambda **options: Journal(Cache(tmp_path / "cache", **options), KEY)


# ------------------------------------------------------------ one thing


def test_what_was_found_out_is_found_out_once(known):
    first, second, other = known(), known(), known()
    found = [0.1, -0.0, 1e-300, math.inf, math.nan, 1 / 3]
    assert first.once("a", list[float], lambda: found, lambda: 1) is found
    again = second.once("a", list[float], list, lambda: 1)
    assert np.array(again).tobytes() == np.array(found).tobytes()
    assert other.once("a", list[float], lambda: [2.0], lambda: 2) == [2.0]
    assert (first.resumed, second.resumed, other.resumed) == ([], ["a"], [])


def test_times_are_believed_for_a_while(known, monkeypatch):
    known().once("a", float, lambda: 1.0, list, fresh=FRESH)
    now = time.time()
    for later, expected in ((FRESH - 5, 1.0), (FRESH + 5, 2.0), (-60, 2.0)):
        monkeypatch.setattr(journal.time, "time", lambda later=later: now + later)
        monkeypatch.setattr(journal, "WORTH", 1e9)  # what is found now is not kept
        assert known().once("a", float, lambda: 2.0, list, fresh=FRESH) == expected


def test_what_took_moments_or_is_nothing_is_not_kept(known, monkeypatch, tmp_path):
    known().once("a", Quality, lambda: None, list)
    monkeypatch.setattr(journal, "WORTH", 5.0)
    known().once("b", float, lambda: 1.0, list)
    assert not (tmp_path / "cache").exists()
    known().once("c", float, lambda: 1.0, list, decides=True)
    assert known().once("c", float, lambda: 2.0, list) == 1.0


def test_without_a_cache_nothing_is_asked():
    nothing = Journal(Cache())
    assert nothing.once("a", float, lambda: 1.0, lambda: 1 / 0) == 1.0
    assert nothing.resumed == []


@pytest.mark.parametrize("content", [b"", b"no JSON", b"[]", b'{"time": 0}', b'{"time": 0, "found": "text"}'])
def test_an_entry_that_says_something_else_is_told_and_not_believed(known, content):
    entry = known().place("a", list)
    assert entry.write(content)
    lenient = known()
    assert lenient.once("a", list[float], lambda: None, list) is None
    assert "says something else" in lenient.doubts(())[0]
    assert lenient.doubts(lenient.cache.doubts) == ()
    with pytest.raises(IntegrityError, match="says something else"):
        known(strict=True).once("a", list[float], lambda: None, list)


# ------------------------------------------------------------ whose it is


@pytest.fixture
def given(tmp_path):
    """What a build is given, after changes."""
    rng = np.random.default_rng(0)
    arrays = {"x": rng.standard_normal((20, 32)).astype(np.float32), "labels": np.arange(20)}
    path = save_model(tmp_path / "model.onnx")
    model = path.read_bytes()

    def opened(*settings, tokenizer=None, judged=None, change=bytes, **changes):
        path.write_bytes(model + change())
        np.savez(tmp_path / "calib.npz", **{**arrays, **changes})
        np.savez(tmp_path / "eval.npz", **{**arrays, **(changes if judged is None else judged)})
        if tokenizer is not None:
            (tmp_path / "vocab.txt").write_text(tokenizer)
        recipe = override(load_recipe("int8"), ["export.target=ort-cpu", *settings])
        source = load_source(path)
        return source, recipe, open_samples(source, recipe, tmp_path / "calib.npz", tmp_path / "eval.npz")

    opened.arrays = arrays
    return opened


def key(given, **options):
    return build_key(*given, **({"allow_nonfinite": False} | options))


def test_the_key_of_a_build_is_that_of_all_it_depends_on(given, monkeypatch):
    x, labels = given.arrays["x"], given.arrays["labels"]
    first = key(given())
    assert key(given()) == first
    others = [
        key(given(x=x + 1)),
        key(given(x=x[::-1])),
        *(key(given(x=x + more, judged={})) for more in (1, 2)),
        key(given(judged={"x": x + 1})),
        key(given(labels=labels[::-1])),
        key(given(change=onnx.ModelProto(doc_string="another").SerializeToString)),
        key(given("gates.min_cosine=0.5")),
        key(given("calibrate.samples=8")),
        key(given(), allow_nonfinite=True),
        key(given(tokenizer="a")),
        key(given(tokenizer="b")),
    ]
    for whose in ("tool_versions", "processor"):
        monkeypatch.setattr(journal, whose, lambda: {"onnx": "0"})
        others.append(key(given()))
    monkeypatch.setattr(qexport, "__version__", "0")
    others.append(key(given()))
    assert len({first, *others}) == len(others) + 1


# ------------------------------------------------------------ who may


class Told(Silent):
    def __init__(self):
        self.names = []

    @contextmanager
    def stage(self, name, total=None):
        self.names.append(name)
        yield lambda n=1: None
        self.names.append(f"end of {name}")


def test_an_equal_build_is_waited_for_which_is_a_stage(given, tmp_path):
    progress, parts = Told(), given()
    asked = BuildOptions(lock_timeout=0.2, progress=progress)
    other = given("calibrate.samples=8")
    with open_journal(Cache(tmp_path / "cache"), *parts, asked) as held:
        assert progress.names == []
        with pytest.raises(Busy, match="another process holds the lock"), open_journal(held.cache, *parts, asked):
            pass
        with open_journal(held.cache, *other, asked) as different:
            assert different.key != held.key
    assert progress.names[0] == journal.WAIT
    with open_journal(Cache(tmp_path / "cache"), *parts, asked) as again:
        assert again.key == held.key
    assert list((tmp_path / "cache/builds").iterdir()) == []


# ------------------------------------------------------------ what a bench finds


def test_a_second_build_says_what_the_first_one_measured(tmp_path, given):
    given()
    told = {"recipe": "int8", "calib": tmp_path / "calib.npz", "target": "ort-cpu"}

    def build(name, **options):
        asked = BuildOptions(output=tmp_path / name, set=("export.never_worse=false",), **options)
        return qexport.build(tmp_path / "model.onnx", options=asked, **told)

    first, second = (build(name, cache=tmp_path / "cache") for name in ("a", "b"))
    assert (first.resumed, second.resumed) == ((), ("recipe", "verify", "latency"))
    said = [line for line in summary_lines(second) if line not in summary_lines(first)]
    assert any("recipe, verify, latency: done by an equal build before" in line for line in said)
    assert second.quality == first.quality
    assert second.latency == first.latency
    assert second.steps == first.steps
    assert second.warnings == first.warnings
    assert second.files["model.onnx"] == first.files["model.onnx"] == build("c").files["model.onnx"]


class Bench:
    """Measures once, and then never again."""

    def __init__(self):
        self.profiles, self.noted, self.left = {}, [], 1

    def _once(self):
        self.left -= 1
        assert self.left >= 0

    def errors(self, regions):
        self._once()
        return [0.25, 0.1]

    def note(self, errors):
        self.noted = [(region.nodes, error) for region, error in errors]

    def costs(self, product, regions):
        self._once()
        self.profiles[product.quantized] = ([Kernel("h", "MatMul", 1e-3, ((2, 32),))], [Kernel("h", "QGemm", 2e-3)])
        return []


def test_profiles_and_errors_are_recalled_with_what_others_read_of_them(known, tmp_path):
    model = load_source(save_model(tmp_path / "model.onnx")).model
    name = model.graph[0].name
    product = SimpleNamespace(model=model, snapshot=SimpleNamespace(model=model), quantized=(name,))
    regions = (Region((name,), ("MatMul",)), Region((model.graph[1].name,), ("Relu",)))
    found = []
    for bench in (Bench(), Bench()):
        errors = RecallingBench(bench, known()).errors(regions)
        bench.left = bench.left + 1 if not found else bench.left
        costs = RecallingBench(bench, known()).costs(product, regions)
        found.append((errors, costs, bench.profiles, bench.noted))
        assert bench.left == (0 if len(found) == 1 else 1)
    assert found[0] == found[1]
    assert found[0][3] == [(regions[0].nodes, 0.25), (regions[1].nodes, 0.1)]


def test_latencies_of_another_machine_are_not_ours(known, tmp_path, monkeypatch):
    latency = Latency(
        runtime="r",
        threads=1,
        shapes={},
        pairs=1,
        reference_ms=2,
        result_ms=1,
        speedup=2,
        speedup_low=1,
        speedup_high=3,
    )
    product = SimpleNamespace(model=load_source(save_model(tmp_path / "model.onnx")).model)
    bench = SimpleNamespace(time=lambda product: latency)
    RecallingBench(bench, known()).time(product)
    again, there = known(), known()
    assert RecallingBench(SimpleNamespace(time=None), again).time(product) == latency
    assert again.resumed == ["latency"]
    monkeypatch.setattr(journal.platform, "node", lambda: "elsewhere")
    RecallingBench(bench, there).time(product)
    assert there.resumed == []


# ------------------------------------------------------------ engines


def test_an_engine_is_built_once_for_the_same_model_and_options(known, tmp_path):
    built = []

    def build(model, name, options, plan):
        built.append(options)
        content = b"engine %d\n" % len(built)
        plan.write_bytes(content)
        told = {"module": name, "version": "1", "seconds": 1.0, "bytes": len(content), "layers": 3}
        return EngineInfo(**told, compute_capabilities=(), profiles=({"x": ([1], [2], [3])},))

    def made(options, content=b"model", **strict):
        book = known(**strict)
        with publish(tmp_path / "out") as stage:
            stage.write_bytes("model.onnx", content)
            info = plan_once(book, stage, "tensorrt_rtx", options, build)
            stage.write_manifest()
        return info, (tmp_path / "out" / PLAN).read_bytes(), book

    plain, low = EngineOptions(progress=lambda *_: True), EngineOptions(optimization_level=0)
    first = made(plain)
    second = made(EngineOptions())
    assert first[:2] == second[:2]
    assert (first[2].resumed, second[2].resumed) == ([], ["engine"])
    assert made(low)[1] == b"engine 2\n"
    assert made(plain, b"other")[1] == b"engine 3\n"
    (entry,) = [e for e in known().cache.entries() if e.path.read_bytes().endswith(b"engine 1\n")]
    place = known().cache.entry(entry.kind, entry.key)
    sound = place.read()
    for content, says in ((sound[:-1], "another size"), (b'{"bytes": 3}\nengine', "says something else")):
        assert place.write(content)
        with pytest.raises(IntegrityError, match=says):
            made(plain, strict=True)
    assert made(plain)[1] == b"engine 4\n"


class Config:
    """TensorRT's: it may know no timings, refuse them, or fail."""

    def __init__(self, *accepted, fails=None):
        self.accepted, self.fails, self.now = accepted, fails, None

    def create_timing_cache(self, content):
        if self.fails:
            raise self.fails
        return content if content in self.accepted else None

    def set_timing_cache(self, timings, ignore_mismatch):
        self.now = timings
        return not ignore_mismatch

    def get_timing_cache(self):
        return None if self.now is None else SimpleNamespace(serialize=lambda: self.now + b" more")


@pytest.mark.parametrize(
    ("config", "before", "state", "after"),
    [
        (Config(b"", b"sound"), None, "new", b" more"),
        (Config(b"", b"sound"), b"sound", "used", b"sound more"),
        (Config(b"", b"sound"), b"other", "refused", b" more"),
        (Config(fails=RuntimeError("magic tag")), b"other", "refused", b"other"),
        (SimpleNamespace(), b"sound", "", b"sound"),
    ],
)
def test_timings_that_a_builder_does_not_take_never_end_a_build(tmp_path, config, before, state, after):
    path = tmp_path / "timings"
    if before is not None:
        path.write_bytes(before)
    assert open_timings(config, path) == state
    keep_timings(config, path)
    assert path.read_bytes() == after
    assert open_timings(config, None) == ""
