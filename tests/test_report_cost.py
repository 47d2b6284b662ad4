"""What the report costs in a build of a real model; slow, so that it runs by itself."""

from __future__ import annotations

import time

import pytest

import qexport
from qexport.exporter import build as road
from qexport.exporter.options import BuildOptions
from qexport.exporter.outcome import artefact
from qexport.exporter.report import roofline
from qexport.exporter.report.files import load_report
from qexport.safe_io import Cache

SHARE = 0.03  # of the processor time of the whole build
SECONDS = 1.5


@pytest.mark.slow
def test_the_report_is_a_small_part_of_a_build_and_holds_every_panel(tmp_path, minilm, samples, monkeypatch):
    roofline.peaks(Cache(tmp_path / "cache"))  # once for each machine
    spent = []

    def timed(function):
        def run(*arguments):
            began = time.process_time()
            try:
                return function(*arguments)
            finally:
                spent.append(time.process_time() - began)

        return run

    monkeypatch.setattr(road, "gather", timed(road.gather))
    for name in ("write_report", "_write_pages"):
        monkeypatch.setattr(artefact, name, timed(getattr(artefact, name)))
    lines = (samples / "data/stsb-test.csv").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "slice.csv").write_text("".join(lines[:513]), "utf-8")
    began = time.process_time()
    result = qexport.build(
        minilm,
        calib=samples / "data/stsb-calibration.csv",
        eval=tmp_path / "slice.csv",
        target="ort-cpu",
        options=BuildOptions(output=tmp_path / "out", cache=tmp_path / "cache"),
    )
    whole = time.process_time() - began
    assert len(spent) == 3
    assert sum(spent) <= SECONDS
    assert sum(spent) <= SHARE * whole
    read, report = load_report(tmp_path / "out")
    assert read == result
    assert report.missing == {}
    assert (tmp_path / "out/report.html").stat().st_size <= 6_000_000
    layers = [row for row in report.nodes if row.state == "quantized"]
    assert len(layers) == result.quantized
    assert all(row.sqnr is not None for row in layers)
    assert all(row.scale and row.weight_scale and row.error for row in layers if row.op != "Gather")
    assert report.samples[0].text
