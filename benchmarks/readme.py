"""Copy ``results/*.md`` into the pages, between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``."""

from __future__ import annotations

import re

import measure

PAGES = ("README.md", "docs/benchmarks.md", "docs/export.md", "docs/report.md", "docs/runtime.md", "docs/looking.md")
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)


def fill(match: re.Match[str]) -> str:
    """The block with its table; one that was never measured says so."""
    path = measure.RESULTS / f"{match[2]}.md"
    table = path.read_text(encoding="utf-8") if path.is_file() else "Not measured yet.\n"
    return match[1] + table + match[3]


def main() -> None:
    """Fill every block."""
    for name in PAGES:
        path = measure.ROOT / name
        path.write_text(BLOCK.sub(fill, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
