from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markupsafe import Markup

from qexport.exporter.report.html import svg, words
from qexport.exporter.report.html.svg import Scale, covering, covering_log

NUMBERS = st.floats(-1e12, 1e12, allow_nan=False).filter(lambda value: value == 0 or abs(value) > 1e-9)
POSITIVE = st.floats(1e-12, 1e15)


@given(st.lists(NUMBERS, min_size=2, max_size=20))
def test_a_linear_scale_is_monotone_and_holds_all_its_numbers(values):
    scale = covering(values, (300.0, 20.0))
    places = [scale.at(value) for value in sorted(values)]
    assert all(20 <= place <= 300 for place in places)
    assert places == sorted(places, reverse=True)  # y grows downwards
    assert scale.domain[0] <= min(values) + 1e-6 * (max(values) - min(values))
    assert scale.domain[1] >= max(values) - 1e-6 * (max(values) - min(values))


@given(st.lists(POSITIVE, min_size=1, max_size=20))
def test_a_logarithmic_scale_is_monotone_and_holds_all_its_numbers(values):
    scale = covering_log(values, (0.0, 500.0))
    places = [scale.at(value) for value in sorted(values)]
    assert all(0 < place < 500 for place in places)
    assert places == sorted(places)


@given(NUMBERS, st.floats(1e-6, 1e9), st.integers(1, 12))
@example(1.0, 1e-6, 10)
def test_ticks_of_a_linear_scale_are_round_evenly_spaced_and_inside(low, span, count):
    high = low + span
    if span < 1e-9 * abs(low):
        return
    ticks = Scale("linear", (low, high), (0, 100)).ticks(count)
    assert len(ticks) <= count + 1
    assert all(low <= tick <= high for tick in ticks)
    gaps = [b - a for a, b in pairwise(ticks)] or [span]
    assert max(gaps) - min(gaps) <= 1e-5 * span
    for a, b in pairwise(ticks):
        mantissa = (b - a) / 10 ** math.floor(math.log10((b - a) * (1 + 1e-5)))  # a gap has the rounding of its ends
        assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-3 or low == a or high == b


@pytest.mark.parametrize(
    ("domain", "count", "expected"),
    [
        ((0, 1), 5, (0, 0.2, 0.4, 0.6, 0.8, 1)),
        ((0, 0.3), 3, (0, 0.1, 0.2, 0.3)),
        ((-7, 13), 4, (-5, 0, 5, 10)),
        ((0, 50), 6, (0, 10, 20, 30, 40, 50)),
        ((3, 3), 5, (3,)),
    ],
)
def test_ticks_are_the_numbers_one_would_write_down(domain, count, expected):
    assert Scale("linear", domain, (0, 1)).ticks(count) == expected


@pytest.mark.parametrize(
    ("domain", "count", "expected"),
    [
        ((0.8, 12), 6, (1, 2, 5, 10)),
        ((1e8, 1e12), 9, (1e8, 1e9, 1e10, 1e11, 1e12)),
        ((1e-3, 1e6), 5, (1e-2, 1, 1e2, 1e4, 1e6)),
    ],
)
def test_logarithmic_ticks_are_powers_of_ten_or_two_and_five_between_them(domain, count, expected):
    assert Scale("log", domain, (0, 1)).ticks(count) == pytest.approx(expected)


def test_numbers_outside_the_domain_are_drawn_at_its_ends():
    scale = Scale("linear", (0, 10), (50, 250))
    assert (scale.at(-5), scale.at(5), scale.at(99)) == (50, 150, 250)
    assert Scale("log", (1, 100), (0, 2)).at(0) == 0


@pytest.mark.parametrize("values", [[], [math.nan], [3.0], [0.0, 0.0], [-2.0, -2.0]])
def test_a_scale_without_a_span_still_has_one(values):
    scale = covering(values, (0, 10))
    assert scale.domain[0] < scale.domain[1]
    assert all(math.isfinite(scale.at(v)) for v in values if math.isfinite(v))


