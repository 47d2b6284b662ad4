"""TOML in with errors that name file, line and column; TOML out for what recipes hold."""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from qexport.errors import UsageError

LIMIT = 1 << 16
"""Bytes; a recipe is a page of text, and some of the parser's costs grow faster than the file."""

MAX_DEPTH = 16
"""Levels of tables and arrays; a recipe has five."""

MAX_DOTS = 64
"""In one line, outside of strings."""

_STRING = re.compile(r"\"(?:\\.|[^\"\\\n])*+\"|'[^'\n]*+'")
_POSITION = re.compile(r"\s*\(at (?:line (\d+), column (\d+)|end of document)\)$")
_HEADER = re.compile(r"\s*\[\[?\s*([\w.\"'-]+)\s*\]\]?\s*(?:#.*)?$")


def parse(text: str, where: str) -> dict[str, Any]:
    """Parse ``text``; raise ``UsageError`` with line and column when it is not TOML."""
    try:
        return _shallow(tomllib.loads(_short_keys(text)))
    except RecursionError as error:
        raise UsageError("not valid TOML: nested too deeply", where=where) from error
    except ValueError as error:
        message = str(error)
        found = _POSITION.search(message)
        place = f"{where}:{found[1]}:{found[2]}" if found and found[1] else where
        what = message[: found.start()] if found else message
        raise UsageError(f"not valid TOML: {what[:1].lower()}{what[1:]}", where=place) from error


def parse_value(text: str, where: str) -> Any:
    """Parse one value; a bare word, a path or anything else that is not TOML is a string.

    Raises:
        UsageError: The text opens an array, a table or a string and does not close it.
    """
    try:
        parsed = _shallow(tomllib.loads(f"value = {text}"))
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith(("[", "{", '"', "'")):
            raise UsageError(f"not a TOML value: {text!r}", where=where) from error
        return text
    if list(parsed) != ["value"] or not isinstance(parsed["value"], str | int | float | bool | list | dict):
        return text
    return parsed["value"]


def _short_keys(text: str) -> str:
    """Return ``text``; refuse lines whose dots could only be a dotted key, which the parser reads in quadratic time."""
    if any(line.count(".") > MAX_DOTS for line in _STRING.sub("", text).splitlines()):
        raise ValueError(f"More than {MAX_DOTS} dots in a line")
    return text


def _shallow(document: dict[str, Any]) -> dict[str, Any]:
    """Return ``document``; raise ``RecursionError`` where later code, which recurses, would."""
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        children = [item.values() if isinstance(item, dict) else item for item in level]
        level = [item for items in children for item in items if isinstance(item, dict | list)]
        if not level:
            return document
    raise RecursionError


def line_of(text: str, header: str, number: int, key: str) -> int | None:
    """Return the line where ``key`` stands in the ``number``-th table called ``header`` ("" is the top of the file).

    A search in the text, because the parser keeps no positions; ``None`` when the key is written in another way.
    """
    current, seen = "", Counter({"": 1})
    key_line = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[.=]")
    for line_number, line in enumerate(text.splitlines(), 1):
        if match := _HEADER.match(line):
            current = match[1]
            seen[current] += 1
            outer, _, inner = current.rpartition(".")
            if (outer, inner) == (header, key) and number == 1:
                return line_number
        elif current == header and seen[header] == number and key_line.match(line):
            return line_number
    return None


def dump(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a document: scalars, then arrays of tables, then tables; ``None`` is left out."""
    for key, value in document.items():
        if not _is_table(value) and not _is_table_array(value) and value is not None:
            yield f"{_key(key)} = {_inline(value)}"
    for key, value in document.items():
        for row in value if _is_table_array(value) else []:
            yield ""
            yield f"[[{_key(key)}]]"
            yield from (f"{_key(name)} = {_inline(item)}" for name, item in row.items() if item is not None)
    for key, value in document.items():
        if _is_table(value) and value:
            yield ""
            yield f"[{_key(key)}]"
            yield from (f"{_key(name)} = {_inline(item)}" for name, item in value.items() if item is not None)


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_table_array(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_table, value))


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _inline(name)


def _inline(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_inline(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_inline, value))}]"
    return repr(value)
