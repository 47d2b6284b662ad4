"""The report in a real browser: what it asks for, says and paints, and what it does when it is clicked."""

from __future__ import annotations

import re
import statistics

import pytest
from browser import Browser, sheets
from report_trees import hostile, large, tiny

from qexport.exporter.report.html.page import render

pytestmark = pytest.mark.browser
ROWS = "[...document.querySelectorAll('.nodes tbody tr')]"
CONTRASTS = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const numbers = color => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map(part => part / 255);
  };
  const light = color => {
    const [r, g, b] = color.map(part => part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const color = numbers(getComputedStyle(at).backgroundColor);
      if (color[3] === 1) return color;
    }
    return [1, 1, 1, 1];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].find(node => node.nodeType === 3 && node.data.trim());
    if (!text || !element.checkVisibility() || element.closest("script, style, title")) continue;
    const style = getComputedStyle(element), svg = element instanceof SVGElement;
    const pair = [light(numbers(svg ? style.fill : style.color)), light(behind(element))].sort((a, b) => b - a);
    const name = element.className.baseVal ?? element.className;
    found.push([(pair[0] + .05) / (pair[1] + .05), text.data.trim().slice(0, 40), name]);
  }
  return found;
})()"""  # contrast as of WCAG 2.2, words, class


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports by name: a small one, one of hostile names, one of 2,000 nodes."""
    folder, made = tmp_path_factory.mktemp("pages"), {"tiny": tiny(), "hostile": hostile(), "large": large(2000)}
    for name, (result, report) in made.items():
        (folder / f"{name}.html").write_text(render(result, report), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


def shown(page):
    """Last parts of the names in the table, as far as they are seen, in their order."""
    return page.evaluate(f"{ROWS}.filter(row => row.checkVisibility()).map(row => row.querySelector('b').textContent)")


def tally(page):
    return page.evaluate("document.getElementById('tally').textContent")


def head(page, label):
    """The selector of a heading of the table."""
    labels = "[...document.querySelectorAll('.nodes th')].map(head => head.textContent.trim())"
    return f".nodes th:nth-child({page.evaluate(labels).index(label) + 1}) button"


def column(page, label):
    """What the cells below a heading are sorted by, from top to bottom."""
    number = int(re.search(r"\d+", head(page, label))[0]) - 1
    return page.evaluate(f"{ROWS}.map(row => row.cells[{number}].dataset.v)")


@pytest.mark.parametrize("name", ["tiny", "hostile", "large"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_report_asks_for_nothing_and_says_nothing(browser, pages, name, dark):
    with browser.open(pages[name], dark=dark) as page:
        page.click("#theme")
        page.settle()
        assert page.requests == [pages[name].as_uri()]
        assert page.console == []


def test_names_that_are_markup_do_nothing(browser, pages):
    with browser.open(pages["hostile"]) as page:
        for place in range(3):
            page.hover(f".nodes tbody tr:nth-child({place + 1}) td:nth-child(2)")
        page.click(head(page, "node, and why"))
        page.click("#search")
        page.type("<script>")
        page.settle()
        assert page.evaluate("window.hacked === undefined")
        assert page.evaluate("document.scripts.length") == 1
        assert page.evaluate("document.querySelectorAll('h1, main, img').length") == 2 + page.evaluate(
            "document.querySelectorAll('img.pixels').length"
        )


def test_two_thousand_nodes_are_painted_within_a_second(browser, pages):
    assert first_paint(browser, pages["large"]) <= 1


@pytest.mark.slow
def test_the_report_of_minilm_is_small_and_painted_within_a_second_and_asks_for_nothing(browser, minilm_build):
    folder, _ = minilm_build
    path = folder / "report.html"
    assert path.stat().st_size <= 6_000_000
    assert first_paint(browser, path) <= 1
    with browser.open(path) as page:
        page.settle()
        assert (page.requests, page.console) == ([path.as_uri()], [])
        assert len(shown(page)) > 37


def test_the_story_is_on_the_first_screen(browser, pages):
    with browser.open(pages["tiny"]) as page:
        bottom = page.evaluate("document.querySelector('.tiles').getBoundingClientRect().bottom")
        assert bottom <= page.evaluate("innerHeight")
        words = page.evaluate("document.querySelector('.story').innerText")
        assert [part for part in ("As good as", "82.03", "81.71", "24 MB", "2.00×") if part not in words] == []


def test_a_click_on_a_heading_sorts_and_another_one_turns_it_round(browser, pages):
    with browser.open(pages["tiny"]) as page:
        before = shown(page)
        page.click(head(page, "SQNR"))
        assert column(page, "SQNR") == ["28.25", "26", "", ""]
        page.click(head(page, "SQNR"))
        assert column(page, "SQNR") == ["26", "28.25", "", ""]
        assert page.evaluate("document.querySelectorAll('[aria-sort]').length") == 1
        page.click(head(page, "operator"))
        page.click(head(page, "#"))
        assert shown(page) == before
        assert column(page, "#") == ["0", "1", "2", "3"]


def test_a_key_sorts_as_a_click_does(browser, pages):
    with browser.open(pages["tiny"]) as page:
        page.evaluate(f"document.querySelector({head(page, 'SQNR')!r}).focus()")
        page.press("Enter")
        assert column(page, "SQNR") == ["28.25", "26", "", ""]


def test_numbers_are_sorted_by_what_they_are_worth(browser, pages):
    with browser.open(pages["large"]) as page:
        page.click(head(page, "error"))
        found = [float(value) for value in column(page, "error") if value]
        assert found == sorted(found, reverse=True)
        assert len(set(found)) > 1
        page.click(head(page, "#"))
        assert column(page, "#") == [str(number) for number in range(2000)]


@pytest.mark.parametrize(
    ("asked", "found"),
    [("softmax", ["/Softmax"]), ("outweighs", ["/MatMul"]), ("layer.0 uint8", ["/MatMul"]), ("nothing at all", [])],
)
def test_what_is_typed_is_searched_in_names_types_and_reasons(browser, pages, asked, found):
    with browser.open(pages["tiny"]) as page:
        page.click("#search")
        page.type(asked)
        assert shown(page) == found
        assert tally(page) == f"{len(found)} of 4 nodes"
        page.press("Escape")
        assert (len(shown(page)), tally(page)) == (4, "4 nodes")


def test_a_chip_shows_the_nodes_of_its_state_and_two_chips_those_of_both(browser, pages):
    seen = f"{ROWS}.filter(row => row.checkVisibility()).map(row => row.dataset.state)"
    with browser.open(pages["tiny"]) as page:
        page.click(".chip[value=kept]")
        assert page.evaluate(seen) == ["kept"]
        page.click(".chip[value=gone]")
        assert (page.evaluate(seen), tally(page)) == (["kept", "gone"], "2 of 4 nodes")
        page.click(".chip[value=kept]")
        page.click(".chip[value=gone]")
        assert len(page.evaluate(seen)) == 4


def test_a_click_on_a_mark_leads_to_its_row_even_where_that_was_searched_away(browser, pages):
    row = "document.querySelector('.nodes tr:target')"
    with browser.open(pages["tiny"]) as page:
        page.click("#search")
        page.type("softmax")
        page.click("#layers svg a[data-node]")
        assert page.evaluate("location.hash") == "#n" + page.evaluate(
            "document.querySelector('#layers svg a[data-node]').dataset.node"
        )
        assert page.evaluate(f"{row}.checkVisibility()")
        assert 0 <= page.evaluate(f"{row}.getBoundingClientRect().top") < page.evaluate("innerHeight")


def test_the_same_mark_leads_to_its_row_a_second_time(browser, pages):
    with browser.open(pages["tiny"]) as page:
        page.click("#layers svg a[data-node]")
        page.click("#search")
        page.type("no such node")
        page.click("#layers svg a[data-node]")
        assert page.evaluate("document.querySelector('.nodes tr:target').checkVisibility()")


def test_a_row_under_the_mouse_lights_its_marks_and_no_others(browser, pages):
    with browser.open(pages["tiny"]) as page:
        page.hover(".nodes tbody tr:first-child td:nth-child(2)")
        lit = page.evaluate("[...document.querySelectorAll('.lit')].map(mark => mark.dataset.node)")
        assert len(lit) > 1
        assert set(lit) == {page.evaluate(f"{ROWS}[0].dataset.node")}


def test_dark_is_dark_and_the_button_goes_against_what_the_system_says(browser, pages):
    light = {}
    for dark in (False, True):
        with browser.open(pages["tiny"], dark=dark) as page:
            first = lightness(page)
            page.click("#theme")
            second = lightness(page)
            page.click("#theme")
            assert lightness(page) == first
            light[dark] = (first, second)
    assert light[False][0] > 0.8 > 0.2 > light[True][0]
    assert light[False] == light[True][::-1]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(browser, pages, dark):
    with browser.open(pages["tiny"], dark=dark) as page:
        faint = [entry for entry in page.evaluate(CONTRASTS) if entry[0] < 4.5]
    assert faint == []


def test_a_narrow_screen_needs_no_scrolling_to_the_side(browser, pages):
    for name in ("tiny", "hostile"):
        with browser.open(pages[name], width=400) as page:
            assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_a_narrow_table_scrolls_instead_of_breaking_its_words(browser, pages):
    cells = "[...document.querySelectorAll('.flat td:not(.n)')].map(cell => cell.getBoundingClientRect().width)"
    with browser.open(pages["tiny"], width=400) as page:
        assert min(page.evaluate(cells)) > 70
        assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_paper_gets_all_of_it_in_dark_on_white(browser, pages):
    with browser.open(pages["tiny"], dark=True) as page:
        page.click("#theme")
        page.click("#theme")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert sheets(page.pdf()) > 1
        page.emulate(dark=True, media="print")
        assert lightness(page) == 1
        assert [entry for entry in page.evaluate(CONTRASTS) if entry[0] < 4.5] == []
        assert page.evaluate("document.querySelector('.tools').checkVisibility()") is False


def first_paint(browser: Browser, path) -> float:
    """The median of five, in seconds."""
    paints = []
    for _ in range(5):
        with browser.open(path) as page:
            paints.append(page.first_paint)
    return statistics.median(paints)


def lightness(page) -> float:
    """Of the page's ground, from 0 to 1."""
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(int(part) for part in re.findall(r"\d+", color)[:3]) / 3 / 255
