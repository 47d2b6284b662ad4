"""The client that looks at pages: it sees what tests of the report look for, where that was planted."""

from __future__ import annotations

import contextlib
import os
import tempfile

import psutil
import pytest
from browser import Browser, BrowserError, find_chromium, sheets

pytestmark = pytest.mark.browser
CSP = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'">"""


@pytest.fixture
def written(tmp_path):
    """Puts markup into a page and returns its path."""

    def write(body, head=""):
        path = tmp_path / "page.html"
        page = f"<!doctype html><html lang=en><head><meta charset=utf-8><title>t</title>{head}</head><body>{body}"
        path.write_text(page, encoding="utf-8")
        return path

    return write


def test_the_client_sees_every_request_of_a_page(browser, written, tmp_path):
    late = "<script>onload = () => fetch('late.json').catch(() => 0)</script>"
    path = written(f"here<img src='pixel.png'><img src='data:,x'>{late}")
    with browser.open(path) as page:
        page.settle()
        assert page.requests[0] == path.as_uri()
        assert set(page.requests[1:]) == {(tmp_path / name).as_uri() for name in ("pixel.png", "late.json")}


def test_the_client_sees_what_the_console_got(browser, written):
    path = written("x<script>console.error('planted', 7); null.field</script><script>console.log('fine')</script>")
    with browser.open(path) as page:
        said = "\n".join(page.console)
    assert "planted 7" in said
    assert "TypeError" in said
    assert "fine" in said


def test_the_client_sees_that_the_policy_of_a_page_was_broken(browser, written):
    with browser.open(written("x<script>window.ran = 1</script><p style='color: red'>y", CSP)) as page:
        assert sum("Content Security Policy" in line for line in page.console) == 2
        assert page.evaluate("window.ran === undefined")


def test_a_quiet_page_asks_for_itself_alone_and_says_nothing(browser, written):
    path = written("<p>quiet")
    with browser.open(path) as page:
        page.settle()
        assert (page.requests, page.console) == ([path.as_uri()], [])


def test_the_client_sees_that_a_page_paints_late(browser, written):
    busy = "<script>const end = performance.now() + 600; while (performance.now() < end);</script>"
    with browser.open(written("<p>at once")) as page:
        soon = page.first_paint
        assert page.moment("firstContentfulPaint") - page.moment("init") <= soon + 0.05
    with browser.open(written("<p>late", busy)) as page:
        assert page.first_paint > 0.6 > soon > 0


def test_the_client_can_prefer_dark_and_print(browser, written):
    asked = "['(prefers-color-scheme: dark)', 'print'].map(what => matchMedia(what).matches)"
    for dark, media in ((False, ""), (True, ""), (False, "print")):
        with browser.open(written("x"), dark=dark, media=media) as page:
            assert page.evaluate(asked) == [dark, media == "print"]


def test_the_client_clicks_what_lies_on_top_and_types_where_the_cursor_is(browser, written):
    tall = "<p style='height: 3000px'>far<button onclick='window.hit = this.id' id=low>x</button><br><input id=field>"
    cover = "<div id=cover style='position: fixed; inset: 0' onclick='window.hit = this.id'></div>"
    with browser.open(written(tall)) as page:
        page.click("#low")
        assert page.evaluate("hit") == "low"
        page.click("#field")
        page.type("words")
        assert page.evaluate("field.value") == "words"
    with browser.open(written(tall + cover)) as page:
        page.click("#low")
        assert page.evaluate("hit") == "cover"
        with pytest.raises(BrowserError, match="nothing is called #gone"):
            page.click("#gone")


def test_the_client_draws_and_prints(browser, written):
    with browser.open(written("<p style='break-after: page'>one<p>two"), width=300) as page:
        assert page.screenshot().startswith(b"\x89PNG")
        assert page.evaluate("innerWidth") == 300
        assert sheets(page.pdf()) == 2


def test_a_script_that_fails_is_told(browser, written):
    with browser.open(written("x")) as page, pytest.raises(BrowserError, match="ReferenceError: nothing"):
        page.evaluate("nothing.at.all")


def test_a_browser_that_does_not_start_says_why(tmp_path):
    program = tmp_path / "chromium"
    program.write_text("#!/bin/sh\necho 'no such library' >&2\nexit 1\n")
    program.chmod(0o700)
    with Browser(str(program)) as dead, pytest.raises(BrowserError, match="no such library"):
        dead.call("Browser.getVersion")


def test_nothing_of_a_browser_is_left(browser, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Browser(find_chromium()) as running:
        assert "Chrom" in running.call("Browser.getVersion")["product"]
        group = os.getpgid(running._child)
        assert list(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []
    assert living(group) == []


def test_the_variable_names_the_program(monkeypatch, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("")
    mine.chmod(0o700)
    monkeypatch.setenv("CHROMIUM", str(mine))
    assert find_chromium() == str(mine)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CHROMIUM", str(tmp_path / "nothing"))
    assert find_chromium() is None


def living(group: int) -> list[psutil.Process]:
    """Processes of a group that are more than an entry in the table."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
