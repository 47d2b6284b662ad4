"""Prompts in files: a line for each, or a JSON object for each with what its output may copy from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qexport.errors import DataInvalid
from qexport.runtime.generation.prompts import Prompt
from qexport.safe_io import read_text

MOST_BYTES = 256 << 20
OBJECTS = ".jsonl"
BYTE_ORDER_MARK = "\ufeff"
_KEYS = {"prompt", "references"}


def read_prompts_file(path: Path) -> list[Prompt]:
    """Read ``.jsonl`` files as objects, all others as text in UTF-8.

    Raises:
        UsageError: There is no such file, or it is not UTF-8.
        DataInvalid: A line is not what it should be, or there is none.
    """
    lines = read_text(path, limit=MOST_BYTES).removeprefix(BYTE_ORDER_MARK).split("\n")  # and at nothing else
    found = list(read_objects(lines, str(path)) if path.suffix == OBJECTS else read_lines(lines))
    if not found:
        raise DataInvalid("there are no prompts in it", where=str(path), hint="give one per line")
    return found


def read_lines(lines: Iterable[str]) -> Iterator[Prompt]:
    """A prompt for every line with something on it."""
    for line in lines:
        if line.strip():
            yield Prompt(line.rstrip("\r\n"))


def read_objects(lines: Iterable[str], where: str) -> Iterator[Prompt]:
    """A prompt for every object: ``prompt``, text or tokens, and ``references``, texts.

    Raises:
        DataInvalid: With the number of the line.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _prompt(line, f"{where}, line {number}")


def _prompt(line: str, where: str) -> Prompt:
    try:
        told: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataInvalid("not JSON", where=where) from error
    if not isinstance(told, dict) or "prompt" not in told or not told.keys() <= _KEYS:
        raise DataInvalid('expected an object with "prompt", and "references" if there are any', where=where)
    text, references = told["prompt"], told.get("references", [])
    if not isinstance(text, str) and not (isinstance(text, list) and all(type(token) is int for token in text)):
        raise DataInvalid('"prompt" is neither text nor a list of tokens', where=where)
    if not isinstance(references, list) or not all(isinstance(one, str) for one in references):
        raise DataInvalid('"references" is no list of texts', where=where)
    return Prompt(text, tuple(references))
