"""The report of a real model; slow, so that it runs by itself."""

from __future__ import annotations

import pytest

from qexport.exporter.report.files import load_report


@pytest.mark.slow
def test_the_report_of_a_real_model_is_small_and_holds_every_panel(minilm_build):
    folder, result = minilm_build
    read, report = load_report(folder)
    assert read == result
    assert report.missing == {}
    assert (folder / "report.html").stat().st_size <= 6_000_000
    layers = [row for row in report.nodes if row.state == "quantized"]
    assert len(layers) == result.quantized
    assert all(row.sqnr is not None for row in layers)
    assert all(row.scale and row.weight_scale and row.error for row in layers if row.op != "Gather")
    assert report.samples[0].text
