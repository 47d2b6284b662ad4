from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_trees import make_activation, make_report, make_result, make_weights, replace_record

from qexport.exporter.report.html import plots
from qexport.exporter.report.html.plots_layers import plot_boxes, plot_histogram, plot_sqnr, plot_tornado, stage
from qexport.exporter.report.html.shown import FULL, choose
from qexport.exporter.report.values import Candidate, Dot, Point, Roofline


def drawn(markup, css):
    """Elements of a class in a plot, in the order in which they are drawn; its legend is left out."""
    svg = ET.fromstring(re.search(r'<svg class="(?:plot|spark)".*</svg>', markup, re.DOTALL)[0])
    return [element for element in svg.iter() if element.get("class") == css]


def corners(path):
    """Places of a path that is made of lines."""
    return [tuple(map(float, pair.split())) for pair in path.get("d").removesuffix("Z")[1:].split("L")]


def attribute(elements, name):
    return [float(element.get(name)) for element in elements]


def straight(xs, ys):
    """Whether the second numbers are a linear function of the first."""
    return np.allclose(ys, np.polyval(np.polyfit(xs, ys, 1), xs), atol=0.11)


def ladder(count):
    """A report of ``count`` quantized layers whose noise and error are known."""
    report = make_report()
    nodes = tuple(
        replace(report.nodes[0], name=f"/layer.{i}/MatMul", sqnr_own=40.0 - i, sqnr=38.0 - 2 * i, error=0.5**i)
        for i in range(count)
    )
    return replace(report, nodes=nodes)


def test_noise_is_drawn_in_the_order_of_the_graph_and_to_scale():
    plot = plot_sqnr(choose(ladder(8), FULL))
    alone = drawn(plot, "a")
    assert straight(range(8), attribute(alone, "cx"))
    assert straight([40.0 - i for i in range(8)], attribute(alone, "cy"))
    assert attribute(alone, "cy") == sorted(attribute(alone, "cy"))  # less SQNR is further down
    trace = corners(drawn(plot, "trace-b")[0])
    assert [x for x, _ in trace] == attribute(alone, "cx")
    both = [40.0 - i for i in range(8)] + [38.0 - 2 * i for i in range(8)]
    assert straight(both, attribute(alone, "cy") + [y for _, y in trace])


def test_what_was_left_in_float_has_a_place_and_no_number():
    report = make_report()
    kept = replace(report.nodes[1], sqnr_own=None, sqnr=None)
    plot = plot_sqnr(choose(replace(report, nodes=(report.nodes[0], kept)), FULL))
    assert len(drawn(plot, "hollow")) == 1
    assert len(drawn(plot, "a")) == 1


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("encoder.layer.3.attention.self.query/MatMul", "layer.3"),
        ("/model/layers.11/mlp/up_proj/MatMul", "layers.11"),
        ("layer1.0.conv1/Conv", "layer1.0"),
        ("fc/Gemm", "fc"),
        ("node_7", "node_7"),
        ("", ""),
    ],
)
def test_the_part_of_a_model_is_told_by_the_first_number_in_a_name(name, label):
    assert stage(name)[1] == label


def test_bars_of_the_tornado_are_as_long_as_the_errors_and_sorted():
    plot = plot_tornado(choose(ladder(30), FULL))
    widths = attribute(drawn(plot, "a"), "width")
    assert len(widths) == 24
    assert widths[0] / widths[3] == pytest.approx(8, rel=0.01)
    assert widths == sorted(widths, reverse=True)
    whole = 2 - 0.5**29
    told = [text.text for text in drawn(plot, "tick")]
    assert told[0].endswith(f"{100 / whole:.0f} %")
    assert told[-1].startswith("6 more: ")


def test_the_height_of_a_histogram_is_logarithmic():
    activation = replace(make_activation("x"), edges=(0.0, 1.0, 2.0, 3.0), counts=(0, 9, 99), candidates=())
    tops = [y for _, y in corners(drawn(plot_histogram(activation), "hist")[0])]
    floor, none, tenth, full = tops[0], tops[1], tops[3], tops[5]
    assert none == floor
    assert (floor - tenth) / (floor - full) == pytest.approx(math.log(10) / math.log(100), abs=0.01)


def test_what_the_chosen_range_clips_is_marked_and_nothing_else():
    activation = make_activation("x")  # bins of 0.1 from -2 to 6; chosen is -1.8 to 3.6
    plot = plot_histogram(activation)
    low, high = sorted({float(line.get("x1")) for line in drawn(plot, "chosen") if line.get("y2") == "100"})
    left, right = (corners(path) for path in drawn(plot, "cut"))
    bin_width = (high - low) / 54
    assert max(x for x, _ in left) <= low + 0.11
    assert min(x for x, _ in right) >= high - 0.11
    assert max(x for x, _ in left) - min(x for x, _ in left) == pytest.approx(2 * bin_width, abs=0.2)
    assert max(x for x, _ in right) - min(x for x, _ in right) == pytest.approx(24 * bin_width, abs=0.2)


