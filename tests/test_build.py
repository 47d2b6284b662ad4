"""``qexport.build`` over the whole road, on tiny models: what it refuses, what it leaves alone, what it promises."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qexport
import qexport.exporter.build as builder
from qexport.errors import GateFailed, ModelInvalid, QexportError, UsageError
from qexport.exporter.options import BuildOptions
from qexport.exporter.outcome.summary import summary_lines
from qexport.runtime.backends.artefact import PLAN

LINEAR = "g (float[{n}, 32] x) => (float[{n}, 32] y) {{ h = MatMul(x, w)  y = Relu(h) }}"
FREE = LINEAR.format(n="n")


def save(folder, text=FREE, opset=21, **weights):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    weights = weights or {"w": np.random.default_rng(0).standard_normal((32, 32))}
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture
def model(tmp_path):
    return save(tmp_path)


@pytest.fixture
def calib(tmp_path):
    np.savez(tmp_path / "calib.npz", x=np.random.default_rng(1).standard_normal((48, 32)).astype(np.float32))
    return tmp_path / "calib.npz"


@pytest.fixture
def labelled(tmp_path):
    x = np.random.default_rng(2).standard_normal((20, 32)).astype(np.float32)
    np.savez(tmp_path / "labelled.npz", x=x, labels=np.arange(20) % 32)
    return tmp_path / "labelled.npz"


def build(model, calib=None, *, target="ort-cpu", recipe="int8", evaluation=None, **options):
    """Build without taking int8 back: which of it pays on a tiny model is left to chance."""
    settings = ("export.never_worse=false", *options.pop("set", ()))
    options = BuildOptions(output=options.pop("output", model.parent / "out"), set=settings, **options)
    return qexport.build(model, recipe=recipe, calib=calib, eval=evaluation, target=target, options=options)


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Told:
    """Progress that remembers."""

    def __init__(self):
        self.totals, self.done = {}, {}

    @contextmanager
    def stage(self, name, total=None):
        self.totals[name], self.done[name] = total, 0

        def advance(n=1):
            self.done[name] += n

        yield advance


def test_a_failing_gate_publishes_nothing_and_an_earlier_artefact_stays_as_it_was(tmp_path, model, calib):
    build(model, calib)
    before, around = snapshot(tmp_path / "out"), sorted(tmp_path.iterdir())
    told = Told()
    with pytest.raises(GateFailed, match=r"min_worst_cosine: measured 0\.999\d+, allowed 1 ") as failure:
        build(model, calib, set=("gates.min_worst_cosine=1",), progress=told)
    assert "min_sqnr" in failure.value.hint
    assert "latency" not in told.totals  # nothing is timed that is thrown away
    assert snapshot(tmp_path / "out") == before
    assert sorted(tmp_path.iterdir()) == around  # no staging folder is left


@pytest.mark.parametrize("gate", ["max_drop=1", "min_cosine=0.9", "min_worst_cosine=0.5"])
def test_a_gate_that_nothing_can_judge_fails_before_the_work(tmp_path, model, gate):
    told = Told()
    with pytest.raises(UsageError, match=f"gate {gate.split('=')[0]}.*--eval"):
        build(model, recipe="float16", set=(f"gates.{gate}",), progress=told)
    assert set(told.totals) == {"load"}
    assert sorted(tmp_path.iterdir()) == [model]


def test_max_drop_without_labels_fails_before_the_work(model, calib, labelled):
    told = Told()
    with pytest.raises(UsageError, match=r"gate max_drop.*label"):
        build(model, calib, max_drop=1.0, progress=told)
    assert set(told.totals) == {"load"}
    assert build(model, calib, evaluation=labelled, max_drop=100.0).gates == {"max_drop": 100}
    with pytest.raises(GateFailed, match=r"gate max_drop: measured 0, allowed -0\.5"):
        build(model, calib, evaluation=labelled, recipe="float32", max_drop=-0.5)


def test_the_gates_hold_for_the_worst_output(tmp_path, calib):
    text = """g (float[n, 32] x) => (float[n, 32] same, float[n, 32] y, float[n, 32] z) {
        same = Mul(x, c)  y = MatMul(same, w)  z = Relu(y) }"""
    model = save(tmp_path, text, c=np.full(32, 1.5), w=np.random.default_rng(0).standard_normal((32, 32)))
    result = build(model, calib)
    quality = result.quality
    assert list(quality.outputs) == ["same", "y", "z"]
    told = f"output '{quality.worst_output}': mean {quality.outputs[quality.worst_output].cosine_mean:.4f}"
    assert (told in "\n".join(summary_lines(result))) == (quality.worst_output != quality.output)
    assert quality.output != "same"
    floor = (quality.outputs["same"].cosine_worst + quality.least) / 2
    with pytest.raises(GateFailed, match="min_worst_cosine"):
        build(model, calib, set=(f"gates.min_worst_cosine={floor}",))


def test_the_input_is_not_changed(model, calib):
    before = hashlib.sha256(model.read_bytes()).hexdigest(), model.stat().st_mtime_ns
    build(model, calib)
    assert (hashlib.sha256(model.read_bytes()).hexdigest(), model.stat().st_mtime_ns) == before


def test_every_file_has_the_size_and_digest_that_the_manifest_says(tmp_path, model, calib):
    result = build(model, calib)
    files = json.loads((tmp_path / "out/manifest.json").read_bytes())["files"]
    assert set(files) == {path.name for path in (tmp_path / "out").iterdir()} - {"manifest.json"}
    for name, told in files.items():
        data = (tmp_path / "out" / name).read_bytes()
        assert told == {"bytes": len(data), "digest": f"sha256:{hashlib.sha256(data).hexdigest()}"}
    assert any(line.startswith("files") and "report.html" in line for line in summary_lines(result))
    assert result.source.digest == f"sha256:{hashlib.sha256(model.read_bytes()).hexdigest()}"


def test_the_same_input_gives_the_same_bytes(tmp_path, model, calib):
    models = []
    for name in ("one", "other"):
        build(model, calib, output=tmp_path / name)
        models.append((tmp_path / name / "model.onnx").read_bytes())
    assert models[0] == models[1]


def test_int8_without_data_is_refused_and_none_is_made_up(tmp_path, model):
    with pytest.raises(UsageError, match=r"needs calibration data.*--calib"):
        build(model)
    assert sorted(tmp_path.iterdir()) == [model]


def test_a_disk_that_is_full_leaves_an_earlier_artefact_as_it_was(tmp_path, model, calib):
    build(model, calib)
    before, around = snapshot(tmp_path / "out"), sorted(tmp_path.iterdir())
    command = [sys.executable, "-m", "qexport", "build", model, "--calib", calib, "--target", "ort-cpu"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))  # a write beyond it fails as on a full disk

    command += ["-o", tmp_path / "out", "--no-cache"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, preexec_fn=limit)
    assert ended.returncode == 9, ended.stderr
    assert "Traceback" not in ended.stderr
    assert snapshot(tmp_path / "out") == before
    assert sorted(tmp_path.iterdir()) == around


def test_an_output_that_is_a_file_is_refused_and_kept(tmp_path, model, calib):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="the output is a file"):
        build(model, calib)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_cannot_be_written_is_told(tmp_path, model, calib):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(QexportError, match="closed"):
        build(model, calib, output=closed / "out")
    assert list(closed.iterdir()) == []


@pytest.mark.parametrize("recipe", ["int8", "float32"])
@pytest.mark.parametrize("size", [1, 4])
def test_a_model_of_a_fixed_batch_size_is_built_and_judged(tmp_path, calib, labelled, size, recipe):
    result = build(save(tmp_path, LINEAR.format(n=size)), calib, evaluation=labelled, recipe=recipe)
    assert result.quality.samples == 20
    assert result.quality.cosine_worst > 0.99
    assert result.quality.task is not None
    assert result.latency.shapes == {"x": [size, 32]}
    free = build(save(tmp_path), calib, evaluation=labelled, recipe=recipe)
    assert result.quality.cosine_mean == pytest.approx(free.quality.cosine_mean, abs=1e-4)


def test_made_up_inputs_that_the_model_refuses_are_a_warning_and_not_a_failure(tmp_path):
    text = """g (float[n, s] x) => (float[n, 32] y) { h = MatMul(x, w)  k = MatMul(h, w)  y = Identity(k) }"""
    result = build(save(tmp_path, text), recipe="float32")  # the free axis must be 32 and nothing says so
    assert any("equality was not proven" in warning for warning in result.warnings)
    assert all(step.proof is None for step in result.steps)
    assert any(step.modified for step in result.steps)


@pytest.mark.parametrize(
    ("opset", "target", "settings", "failure", "told"),
    [
        (21, "tensorrt", (), ModelInvalid, "opset 21, tensorrt reads up to 20.*export it with opset 20 or lower"),
        (20, "tensorrt", ("export.opset=21",), UsageError, "opset 21 is too new for tensorrt, which reads up to 20"),
        (20, "ort-cpu", ("export.opset=25",), UsageError, "opset 25 is too new for ort-cpu, which reads up to 24"),
    ],
)
def test_an_opset_that_the_target_does_not_read_fails_before_the_work(
    tmp_path, calib, opset, target, settings, failure, told
):
    progress = Told()
    model = save(tmp_path, opset=opset)
    with pytest.raises(failure, match=told):
        build(model, calib, target=target, set=settings, progress=progress)
    assert set(progress.totals) <= {"load"}


def test_a_model_that_is_quantized_already_is_refused(tmp_path, model, calib):
    build(model, calib)
    with pytest.raises(UsageError, match="quantized already"):
        build(tmp_path / "out/model.onnx", calib, output=tmp_path / "again")
    dynamic = """g (float[n, 32] x) => (float[n, 32] y) {
        q, s, z = DynamicQuantizeLinear(x)  a = Cast <to = 1> (q)  b = MatMul(a, w)  y = Mul(b, s) }"""
    with pytest.raises(UsageError, match=r"quantized already.*DynamicQuantizeLinear"):
        build(save(tmp_path, dynamic), calib, output=tmp_path / "again")


@pytest.mark.parametrize(
    ("recipe", "settings", "total"),
    [("int8", (), 3 * 48), ("int8", ("calibrate.samples=20",), 3 * 20), ("float32", (), None)],
)
def test_progress_counts_the_samples_that_calibration_uses(model, calib, recipe, settings, total):
    told = Told()
    build(model, calib, recipe=recipe, set=settings, progress=told)
    assert told.totals["recipe"] == total
    assert told.done["recipe"] <= (total or 0)  # a pass that has nothing to do looks at no sample
    assert (told.done["recipe"] > 0) == (total is not None)


def test_the_target_keyword_goes_before_the_recipe_s_and_the_options(model, calib):
    options = BuildOptions(target="ort-cuda", output=model.parent / "out")
    assert qexport.build(model, calib=calib, target="ort-cpu", options=options).target == "ort-cpu"
    assert qexport.build(model, calib=calib, options=options).target == "ort-cuda"


@pytest.mark.rtx
@pytest.mark.parametrize("recipe", ["int8", "float16", "float32"])
def test_every_shipped_recipe_builds_an_engine_of_a_tiny_model(tmp_path, model, calib, recipe):
    pytest.importorskip("tensorrt_rtx")
    result = build(model, calib, recipe=recipe, target="tensorrt-rtx")
    assert result.engine.module == "tensorrt_rtx"
    assert result.files[PLAN].bytes == result.engine.bytes > 0
    assert (result.quantized > 0) == (recipe == "int8")
    assert result.quality.least > 0.99


@pytest.mark.rtx
@pytest.mark.slow
def test_resnet20_for_tensorrt_rtx_loses_at_most_a_point(tmp_path, samples):
    folder = samples / "resnet20"
    data = {"calib": folder / "calibration.npz", "eval": folder / "test.npz"}
    options = BuildOptions(output=tmp_path / "out")
    recipe = folder / "int8.toml"
    result = qexport.build(folder / "resnet20.onnx", recipe=recipe, **data, target="tensorrt-rtx", options=options)
    assert result.quality.samples == 1000
    assert result.quality.held_out
    assert result.quality.task.name == "top1"
    assert result.quality.task.drop <= 1
    assert result.quality.task.unchanged >= 0.99
    assert result.quality.cosine_mean > 0.99
    assert result.engine.bytes == (tmp_path / "out" / PLAN).stat().st_size
    assert result.quantized > 0


@pytest.mark.rtx
@pytest.mark.slow
def test_minilm_for_tensorrt_rtx_is_small_and_close(tmp_path, minilm, samples):
    lines = (samples / "data/stsb-test.csv").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "slice.csv").write_text("".join(lines[:65]), "utf-8")
    options = BuildOptions(output=tmp_path / "out", set=("calibrate.samples=128",))
    data = {"calib": samples / "data/stsb-calibration.csv", "eval": tmp_path / "slice.csv"}
    result = qexport.build(minilm, **data, target="tensorrt-rtx", options=options)
    assert result.engine.bytes == (tmp_path / "out" / PLAN).stat().st_size <= 35e6
    assert result.quality.output == "sentence_embedding"
    assert result.quality.held_out
    assert result.quality.cosine_mean >= 0.980
    assert result.quality.cosine_worst >= 0.90
    assert abs(result.quality.task.drop) < 2
    assert result.quantized > 20
    assert max(step.proof for step in result.steps if step.proof is not None) < 1e-5


def test_a_build_that_quantizes_nothing_says_so(model, calib):
    result = build(model, calib, set=("quantize.min_sqnr=200",))
    assert any("nothing was quantized" in warning and "SQNR" in warning for warning in result.warnings)
    assert not any("nothing was quantized" in warning for warning in build(model, calib).warnings)


def test_a_recipe_that_the_target_cannot_use_says_so(model, calib):
    result = build(model, calib, recipe="float16", target="ort-cpu")
    assert any("target ort-cpu computes in float32" in warning for warning in result.warnings)


def test_sigterm_ends_a_build_without_leaving_anything(tmp_path, model, calib):
    code = (
        "import os, signal, sys, qexport.cli, qexport.exporter.build as b;"
        "b.save_onnx = lambda *_: os.kill(os.getpid(), signal.SIGTERM);"
        f"sys.exit(qexport.cli.run(['build', {str(model)!r}, '--calib', {str(calib)!r}, '--no-cache',"
        f" '--target', 'ort-cpu', '-o', {str(tmp_path / 'out')!r}]))"
    )
    before = set(tmp_path.iterdir())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert "terminated; nothing was published" in done.stderr
    assert set(tmp_path.iterdir()) == before


def test_compact_cuts_quantizes_and_tells_of_both(tmp_path, calib):
    rng = np.random.default_rng(0)
    text = "g (float[n, 32] x) => (float[n, 32] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"
    shapes = {"w": (32, 128), "v": (128, 32)}
    model = save(tmp_path, text, **{name: rng.standard_normal(shape) for name, shape in shapes.items()})
    before = model.read_bytes()
    chosen = ("neurons.keep=0.75", "quantize.min_sqnr=0", "triage.enabled=false")
    result = build(model, calib, recipe="compact", set=chosen)
    assert model.read_bytes() == before
    (cut,) = (line for line in summary_lines(result) if line.startswith("cut"))
    assert cut.endswith("96 of 128 neurons stay; 8,192 -> 6,144 parameters (25.0% fewer)")
    assert result.quantized == 2
    assert len(result.quality.layers) == 1  # the other one makes fewer numbers than in the float model
    assert {d.reason for s in result.steps for d in s.decisions if s.name in ("heads", "channels")} == {
        "the model has no heads",
        "the model has no channels",
    }


@pytest.mark.parametrize("change", ["weights", "graph"])
def test_what_was_made_is_admitted_as_what_comes_in_is(model, calib, monkeypatch, change):
    """A pass with a bug is found out before anything is published."""

    def save_broken(made, stage, name):
        proto = ir.to_proto(made)
        if change == "graph":
            proto.graph.node[-1].input[0] = "nowhere"
        else:
            proto.graph.initializer[0].raw_data += b"\0"
        stage.write_bytes(name, proto.SerializeToString())

    monkeypatch.setattr(builder, "save_onnx", save_broken)
    with pytest.raises(ModelInvalid, match=r"nowhere|holds \d+ bytes"):
        build(model, calib, recipe="float32")
    assert not (model.parent / "out").exists()