def test_zero_is_on_the_scale_where_it_is_asked_for():
    assert covering([5, 9], (0, 1)).domain[0] == 5
    assert covering([5, 9], (0, 1), zero=True).domain[0] == 0


@given(st.text(), st.text())
def test_words_in_a_plot_are_escaped(label, title):
    marks = svg.linked(svg.text(1, 2, words.name(label), "tick"), 3, words.name(title))
    found = ET.fromstring(svg.picture((10, 10), words.name(title), [marks]))
    assert [element.tag for element in found.iter()] == ["svg", "a", "text", "title"]
    assert found[0][0].text in {words.name(label), None}
    assert found.get("aria-label") == words.name(title)


def test_every_mark_is_well_formed_and_has_its_class():
    marks = [
        svg.bar(1, 2, (3, 4), "x"),
        svg.rule((0, 0), (1, 1), "x"),
        svg.line([(0, 0), (1, 1)], "x"),
        svg.step([0, 1, 2], [5, 6], 9, "x"),
        *(svg.dot(1, 2, "x", shape) for shape in ("circle", "square", "diamond", "cross")),
        svg.text(0, 0, "words", "x"),
    ]
    for mark in marks:
        assert isinstance(mark, Markup)
        assert ET.fromstring(mark).get("class") == "x"
    five = ET.fromstring(svg.picture((9, 9), "box", [svg.box(5, 4, [9, 7, 5, 3, 1], "x")]))
    assert [element.tag for element in five] == ["line", "rect", "line"]
    assert (five[1].get("y"), five[1].get("height")) == ("3", "4")


def test_the_area_of_a_histogram_goes_along_every_bin_and_back_to_the_floor():
    path = ET.fromstring(svg.step([0, 10, 20], [5, 8], 30, "hist")).get("d")
    assert path == "M0 30L0 5L10 5L10 8L20 8L20 30Z"


def test_a_mark_without_a_row_is_no_link():
    assert "href" not in svg.linked(svg.dot(1, 1, "a"), None, "gone")
    assert 'href="#n7"' in svg.linked(svg.dot(1, 1, "a"), 7, "here")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0213, "0.0213"),
        (1234.5, "1,234"),
        (12.345, "12.3"),
        (0.00001234, "1.2e\u22125"),
        (3.2e9, "3.2e9"),
        (-0.5, "\u22120.500"),
        (0, "0"),
        (-0.0, "0"),
        (None, ""),
        (math.nan, ""),
        (math.inf, ""),
    ],
)
def test_numbers_have_three_digits(value, expected):
    assert words.number(value) == expected


def test_what_rounds_to_nothing_has_no_sign():
    assert words.fixed(-0.0004, 2) == "0.00"
    assert words.fixed(-1.5, 1) == "\u22121.5"


@pytest.mark.parametrize(
    ("value", "expected"), [(0.5, "50 %"), (0.0012, "0.12 %"), (0, "0 %"), (1, "100 %"), (2e-7, "<0.001 %"), (None, "")]
)
def test_small_shares_keep_two_digits(value, expected):
    assert words.percent(value) == expected


def test_rates_have_a_prefix():
    assert [words.si(v) for v in (6e10, 1.25e12, 999.9e6, 12.0)] == ["60 G", "1.25 T", "1 G", "12 "]


def test_long_names_keep_both_ends():
    assert words.middle("/encoder/layer.11/attention/self/query/MatMul", 20) == "/encode…query/MatMul"
    assert words.middle("short", 20) == "short"
    assert len(words.middle("n" * 1_000_000, 30)) == 30


@given(st.text(max_size=300), st.integers(4, 60))
def test_a_name_is_one_line_of_printable_characters(text, limit):
    found = words.name(text, limit)
    assert "\n" not in found
    assert all(c.isprintable() and not "\u202a" <= c <= "\u2069" for c in found)
    assert len(words.middle(text, limit)) <= limit
