"""Tables of benchmarks: every one has a script that writes it, a result that it shows, and a page that tells of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "benchmarks").glob("*.py"))}
PAGES = {
    str(path.relative_to(ROOT)): re.findall(r"<!-- bench:(\w+) -->\n(.*?)<!-- /bench:\1 -->", text, re.DOTALL)
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
    if "<!-- bench:" in (text := path.read_text(encoding="utf-8"))
}
BY_HAND = {"peers.py"}
"""It wants tools that this environment cannot hold."""


def writes(text: str) -> set[str]:
    """Names of the tables that a script writes."""
    return set(re.findall(r"\breport\(\s*\"(\w+)\"", text))


def test_every_script_is_told_of():
    told = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f"`{name}" not in told] == []


def test_every_script_that_fills_a_table_is_run_with_the_others():
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nbench:")[2].partition("\n\n")[0]
    run = set(re.findall(r"benchmarks/(\w+\.py)", recipe))
    filling = {name for name, text in SCRIPTS.items() if writes(text)}
    assert filling - BY_HAND == run & filling
    assert run - filling == {"readme.py"}


def test_every_table_is_that_of_a_result_which_some_script_writes():
    written = set().union(*map(writes, SCRIPTS.values()))
    shown = {name: table for blocks in PAGES.values() for name, table in blocks}
    assert set(shown) <= written
    for name, table in shown.items():
        assert table == (ROOT / f"benchmarks/results/{name}.md").read_text(encoding="utf-8"), name
        rows = json.loads((ROOT / f"benchmarks/results/{name}.json").read_bytes())["rows"]
        assert table.count("\n|") == len(rows) + 1, name


def test_every_page_that_has_tables_is_filled_and_told_of():
    told = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8").split("| script")[0]
    assert [page for page in PAGES if f'"{page}"' not in SCRIPTS["readme.py"]] == []
    assert [page for page in PAGES if page != "README.md" and f"](../{page})" not in told] == []
