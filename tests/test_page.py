from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from report_trees import hostile, large, replace_record, tiny

from qexport.exporter.report.html.page import LIMIT, render
from qexport.exporter.report.html.shown import Caps, choose
from qexport.exporter.report.values import PANELS, Report

FOLDER = files("qexport.exporter.report.html")
VOID = {"meta", "link", "input", "img", "br"}


class Page(HTMLParser):
    """All that a page is made of: elements with their attributes, texts, and whether every element ends."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.open = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag, css=None):
        return [a for t, a in self.elements if t == tag and (css is None or css in (a.get("class") or "").split())]

    def text(self):
        return " ".join(" ".join(text for tag, text in self.texts if tag not in {"style", "script"}).split())

    def shape(self):
        return {(tag, name) for tag, attributes in self.elements for name in ("", *attributes)}


@pytest.fixture(scope="module")
def page():
    return render(*tiny())


@pytest.fixture(scope="module")
def parsed(page):
    return Page(page)


def section(page, name):
    """The text of the page between the start of a section and its end."""
    return re.search(rf'<section id="{name}".*?</section>', page, re.DOTALL)[0]


def test_the_page_is_well_formed_and_its_ids_are_there_once(parsed):
    assert parsed.open == []
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_every_link_leads_to_something_on_the_page(parsed):
    ids = {a["id"] for _, a in parsed.elements if "id" in a}
    links = [a["href"] for a in parsed.all("a")]
    assert links
    assert {link for link in links if link.removeprefix("#") not in ids} == set()
    assert {a["data-node"] for _, a in parsed.elements if "data-node" in a} <= {i[1:] for i in ids if i[0] == "n"}


def test_the_story_tells_verdict_numbers_and_warnings_first(page, parsed):
    story = page[page.index('id="story"') : page.index("<section")]
    for told in (
        "As good as the float model",
        "82.03",
        "81.71",
        "90.9 MB",
        "24 MB",
        "10.0 ms",
        "5.00 ms",
        "cosine of 0.931",
    ):
        assert told in story, told
    assert "gate ≤ 1" in story
    assert len(parsed.all("div", "tile")) == 4


@pytest.mark.parametrize(
    ("name", "marks"),
    [
        ("layers", {"a": 5, "b": 5, "trace-b": 2}),  # marks, bars and the legend
        ("pareto", {"ring": 3, "front": 3}),
        ("roofline", {"roof": 3, "roof-8": 2, "see": 2}),
        ("activations", {"hist": 1, "cut": 2, "chosen": 5, "lane": 12}),
        ("weights", {"box": 4, "median": 4, "whisker": 4}),
        ("samples", {"trace-a": 1}),
    ],
)
def test_every_panel_has_its_marks(page, name, marks):
    found = Page(section(page, name))
    counted = [css for _, a in found.elements for css in (a.get("class") or "").split()]
    assert {css: counted.count(css) for css in marks} == marks


def test_marks_of_layers_and_of_the_roofline_are_links_to_their_rows(page):
    for name, count in (("layers", 7), ("roofline", 2)):
        links = [a for t, a in Page(section(page, name)).elements if t == "a"]
        assert len(links) == count
        assert {a["href"] for a in links} <= {"#n0", "#n1"}
        assert all(a["data-node"] == a["href"][2:] for a in links)


def test_a_layer_that_was_left_in_float_is_marked_so_although_it_was_rated(page):
    told = [text for tag, text in Page(section(page, "layers")).texts if tag == "title"]
    kept = [text for text in told if "output/MatMul" in text]
    assert "/encoder/layer.0/output/MatMul: kept" in kept
    assert any("dB alone, were it in few bits" in text for text in kept)
    assert not any("were it" in text for text in told if "query" in text)


def test_a_legend_tells_what_is_drawn_and_where_numbers_come_from():
    result, report = tiny()
    nodes = tuple(replace(node, sqnr_own=None, error=None) for node in report.nodes if node.state != "kept")
    text = Page(section(render(result, replace(report, nodes=nodes)), "layers")).text()
    assert "with the noise of all layers before it" in text
    assert [words for words in ("this layer alone", "left in float") if words in text] == []
    assert "with all before it on 16 evaluation samples" in text
    short = replace_record(result, quality=replace_record(result.quality, samples=1))
    assert "with all before it on 1 evaluation sample." in Page(section(render(short, report), "layers")).text()


def test_cosines_that_are_all_alike_have_an_axis_that_ends_at_one():
    result, report = tiny()
    text = Page(section(render(result, replace(report, deciles=(1.0,) * 11)), "samples"))
    ticks = [float(told) for tag, told in text.texts if tag == "text" and re.fullmatch(r"[01]\.?\d*", told)]
    assert 0.999 in ticks
    assert [tick for tick in ticks if 1 < tick < 10] == []


def test_what_was_timed_and_not_judged_has_neither_loss_nor_gates():
    result, report = tiny()
    slow = replace(report.points[1], label="slow", loss=None, unit="1 - cosine", chosen=False)
    found = render(result, replace(report, points=(report.points[0], slow)))
    row = next(row for row in re.findall(r"<tr.*?</tr>", section(found, "pareto")) if "slow" in row)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
    assert cells[1].startswith("timed, not judged")
    assert [cells[3], cells[4], cells[-1]] == ["", "", ""]


def test_samples_that_are_not_there_are_not_warned_of(page):
    result, report = tiny()
    bare = render(result, replace(report, samples=(), missing={"samples": "left out by the recipe"}))
    assert "mind that before sharing" in section(page, "samples")
    assert "mind that before sharing" not in section(bare, "samples")
    assert "left out by the recipe" in section(bare, "samples")


def test_equal_outputs_are_not_told_in_decibel(parsed):
    result, report = tiny()
    equal = replace_record(result, quality=replace_record(result.quality, max_error=0.0, sqnr=200.0, samples=1))
    assert "SQNR 15.2 dB, 2,758 held-out samples" in parsed.text()
    text = Page(render(equal, report)).text()
    assert "no difference, 1 held-out sample " in text
    assert "200.0 dB" not in text


def test_one_is_no_plural():
    result, report = tiny()
    source = replace_record(result.source, nodes=1, parameters=1)
    report = replace(report, nodes=report.nodes[:1], weights=(replace(report.weights[0], channels=1),))
    text = Page(render(replace_record(result, source=source), report)).text()
    assert re.findall(r"(?<![\d.,])1 (?:nodes|parameters|channels|threads|samples|values)\b", text) == []


def test_every_heading_of_a_table_says_what_it_heads(parsed):
    assert [a for a in parsed.all("th") if a.get("scope") != "col"] == []


def test_the_table_has_a_row_for_each_node_with_numbers_and_reason(page, parsed):
    rows = [a for a in parsed.all("tr") if "data-node" in a]
    assert [a["id"] for a in rows] == ["n0", "n1", "n2", "n3"]
    assert [a["data-state"] for a in rows] == ["quantized", "kept", "float", "gone"]
    text = " ".join(Page(section(page, "nodes")).text().split())
    for told in (
        "uint8 × int8",
        "0.0213",
        "128",
        "34.5",
        "28.2",
        "149 kB",
        "its error outweighs others: 41% of the sum",
    ):
        assert told in text, told
    assert {a["data-v"] for a in parsed.all("td", "n") if "data-v" in a} >= {"0.0213", "34.5", "148992", ""}


def test_a_column_without_any_number_is_left_out(page):
    assert "SQNR alone" in section(page, "nodes")
    result, report = tiny()
    bare = replace(report, nodes=tuple(replace(node, sqnr_own=None) for node in report.nodes))
    assert "SQNR alone" not in section(render(result, bare), "nodes")


def test_the_same_values_give_the_same_bytes(page):
    assert render(*tiny()) == page


def test_hostile_names_add_no_element_and_no_attribute(parsed):
    found = Page(render(*hostile()))
    assert found.shape() - parsed.shape() == set()
    assert found.open == []
    assert len([t for t, _ in found.elements if t == "script"]) == 1
    assert len([t for t, _ in found.elements if t == "style"]) == 1
    assert "<script>window.hacked = 1</script>" in found.text()  # as words


def test_hostile_names_are_printable_and_short():
    page = render(*hostile())
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page)
    assert "\\u001b" in page
    assert max(map(len, re.findall("n{10,}", page))) <= 800
    assert len(page) < 1_000_000


def test_the_policy_allows_the_style_and_the_script_of_the_page_and_nothing_else(page, parsed):
    first = next(a for t, a in parsed.elements if t == "meta")
    assert first["http-equiv"] == "Content-Security-Policy"
    rules = dict(rule.split(" ", 1) for rule in first["content"].split("; "))
    for tag in ("style", "script"):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_nothing_on_the_page_points_outside(page, parsed):
    assert re.search(r"https?:|url\(|@import|//\w+\.", page) is None
    for _, attributes in parsed.elements:
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))


def test_templates_trust_no_text():
    for path in FOLDER.iterdir():
        if path.name.endswith(".j2"):
            assert not re.search(r"\bsafe\b|autoescape|Markup", path.read_text(encoding="utf-8")), path.name


def test_a_huge_graph_fits_and_says_what_was_left_out():
    page = render(*large(200_000))
    assert len(page.encode()) <= LIMIT
    assert page.count('<tr id="n') == 2000
    for told in (
        "198,000 of 200,000 nodes are not shown",
        "952 more tensors are in report.json",
        "952 more layers are in",
    ):
        assert told in page


def test_a_page_that_would_be_too_large_gets_fewer_rows(monkeypatch):
    values = large(1000)
    assert render(*values).count('<tr id="n') == 1000
    monkeypatch.setattr("qexport.exporter.report.html.page.LIMIT", 1_500_000)
    page = render(*values)
    assert len(page.encode()) <= 1_500_000
    assert page.count('<tr id="n') == 500


def test_rows_that_something_was_decided_about_come_first():
    _, report = large(1000)
    shown = choose(report, Caps(500, 4))
    assert {node.state for _, node in shown.nodes} == {"quantized", "kept"}
    assert [place for place, _ in shown.nodes] == sorted(place for place, _ in shown.nodes)
    assert len(shown.activations) == len(shown.weights) == 4


def test_an_empty_report_says_for_each_panel_why():
    result, report = tiny()
    why = {panel: f"no {panel} because of the weather" for panel in PANELS}
    text = Page(render(result, Report(verdict=report.verdict, missing=why))).text()
    for reason in why.values():
        assert reason in text


def test_a_build_without_data_latency_or_engine_still_has_a_page():
    result, report = tiny()
    bare = replace_record(result, quality=None, latency=None, warnings=(), gates={}, backed_off=(), steps=(), files={})
    text = Page(render(bare, Report(verdict=report.verdict))).text()
    assert text.count("not measured") == 2
    assert "There is nothing to show here." in text


def test_a_foreign_latency_is_no_speed():
    result, report = tiny()
    page = render(replace_record(result, latency=replace_record(result.latency, foreign=True)), report)
    assert "2.00× the speed" not in page
    assert "ort-cpu was not here to run it" in page


def test_a_picture_that_is_none_is_not_shown():
    result, report = tiny()
    assert len(Page(render(result, report)).all("img")) == 1
    bad = replace(report, samples=tuple(replace(s, picture="x' onerror='alert(1)") for s in report.samples))
    assert Page(render(result, bad)).all("img") == []


def palette():
    """Names of colours to their values in light and in dark."""
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", FOLDER.joinpath("style.css").read_text("utf-8"))
    return {name: colours for name, *colours in pairs}


def luminance(colour):
    """Relative luminance by WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    bent = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * bent[0] + 0.7152 * bent[1] + 0.0722 * bent[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("ink", ["ink", "soft", "a", "b"])
@pytest.mark.parametrize("paper", ["paper", "card", "raised", "band"])
def test_every_colour_of_text_can_be_read_on_every_surface(theme, ink, paper):
    one, other = (luminance(palette()[name][theme]) for name in (ink, paper))
    assert (max(one, other) + 0.05) / (min(one, other) + 0.05) >= 4.5


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("series", ["a", "b"])
def test_a_badge_can_be_read(theme, series):
    one, other = (luminance(palette()[name][theme]) for name in (series, f"{series}-soft"))
    assert (max(one, other) + 0.05) / (min(one, other) + 0.05) >= 4.5


def test_the_script_is_short_and_asks_for_nothing():
    script = FOLDER.joinpath("page.js").read_text(encoding="utf-8")
    assert len(script.splitlines()) <= 250
    assert not re.search(r"fetch|XMLHttp|WebSocket|import|eval|innerHTML|Function\(|localStorage|cookie", script)
