"""Sentences and sentence pairs in CSV, JSONL and plain text, turned into token ids."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.calibration.reading.spec import DataSpec, InputSpec, Sample, describe_all
from qexport.errors import DataInvalid, QexportError
from qexport.passes.portable import IDS, MASK, TYPES
from qexport.safe_io import open_file, read_bytes

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Record: TypeAlias = tuple[int, Mapping[str, Any]]  # line number, column to value

PAIR = ("sentence1", "sentence2")
SCORE = "score"
MAX_LINE = 1 << 20
MAX_TOKENIZER_BYTES = 256 << 20

MAKERS: dict[str, Callable[[Encoding], list[int]]] = {
    IDS: lambda encoding: encoding.ids,
    MASK: lambda encoding: encoding.attention_mask,
    TYPES: lambda encoding: encoding.type_ids,
}


@dataclass(frozen=True)
class TextSource:
    """Sentences of a file as token ids; of a file of pairs all first sentences, then all second ones.

    A sequence axis that the model fixes is padded up to with zeros; otherwise nothing is padded.
    """

    files: tuple[Path, ...]
    columns: tuple[str, ...]
    inputs: tuple[InputSpec, ...]
    tokenizer: Tokenizer

    def __iter__(self) -> Iterator[Sample]:
        for column in self.columns:
            for line, record in read_records(self.files[0]):
                yield self._encode(_text(record, column, f"{self.files[0]}: line {line}"), line)

    def _encode(self, text: str, line: int) -> Sample:
        where = f"{self.files[0]}: line {line}"
        encoding = encode(self.tokenizer, text, where)
        if not encoding.ids:
            raise DataInvalid("the text has no tokens", where=where)
        return {entry.name: padded(MAKERS[entry.name](encoding), entry) for entry in self.inputs}


def open_text(path: Path, inputs: tuple[InputSpec, ...], spec: DataSpec, tokenizer: Path | None) -> TextSource:
    """Open a file of texts for a model that reads token ids.

    Raises:
        DataInvalid: There is no tokenizer, no column of text, or the model asks for something else.
    """
    chosen = choose_tokenizer(path, inputs, spec, tokenizer)
    columns = text_columns(first_record(path), spec.text, path)
    return TextSource((path,), columns, inputs, load_tokenizer(chosen, text_length(inputs, spec)))


def choose_tokenizer(path: Path, inputs: tuple[InputSpec, ...], spec: DataSpec, tokenizer: Path | None) -> Path:
    """Return the file that makes what the model asks for out of the text in ``path``.

    Raises:
        DataInvalid: There is no tokenizer, or the model asks for something that none makes.
    """
    unknown = [entry.name for entry in inputs if entry.name not in MAKERS or len(entry.shape) != 2]
    if unknown or IDS not in {entry.name for entry in inputs}:
        raise DataInvalid(
            f"text gives {', '.join(MAKERS)} of two axes, the model asks for {describe_all(inputs)}",
            where=str(path),
            hint="give the samples as npz arrays",
        )
    chosen = Path(spec.tokenizer) if spec.tokenizer is not None else tokenizer
    if chosen is None:
        raise DataInvalid(
            "text needs a tokenizer", where=str(path), hint="set data.tokenizer to the model's tokenizer.json"
        )
    return chosen


def text_length(inputs: tuple[InputSpec, ...], spec: DataSpec) -> int:
    """Most tokens of a sample: what the data section says, and no more than the model has room for."""
    return min([spec.max_length, *(entry.shape[1] for entry in inputs if entry.shape[1] is not None)])


def load_tokenizer(path: Path, max_length: int | None) -> Tokenizer:
    """Read a ``tokenizer.json`` (or the one in a folder); it never pads, and cuts after ``max_length`` tokens if given.

    Raises:
        DataInvalid: The file is missing or is not a tokenizer.
    """
    from tokenizers import Tokenizer

    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer: Tokenizer = Tokenizer.from_buffer(read_bytes(path, limit=MAX_TOKENIZER_BYTES))
        tokenizer.no_padding()
        if max_length is None:
            tokenizer.no_truncation()
        else:
            tokenizer.enable_truncation(max_length)
    except (QexportError, ValueError) as error:
        raise DataInvalid(
            f"cannot be read as a tokenizer: {error}", where=str(path), hint="expected a tokenizer.json"
        ) from error
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, where: str) -> Encoding:
    """Tokenize; ``DataInvalid`` where the tokenizer has no token for a part of the text."""
    try:
        return tokenizer.encode(text)
    except Exception as error:  # of no class of its own
        hint = "use the tokenizer that the model was trained with"
        raise DataInvalid(f"the tokenizer cannot read the text: {error}", where=where, hint=hint) from error


def read_scores(path: Path) -> NDArray[np.float64]:
    """Return the score of every pair.

    Raises:
        DataInvalid: A score is not a finite number.
    """
    return np.array([_score(record, f"{path}: line {line}") for line, record in read_records(path)], np.float64)


def first_record(path: Path) -> Mapping[str, Any]:
    """Return the first record of a file, which tells its columns.

    Raises:
        DataInvalid: There is none.
    """
    for _, record in read_records(path):
        return record
    raise DataInvalid("holds no text", where=str(path))


def text_columns(record: Mapping[str, Any], wanted: str | None, path: Path) -> tuple[str, ...]:
    """Choose the columns that hold text: the wanted one, ``text``, ``sentence``, or both of a pair.

    Raises:
        DataInvalid: None of them is there.
    """
    choices = ((wanted,),) if wanted is not None else (("text",), ("sentence",), PAIR)
    for names in choices:
        if set(names) <= set(record):
            return names
    raise DataInvalid(
        f"no column {' or '.join('+'.join(names) for names in choices)}, found {', '.join(map(repr, record))}",
        where=str(path),
        hint="name the column with data.text",
    )


def read_records(path: Path) -> Iterator[Record]:
    """Yield line number and columns of every record, one line in memory at a time.

    A CSV without header must be ``sentence1,sentence2,score``; a plain text has the one column ``text``.

    Raises:
        DataInvalid: A line is not UTF-8, too long, or not of the format.
    """
    line = 0
    with open_file(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
        try:
            for line, record in READERS[path.suffix.lower()](_lines(text)):
                yield line, record
        except (ValueError, RecursionError, csv.Error) as error:
            raise DataInvalid(f"cannot be read: {error}", where=f"{path}: after line {line}") from error


def _lines(text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise ValueError(f"a line is longer than {MAX_LINE} characters")
        yield line


def _csv_records(lines: Iterable[str]) -> Iterator[Record]:
    rows = csv.reader(lines, strict=True)
    header: tuple[str, ...] | None = None
    for row in rows:
        if not row:
            continue
        if header is None:
            headless = _is_scored_pair(row)
            header = (*PAIR, SCORE) if headless else tuple(name.strip() for name in row)
            if not headless:
                continue
        if len(row) != len(header):
            raise ValueError(f"line {rows.line_num} has {len(row)} columns, expected {len(header)}")
        yield rows.line_num, dict(zip(header, row, strict=True))


def _is_scored_pair(row: list[str]) -> bool:
    try:
        return len(row) == len(PAIR) + 1 and bool(np.isfinite(float(row[-1])))
    except ValueError:
        return False


def _json_records(lines: Iterable[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is not an object")
            yield number, record


def _plain_records(lines: Iterable[str]) -> Iterator[Record]:
    return ((number, {"text": line.strip()}) for number, line in enumerate(lines, 1) if line.strip())


READERS: dict[str, Callable[[Iterable[str]], Iterator[Record]]] = {
    ".csv": _csv_records,
    ".jsonl": _json_records,
    ".txt": _plain_records,
}


def _text(record: Mapping[str, Any], column: str, where: str) -> str:
    text = record.get(column)
    if not isinstance(text, str):
        raise DataInvalid(f"{column!r} is {text!r}, expected a text", where=where)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataInvalid(f"the text is not Unicode: {text!r}", where=where)
    return text


def _score(record: Mapping[str, Any], where: str) -> float:
    value = record.get(SCORE)
    try:
        score = float(value) if isinstance(value, str | int | float) else float("nan")
    except (ValueError, OverflowError):
        score = float("nan")
    if not np.isfinite(score):
        raise DataInvalid(f"the score is {value!r}, expected a number", where=where)
    return score


def padded(ids: list[int], entry: InputSpec) -> NDArray[Any]:
    """Return the array of one input, zeros behind the ids where the model fixes the length."""
    array = np.array(ids, entry.dtype)
    return array if entry.shape[1] is None else np.pad(array, (0, entry.shape[1] - len(ids)))
