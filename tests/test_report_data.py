"""What the report of a whole build says, against the files and the data."""

from __future__ import annotations

import functools
import hashlib
import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qexport
from qexport.exporter.options import BuildOptions
from qexport.exporter.precision import backoff
from qexport.exporter.report import roofline
from qexport.exporter.report.files import load_report
from qexport.passes.numbers.notes import ERROR_KEY
from qexport.runtime.accounting.machine import Machine, fingerprint

MODEL = """<ir_version: 10, opset_import: ["" : 20]>
g (float[n, 32] x) => (float[n, 32] y) { h = MatMul(x, w)  c = Add(h, b)  t = Tanh(c)  k = MatMul(t, v)
    y = Softmax(k) }"""
PLAIN = """[[step]]
pass = "calibrate"
method = "minmax"
[[step]]
pass = "quantize"
[[step]]
pass = "integer-products"
[export]
engine = false
never_worse = false
"""
TEXTS = {
    "plain": PLAIN,
    "kept": PLAIN.replace('"quantize"', '"quantize"\nkeep = ["/layer/k"]'),
    "timed": PLAIN.replace("worse = false", "worse = true"),
}
X = np.random.default_rng(1).standard_normal((48, 32)).astype(np.float32)


def weights():
    rng = np.random.default_rng(0)
    w, v = (rng.standard_normal((32, 32)).astype(np.float32) * rng.uniform(0.2, 2, 32).astype(np.float32) for _ in "wv")
    return {"w": w, "v": v, "b": rng.standard_normal(32).astype(np.float32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of two products, and calibration data."""
    folder = tmp_path_factory.mktemp("model")
    proto = onnx.parser.parse_model(MODEL)
    for name, array in weights().items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for node in proto.graph.node:
        node.name = f"/layer/{node.output[0]}"
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    np.savez(folder / "calib.npz", x=X)
    return folder


@pytest.fixture(scope="module")
def build(folder):
    """Build, once for the same question; returns the folder."""

    @functools.cache
    def run(recipe="int8", target="ort-cpu", *settings):
        if recipe in TEXTS:
            path = folder / f"{recipe}.toml"
            path.write_text(TEXTS[recipe])
            recipe = path
        else:
            settings = ("export.never_worse=false", "export.engine=false", *settings)
        out = folder / f"out{len(list(folder.iterdir()))}"
        options = BuildOptions(output=out, set=settings)
        qexport.build(folder / "model.onnx", recipe=recipe, calib=folder / "calib.npz", target=target, options=options)
        return out

    return run


def rows_of(report):
    return {row.name: row for row in report.nodes}


@pytest.mark.parametrize("target", ["ort-cpu", "ort-cuda", "tensorrt", "tensorrt-rtx"])
def test_scales_are_those_of_the_extremes_of_inputs_and_weights(build, target):
    _, report = load_report(build("plain", target))
    row, w = rows_of(report)["/layer/h"], weights()["w"]
    affine = target == "ort-cpu"
    reach = X.max() - X.min() if affine else np.abs(X).max()
    channels = np.abs(w).max(axis=0) / 127
    close = pytest.approx if affine else lambda number: pytest.approx(number, rel=2e-3)  # float16 scales are rounded up
    assert row.state == "quantized"
    assert (row.activation, row.weight) == ("uint8" if affine else "int8", "int8")
    assert row.scale == close(float(reach) / (255 if affine else 127))
    assert row.zero_point == (round(-X.min() / (reach / 255)) if affine else 0)
    assert row.weight_scale == (close(float(channels.min())), close(float(channels.max())))


@pytest.mark.parametrize(
    ("recipe", "target", "activation", "weight"),
    [
        ("int8-weights", "ort-cpu", "float32", "int8"),
        ("int4-weights", "ort-cpu", "float32", "int4"),
        ("int4-weights", "tensorrt-rtx", "float16", "int4"),
        ("nf4-weights", "ort-cpu", "float32", "nf4"),
        ("int8-dynamic", "ort-cpu", "uint8", "int8"),
        ("int8-qlinear", "ort-cpu", "uint8", "int8"),
        ("fp8", "tensorrt-rtx", "float8e4m3fn", "float8e4m3fn"),
    ],
)
def test_every_form_of_a_quantized_product_is_one_row_with_its_types(build, recipe, target, activation, weight):
    result, report = load_report(build(recipe, target))
    row = rows_of(report)["/layer/k"]
    assert (row.state, row.activation, row.weight) == ("quantized", activation, weight)
    assert sum(row.state == "quantized" for row in report.nodes) == result.quantized > 0
    assert not [row.name for row in report.nodes if row.op in ("QuantizeLinear", "DequantizeLinear")]
    if weight != "nf4" and recipe != "int8-dynamic":  # these are stored in other nodes
        low, high = row.weight_scale
        assert 0 < low <= high


@pytest.mark.parametrize("recipe", ["int8", "int8-weights", "int4-weights", "int8-dynamic", "int8-qlinear", "float32"])
def test_the_bytes_of_all_rows_are_those_of_the_files_initializers(build, recipe):
    out = build(recipe)
    _, report = load_report(out)
    stored = onnx.load(out / "model.onnx").graph.initializer
    held = sum(len(t.raw_data) or onnx.numpy_helper.to_array(t).nbytes for t in stored)
    assert sum(row.bytes_after for row in report.nodes) == held > 0


def test_every_row_says_what_was_decided_about_it_and_why(build):
    _, report = load_report(build("plain"))
    rows = rows_of(report)
    assert {"quantize", "integer-products"} <= {choice.step for choice in rows["/layer/h"].why}
    assert "/layer/c" not in rows  # its sum went into the product, and nothing was decided about it
    assert rows["/layer/t"].state == rows["/layer/y"].state == "float"
    assert rows["/layer/h"].block == "/layer"


def test_what_is_kept_by_name_is_kept(build):
    rows = rows_of(load_report(build("kept"))[1])
    assert rows["/layer/k"].state == "kept"
    assert (rows["/layer/k"].activation, rows["/layer/k"].weight) == ("float32", "float32")


def test_on_a_processor_every_quantized_layer_has_a_cumulative_sqnr(build):
    result, report = load_report(build("plain"))
    quantized = [row for row in report.nodes if row.state == "quantized"]
    assert {layer.node for layer in result.quality.layers} == {row.name for row in quantized}
    assert all(row.sqnr is not None and row.sqnr_own is not None for row in quantized)


def test_activations_have_the_values_of_the_data_and_the_chosen_range_first(build):
    _, report = load_report(build("plain"))
    row = next(row for row in report.activations if row.value == "x")
    assert (row.low, row.high) == (pytest.approx(float(X.min())), pytest.approx(float(X.max())))
    assert (row.total, sum(row.counts) + row.zeros) == (X.size, X.size)
    assert [c.method for c in row.candidates] == ["chosen", "minmax", "percentile", "entropy", "mse"]
    assert (row.candidates[0].low, row.candidates[0].high) == (row.low, row.high)
    assert row.candidates[0].clipped == 0
    assert row.candidates[4].noise <= row.candidates[1].noise  # the least squares are no worse than the extremes
    for candidate in row.candidates:
        outside = np.mean((candidate.low > X) | (candidate.high < X))
        assert candidate.clipped == pytest.approx(outside, abs=0.02)


def test_a_build_that_was_profiled_has_times_and_a_roofline(build, monkeypatch):
    monkeypatch.setattr(roofline, "_measured", lambda: Machine(fingerprint(), 1, ((1, 2.0),), 3.0, 4.0))
    monkeypatch.setattr(backoff, "is_slower", lambda latency: False)  # whether it is, on so small a model, is chance
    monkeypatch.setattr(backoff, "SHARE", 1e9)
    _, report = load_report(build("timed"))
    assert report.roofline is not None
    assert {dot.model for dot in report.roofline.dots} == {"float", "result"}
    assert {dot.node for dot in report.roofline.dots} <= {row.name for row in report.nodes}
    assert all(dot.intensity > 0 and dot.rate > 0 for dot in report.roofline.dots)
    timed = [row for row in report.nodes if row.ms_before and row.ms_after]
    assert {"/layer/h", "/layer/k"} <= {row.name for row in timed}


def test_the_page_and_the_card_lie_beside_the_model_with_their_digests(build):
    out = build("plain")
    files = json.loads((out / "manifest.json").read_bytes())["files"]
    for name in ("report.html", "README.md", "report.json", "report-nodes.parquet"):
        assert files[name]["digest"] == f"sha256:{hashlib.sha256((out / name).read_bytes()).hexdigest()}"
    assert "/layer/h" in (out / "report.html").read_text("utf-8")
    assert (out / "README.md").read_text("utf-8").startswith("---\n")


def test_panels_without_data_say_why(build):
    _, report = load_report(build("int8-weights", "tensorrt-rtx"))
    assert report.roofline is None
    assert "did not run here" in report.missing["roofline"]
    assert "sensitivity" in report.missing["tornado"]
    assert not report.activations
    assert "activations" in report.missing


def test_the_worst_sample_of_a_build_is_shown_unless_the_recipe_says_no(build):
    result, report = load_report(build("int8"))
    assert report.samples[0].index == result.quality.worst_sample
    assert report.samples[0].cosine == pytest.approx(result.quality.cosine_worst)
    assert (report.deciles[0], len(report.deciles)) == (pytest.approx(result.quality.cosine_worst), 11)
    assert list(report.deciles) == sorted(report.deciles)
    _, report = load_report(build("int8", "ort-cpu", "data.report_samples=false"))
    assert report.samples == ()
    assert "report_samples" in report.missing["samples"]


def test_triage_leaves_the_errors_of_layers_for_the_tornado(build):
    out = build("int8", "tensorrt-rtx")
    rows = rows_of(load_report(out)[1])
    assert rows["/layer/h"].error > 0
    assert rows["/layer/k"].error > 0
    kept = {d.node for step in load_report(out)[0].steps if step.name == "triage" for d in step.decisions}
    assert {name for name, row in rows.items() if row.state == "kept"} == kept  # what stays in float32 is none of them
    assert ERROR_KEY not in ir.from_proto(onnx.load(out / "model.onnx")).graph[0].meta
