"""The numbers of the page against those of the report that it shows."""

from __future__ import annotations

import re
from html import unescape

import pytest
from report_trees import tiny

from qexport.exporter.report.html.page import render
from qexport.exporter.report.html.plots import COSTS, spark_size, spark_speed
from qexport.exporter.report.html.words import number, percent

COLUMNS = {
    "scale": "scale",
    "zero": "zero_point",
    "SQNR alone": "sqnr_own",
    "SQNR": "sqnr",
    "error": "error",
    "ms float": "ms_before",
    "ms result": "ms_after",
    "bytes float": "bytes_before",
    "bytes result": "bytes_after",
}
"""Heads of the table to what they are of a node."""


@pytest.fixture(scope="module")
def page():
    return render(*tiny())


def words(page, name):
    """The words of a section or of the story, without elements."""
    found = re.search(rf'<(section|header)[^>]* id="{name}".*?</\1>|<section id="{name}".*?</section>', page, re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", found[0])).split())


def test_every_cell_of_the_table_has_the_number_of_its_node(page):
    nodes = tiny()[1].nodes
    heads = re.findall(r'<th class="n" scope="col"><button[^>]*>(.*?)</button>', page)
    assert heads == ["#", *COLUMNS]
    rows = re.findall(r'<tr id="n(\d+)"(.*?)</tr>', page, re.DOTALL)
    assert len(rows) == len(nodes)
    for place, row in rows:
        told = [float(value) if value else None for value in re.findall(r'<td class="n" data-v="([^"]*)"', row)]
        wanted = [getattr(nodes[int(place)], field) or None for field in COLUMNS.values()]
        assert told == [float(place), *wanted]


def test_the_story_tells_what_was_before_what_is(page):
    story = words(page, "story")
    for told in ("82.03 → 81.71", "90.9 MB → 24 MB", "10.0 ms → 5.00 ms"):
        assert told in story


def test_shares_in_plots_are_those_of_the_report(page):
    report = tiny()[1]
    errors = [node.error for node in report.nodes if node.error]
    for error in errors:
        assert f"{number(error, 2)} · {percent(error / sum(errors))}" in words(page, "layers")
    for candidate in report.activations[0].candidates:
        told = f"{candidate.method} {percent(candidate.clipped)} {number(candidate.noise, 2)}"
        assert told in words(page, "activations")


def test_strokes_are_as_long_as_their_numbers():
    latency = tiny()[0].latency
    widths = re.findall(r'width="([\d.]+)" height="8"', spark_size(200, 50))
    assert [float(width) for width in widths] == [240, 60]
    drawn = spark_speed(latency)
    low, high = (float(re.search(rf'<line class="trace-a"[^>]* {end}="([\d.]+)"', drawn)[1]) for end in ("x1", "x2"))
    at = float(re.search(r'cx="([\d.]+)"', drawn)[1])
    share = (latency.speedup - latency.speedup_low) / (latency.speedup_high - latency.speedup_low)
    assert (at - low) / (high - low) == pytest.approx(share, abs=0.02)


def test_points_are_drawn_at_their_megabytes_and_milliseconds():
    point = tiny()[1].points[0]
    assert {cost: value(point) for cost, (value, _) in COSTS.items()} == {
        "size": point.bytes / 1e6,
        "latency": point.ms,
    }
