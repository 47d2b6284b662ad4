"""``qexport plan`` as a dry run: what it foretells is what a build does, and it changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import call

import qexport
from qexport.errors import ModelInvalid, UsageError
from qexport.exporter.forecast.forecast import forecast
from qexport.exporter.forecast.pace import Amounts, Pace, measure_pace, stages
from qexport.exporter.forecast.sizes import file_bytes
from qexport.exporter.forecast.standins import CUTS
from qexport.exporter.load import load_source
from qexport.exporter.options import BuildOptions
from qexport.exporter.outcome.artefact import count_decisions, step_infos
from qexport.exporter.precision.lab import Question
from qexport.exporter.product import run_recipe
from qexport.exporter.recipe_files import list_recipes, load_recipe, override
from qexport.exporter.samples import open_samples
from qexport.exporter.steps import PASSES, find_pass
from qexport.passes.target import TARGETS, find_target

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
g (float[n, 128] x) => (float[n, 64] y) {
    a = MatMul(x, w) b = Add(a, p) c = Gelu(b) d = MatMul(c, v) e = Add(d, q)
    f = LayerNormalization(e, s, t) y = MatMul(f, u)
}"""


def cuts(recipe):
    return [step.pass_ for step in recipe.step if step.enabled and step.pass_ in CUTS]


PLAIN = {"triage": "triage.most=0", "sparsify": "sparsify.min_dim=64"}
"""By step: nothing is taken back for what is measured, and layers as small as these are made sparse."""

