"""Files of texts in, files of vectors out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from qexport.calibration.reading.text import first_record, read_records, text_columns
from qexport.errors import DataInvalid, UsageError
from qexport.safe_io import open_file

Rows: TypeAlias = Iterator[tuple[str, NDArray[np.float32]]]  # each text with its vector, or its vectors
STDIN = "-"
TABLES = (".csv", ".jsonl")
"""Endings of files whose texts stand in a column."""


# ---------------------------------------------------------------- texts


def read_texts(path: Path, column: str | None = None) -> list[str]:
    """Texts of a file; of a pair all first ones, then all second ones.

    A .csv or .jsonl is a table; in any other file every line is a text, empty ones too, so that vectors and lines stay
    side by side. ``-`` is stdin.

    Raises:
        DataInvalid: There are none, they are not UTF-8, or not texts.
        UsageError: There is no such file.
    """
    if path.suffix.lower() in TABLES:
        columns = text_columns(first_record(path), column, path)
        found = [_text(record, name, f"{path}: line {at}") for name in columns for at, record in read_records(path)]
    elif column is not None:
        raise UsageError(f"lines have no column {column!r}", where=str(path), hint=f"tables end in {', '.join(TABLES)}")
    elif str(path) == STDIN:
        found = [] if sys.stdin is None else _lines(sys.stdin.buffer, "stdin")
    else:
        with open_file(path) as file:
            found = _lines(file, str(path))
    if not found:
        raise DataInvalid("holds no text", where=str(path))
    return found


def _lines(raw: BinaryIO, where: str) -> list[str]:
    found: list[str] = []
    for number, line in enumerate(raw, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            what = f"not UTF-8 text: bad byte at place {error.start} of the line"
            raise DataInvalid(what, where=f"{where}: line {number}") from error
        found.append(text.removesuffix("\n").removesuffix("\r"))
    return found


def _text(record: Mapping[str, Any], column: str, where: str) -> str:
    text = record.get(column)
    if not isinstance(text, str):
        raise DataInvalid(f"{column!r} is {text!r}, expected a text", where=where)
    return text


# ---------------------------------------------------------------- vectors


@dataclass(frozen=True, slots=True)
class Writer:
    """How vectors are written.

    Attributes:
        write: Takes a file, texts with their vectors, and how many of how many numbers there are.
        ragged: Whether a text may have several vectors.
    """

    write: Callable[[BinaryIO, Rows, tuple[int, int]], None]
    ragged: bool


def writer(path: Path) -> Writer:
    """The one for the ending of a file.

    Raises:
        UsageError: The ending is not known.
    """
    found = WRITERS.get(path.suffix.lower())
    if found is None:
        what = f"the ending {path.suffix!r} is not known"
        raise UsageError(what, where=str(path), hint=f"known: {', '.join(WRITERS)}")
    return found


def numbers(vector: NDArray[np.float32]) -> list[Any]:
    """Nested lists of the shortest decimals that are read as the same float32."""
    if vector.ndim > 1:
        return [numbers(row) for row in vector]
    return [float(text) for text in vector.astype(str).tolist()]


def _write_npy(file: BinaryIO, rows: Rows, shape: tuple[int, int]) -> None:
    """The header tells the shape, so that rows can be written as they come."""
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, header)
    for _, vector in rows:
        file.write(vector.astype("<f4").tobytes())


def _write_jsonl(file: BinaryIO, rows: Rows, _shape: tuple[int, int]) -> None:
    """One object for each text."""
    for text, vector in rows:
        file.write(f"{json.dumps({'text': text, 'embedding': numbers(vector)})}\n".encode())


WRITERS = {".npy": Writer(_write_npy, ragged=False), ".jsonl": Writer(_write_jsonl, ragged=True)}
"""Endings of files for vectors."""
