"""Copy the tables of ``results/*.md`` into README.md, between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``."""

from __future__ import annotations

import re

import measure

BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)


def fill(match: re.Match[str]) -> str:
    """The block with its table; empty where nothing was measured."""
    path = measure.RESULTS / f"{match[2]}.md"
    return match[1] + (path.read_text(encoding="utf-8") if path.is_file() else "") + match[3]


def main() -> None:
    """Fill every block."""
    path = measure.ROOT / "README.md"
    path.write_text(BLOCK.sub(fill, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