def test_every_method_has_its_range_on_the_scale_of_the_histogram():
    activation = make_activation("x")
    plot = plot_histogram(activation)
    lanes = [line for line in drawn(plot, "lane") if line.get("y1") == line.get("y2")]
    ranges = [(c.low, c.high) for c in activation.candidates[1:]]
    places = [(float(line.get("x1")), float(line.get("x2"))) for line in lanes]
    assert straight([end for pair in ranges for end in pair], [x for pair in places for x in pair])


def test_a_range_wider_than_the_values_fits_as_well():
    wide = Candidate("chosen", -50.0, 50.0, 0.0, 0.1)
    plot = plot_histogram(replace(make_activation("x"), candidates=(wide,)))
    assert drawn(plot, "cut") == []
    assert min(attribute(drawn(plot, "chosen"), "x1")) >= 0


def test_boxes_are_quartiles_with_whiskers_to_scale():
    weights = make_weights("x")
    plot = plot_boxes(weights, 32)
    values, places = [], []
    for channel, whisker, box in zip(weights.worst, drawn(plot, "whisker"), drawn(plot, "box"), strict=True):
        top, height = float(box.get("y")), float(box.get("height"))
        values += [channel.low, channel.high, channel.q75, channel.q25]
        places += [float(whisker.get("y1")), float(whisker.get("y2")), top, top + height]
    assert straight(values, places)
    assert len(drawn(plot_boxes(weights, 2), "box")) == 2


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(-5, 40)), min_size=2, max_size=12))
def test_no_measured_point_lies_below_the_front_and_estimates_do_not_move_it(places):
    def point(size, loss, measured):
        return Point("p", 0, float(loss), "points", size * 10**6, None, None, measured, True, False, False)

    points = [point(size, loss, True) for size, loss in places]
    plot = plots.plot_pareto([*points, point(25, -20, False)], "size", None)
    front = corners(drawn(plot, "front")[0])
    marks = [(float(c.get("cx")), float(c.get("cy"))) for c in drawn(plot, "a")]
    assert len(marks) == len(points)
    for x, y in marks:
        under = [level for place, level in front if place <= x + 0.11]
        assert under
        assert y <= max(under) + 0.11  # higher on the page is a larger loss
    assert {round(y, 1) for _, y in front} <= {round(y, 1) for _, y in marks}


def test_the_published_point_has_a_ring_and_its_name():
    plot = plots.plot_pareto(make_report().points, "latency", 1.0)
    ring = drawn(plot, "ring")
    assert len(ring) == 1
    assert [text.text for text in drawn(plot, "name")] == ["result"]
    assert len(drawn(plot, "stroke-b")) == 1  # outside the gates
    assert [text.text for text in drawn(plot, "tick") if "gate" in text.text] == ["gate 1"]


def test_one_point_is_no_trade_off():
    assert plots.plot_pareto(make_report().points[:1], "size", None) == ""


def test_operators_stand_on_the_roofline_by_their_logarithms():
    dots = tuple(Dot(f"n{i}", "result", 2.0**i, 1e9 * 3.0**i, 1.0 + i) for i in range(6))
    roof = Roofline("machine", 1, 6e11, 2.4e12, 1e10, dots)
    plot = plots.plot_roofline(roof, {})
    found = sorted((float(c.get("cx")), float(c.get("cy")), float(c.get("r"))) for c in drawn(plot, "a see"))
    assert straight([math.log(d.intensity) for d in dots], [x for x, _, _ in found])
    assert straight([math.log(d.rate) for d in dots], [y for _, y, _ in found])
    assert [r for _, _, r in found] == sorted(r for _, _, r in found)  # more time is larger
    slope, flat = (corners(path) for path in sorted(drawn(plot, "roof"), key=lambda p: corners(p)[0][0]))
    per_x = (found[-1][0] - found[0][0]) / math.log(32)
    assert (flat[0][0] - found[0][0]) / per_x == pytest.approx(math.log(6e11 / 1e10), abs=0.01)  # the ridge
    assert slope[1][1] < flat[0][1]  # goes on to the roof of 8 bits


def test_the_spark_of_speed_has_its_interval_on_one_scale_with_float():
    latency = replace_record(make_result().latency, speedup=2.0, speedup_low=1.5, speedup_high=2.5)
    plot = plots.spark_speed(latency)
    even, low_high, middle = drawn(plot, "guide")[0], drawn(plot, "trace-a")[0], drawn(plot, "a")[0]
    places = [float(even.get("x1")), float(low_high.get("x1")), float(middle.get("cx")), float(low_high.get("x2"))]
    assert straight([1.0, 1.5, 2.0, 2.5], places)


def test_the_spark_of_size_has_bars_as_long_as_the_sizes():
    plot = plots.spark_size(100, 25)
    assert attribute(drawn(plot, "quiet") + drawn(plot, "a"), "width") == [240, 60]