WHOLE = [name for name in list_recipes() if not cuts(load_recipe(name))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three products with a Gelu and a norm between them, and samples."""
    folder = tmp_path_factory.mktemp("forecast")
    rng = np.random.default_rng(0)
    shapes = {"w": (128, 128), "p": (128,), "v": (128, 128), "q": (128,), "s": (128,), "t": (128,), "u": (128, 64)}
    proto = onnx.parser.parse_model(TEXT)
    for name, shape in shapes.items():
        array = (rng.standard_normal(shape) / (11 if len(shape) > 1 else 4) + (name == "s")).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for node in proto.graph.node:
        node.name = f"/block/{node.output[0]}"
    onnx.save(proto, folder / "model.onnx")
    np.savez(folder / "calib.npz", x=rng.standard_normal((48, 128)).astype(np.float32))
    return folder


def asked(folder, recipe="int8", target=None, *, data=True, settings=(), cache=None):
    calib = folder / "calib.npz" if data else None
    return Question(folder / "model.onnx", recipe, calib, None, BuildOptions(target=target, set=settings, cache=cache))


def snapshot(folder):
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def counted(product):
    """What the result of a build says was quantized, and what was not and why."""
    return count_decisions(step_infos(product))


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize(
    ("name", "target"), [*((name, None) for name in WHOLE), ("int8", "ort-cpu"), ("int8", "ort-cuda")]
)
def test_decisions_and_bytes_are_those_of_the_recipe_run_on_data(folder, name, target, data):
    steps = {step.pass_ for step in load_recipe(name).step}
    settings = tuple(setting for step, setting in PLAIN.items() if step in steps)
    told = forecast(asked(folder, name, target, data=data, settings=settings))
    options = BuildOptions(target=target)
    recipe = override(load_recipe(name), [*settings, *([f"export.target={target}"] if target else [])])
    source = load_source(folder / "model.onnx", cached=recipe.export.cached)
    product = run_recipe(source, recipe, open_samples(source, recipe, folder / "calib.npz", None), options)
    decisions = [decision for step in product.steps for decision in step.decisions]
    assert (told.quantized, told.skipped) == counted(product)
    if name != "llm-int8":  # which tells how many columns stay in float
        assert told.forms == Counter(decision.reason for decision in decisions if decision.action == "quantized")
    wanted = [(d.node, d.op, d.action) for s in product.steps if PASSES[s.name].quantizes for d in s.decisions]
    assert [(choice.node, choice.op, choice.action) for choice in told.decisions] == wanted
    size = len(ir.to_proto(product.model).SerializeToString())
    assert told.bytes == pytest.approx(size, rel=0.02)
    assert told.bytes_before == (folder / "model.onnx").stat().st_size
    assert (told.recipe, told.target) == (name, recipe.export.target)
    assert (told.engine_bytes is not None) == (find_target(told.target).engine is not None)


def test_nothing_is_written_and_nothing_is_touched(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    assert call(capsys, "plan", "model.onnx", "--calib", "calib.npz", "--target", "ort-cpu")[0] == 0
    assert snapshot(folder) == before
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_lines_or_one_object(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, out, _ = call(capsys, "plan", str(folder / "model.onnx"))
    assert code == 0
    assert "3 nodes" in out
    assert "no calibration data" in out
    told = json.loads(call(capsys, "plan", str(folder / "model.onnx"), "--json")[1])
    assert (told["schema"], told["quantized"], told["target"]) == ("qexport.forecast/1", 3, "tensorrt-rtx")
    assert set(told["seconds"]) == {"load", "recipe", "verify", "latency", "write", "engine", "report"}
    assert [choice["node"] for choice in told["decisions"]] == ["/block/a", "/block/d", "/block/y"]


def test_the_command_lists_the_nodes_of_a_dry_run(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    setting = tmp_path / "keep.toml"
    setting.write_text('extends = "int8"\n[[step]]\npass = "quantize"\nkeep = ["/block/d"]\n')
    code, out, _ = call(capsys, "plan", str(folder / "model.onnx"), "--recipe", str(setting), "--nodes")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.split()[:1] and line.split()[0].startswith("/block/")]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("/block/a", "MatMul", "quantized"),
        ("/block/y", "MatMul", "quantized"),
        ("/block/d", "MatMul", "skipped"),
    ]
    code, _, err = call(capsys, "plan", str(folder / "model.onnx"), "--nodes", "--min-cosine", "0.9")
    assert (code, "without a budget alone" in err) == (2, True)


def test_a_recipe_to_write_without_a_budget_is_refused(folder, capsys, tmp_path):
    code, _, err = call(capsys, "plan", str(folder / "model.onnx"), "-o", str(tmp_path / "plan.toml"))
    assert code == 2
    assert "without a budget" in err
    assert list(tmp_path.iterdir()) == []


def test_what_a_build_refuses_is_refused_alike(folder, tmp_path):
    qexport.build(
        folder / "model.onnx",
        calib=folder / "calib.npz",
        target="ort-cpu",
        options=BuildOptions(output=tmp_path / "int8", set=("export.never_worse=false", "triage.most=0")),
    )
    again = replace(asked(folder, "int8", data=False), model=tmp_path / "int8")
    with pytest.raises(UsageError, match="quantized already"):
        forecast(again)
    with pytest.raises(ModelInvalid, match="reads up to"):
        forecast(replace(again, recipe="float32", options=BuildOptions(target="tensorrt")))
    with pytest.raises(UsageError, match="no labels"):
        forecast(replace(asked(folder), options=BuildOptions(max_drop=1.0)))
    with pytest.raises(UsageError, match="no such file"):
        forecast(replace(asked(folder), model=tmp_path / "gone.onnx"))


def test_what_an_equal_build_has_left_in_the_cache_is_told(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("qexport.exporter.resume.journal.WORTH", 0.0)
    cache = tmp_path / "cache"
    question = asked(folder, target="ort-cpu", cache=cache)
    assert forecast(question).cached == ()
    assert not cache.exists()
    options = replace(question.options, output=tmp_path / "out")
    qexport.build(folder / "model.onnx", calib=folder / "calib.npz", options=options)
    before = snapshot(cache)
    told = forecast(question).cached
    assert {"verify", "latency"} <= set(told)
    assert snapshot(cache) == before
    other = replace(question, options=replace(question.options, set=("smooth.alpha=0.5",)))
    assert forecast(other).cached == ()


def test_cuts_are_told_as_unknown(folder):
    told = forecast(asked(folder, "compact", "ort-cpu", settings=("triage.most=0",)))
    assert any("heads, neurons, channels" in warning for warning in told.warnings)
    assert told.quantized == 3


def test_the_size_of_a_file_is_counted_without_writing_weights(folder):
    model = load_source(folder / "model.onnx").model
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert file_bytes(model) == pytest.approx(len(before), rel=0.01)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


AMOUNTS = Amounts(("observe", "calibrate", "triage"), 0.5, 4, 512, 2000, 36, 400, 25_000_000)
PACE = Pace(run=0.002, unit=0.02, opening=0.1, loading=1.0)


def total(**changed):
    return sum(stages(PACE, replace(AMOUNTS, **changed), TARGETS["ort-cpu"], engine=False).values())


@pytest.mark.parametrize("name", ["proofs", "calibration", "judged", "layers", "bytes"])
def test_more_to_do_takes_longer(name):
    assert total(**{name: 3 * getattr(AMOUNTS, name)}) > total() + 0.05


def test_stages_that_a_build_does_not_have_are_not_told():
    engine = stages(PACE, AMOUNTS, TARGETS["tensorrt-rtx"], engine=True)
    assert "engine" in engine
    assert "profile" not in engine
    unjudged = stages(PACE, replace(AMOUNTS, judged=0), TARGETS["ort-cpu"], engine=False)
    assert set(unjudged) == {"load", "recipe", "write", "report"}


def test_the_pace_is_that_of_one_sample(folder):
    model = load_source(folder / "model.onnx").model
    feed = {"x": np.zeros((1, 128), np.float32)}
    many = {"x": np.zeros((4096, 128), np.float32)}
    one, share = measure_pace(model, [feed], 0.0), measure_pace(model, [many], 0.0)
    assert 0 < share.run < one.run
    assert measure_pace(model, [], 2.5).run == 0


def test_every_step_that_looks_at_data_has_a_cost():
    from qexport.exporter.forecast.pace import WORK
    from qexport.exporter.steps import PASSES

    looking = {name for name in PASSES if "data" in find_pass(name, "").options()}
    assert looking <= set(WORK)


@pytest.mark.slow
def test_disk_and_memory_of_a_real_build_are_foretold_within_a_factor_of_two(samples, tmp_path):
    folder = samples / "resnet20"
    model, recipe, target = folder / "resnet20.onnx", folder / "int8.toml", "ort-cpu"
    calib, evaluation = folder / "calibration.npz", folder / "test.npz"
    cache = tmp_path / "cache"
    told = forecast(Question(model, recipe, calib, evaluation, BuildOptions(target=target, cache=cache)))
    assert not cache.exists()
    words = ["build", model, "--recipe", recipe, "--calib", calib, "--eval", evaluation, "--target", target]
    command = [sys.executable, "-m", "qexport", *words, "--cache", cache, "-o", tmp_path / "out"]
    subprocess.run(command, check=True, capture_output=True)  # by itself, as memory is that of a process
    built = json.loads((tmp_path / "out/result.json").read_text("utf-8"))
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 0.5 <= told.disk / taken <= 2
    assert 0.5 <= told.memory / built["peak_rss_bytes"] <= 2
