"""The report of a real model; slow, so that it runs by itself."""

from __future__ import annotations

import pytest

import qexport
from qexport.exporter.options import BuildOptions
from qexport.exporter.report.files import load_report


@pytest.mark.slow
def test_the_report_of_a_real_model_is_small_and_holds_every_panel(tmp_path, minilm, samples):
    lines = (samples / "data/stsb-test.csv").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "slice.csv").write_text("".join(lines[:513]), "utf-8")
    result = qexport.build(
        minilm,
        calib=samples / "data/stsb-calibration.csv",
        eval=tmp_path / "slice.csv",
        target="ort-cpu",
        options=BuildOptions(output=tmp_path / "out", cache=tmp_path / "cache"),
    )
    read, report = load_report(tmp_path / "out")
    assert read == result
    assert report.missing == {}
    assert (tmp_path / "out/report.html").stat().st_size <= 6_000_000
    layers = [row for row in report.nodes if row.state == "quantized"]
    assert len(layers) == result.quantized
    assert all(row.sqnr is not None for row in layers)
    assert all(row.scale and row.weight_scale and row.error for row in layers if row.op != "Gather")
    assert report.samples[0].text
