"""Running text as tokens: which bytes each stands for, and in which windows it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qexport.calibration.reading.text import encode, load_tokenizer
from qexport.calibration.reading.windows import read_running_text
from qexport.errors import DataInvalid
from qexport.exporter.families.folder import TOKENIZER


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text as tokens.

    Attributes:
        ids: Of the whole text.
        sizes: Bytes of text that each stands for; together those of the text.
        vocabulary: One more than the largest id that the tokenizer can give.
    """

    ids: NDArray[np.int64]
    sizes: NDArray[np.int64]
    vocabulary: int


def read_tokens(model: Path, text: Path, most: int | None) -> Tokens:
    """Tokenize a text with the tokenizer beside a model.

    Raises:
        DataInvalid: There is no tokenizer, no text, or it is not UTF-8.
    """
    path = model.parent / TOKENIZER
    if not path.is_file():
        raise DataInvalid("no tokenizer", where=str(path), hint="put the model's tokenizer.json beside it")
    tokenizer = load_tokenizer(path, None)
    written = read_running_text(text)
    if not written:
        raise DataInvalid("holds no text", where=str(text))
    encoding = encode(tokenizer, written, str(text))
    sizes = byte_sizes(written, [end for _, end in encoding.offsets])
    vocabulary = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    return Tokens(np.array(encoding.ids[:most], np.int64), sizes[:most], vocabulary)


def byte_sizes(text: str, ends: list[int]) -> NDArray[np.int64]:
    """Bytes of UTF-8 that each token stands for, from where tokens end in characters.

    What a tokenizer leaves out between two tokens, such as a space, belongs to the second one, and what it leaves out
    at the end to the last one; a character that takes several tokens belongs to the first of them.
    """
    if not ends:
        return np.zeros(0, np.int64)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + sum((codes >= limit).astype(np.int64) for limit in (0x80, 0x800, 0x10000))
    until = np.concatenate([[0], np.cumsum(widths)])
    reached = np.maximum.accumulate(np.array(ends))
    reached[reached == reached[-1]] = len(text)
    sizes: NDArray[np.int64] = np.diff(until[reached], prepend=0)
    return sizes


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens ``start`` to ``end`` of the text, those from ``first`` on judged."""

    start: int
    end: int
    first: int


def cut(count: int, size: int, stride: int, shortest: int) -> list[Window]:
    """Windows over ``count`` tokens in which every token is judged once, but the first of windows that do not overlap.

    Windows below ``shortest`` tokens are left out, and those in which nothing is judged.
    """
    found: list[Window] = []
    done = 0
    for start in range(0, count, stride):
        end = min(start + size, count)
        window = Window(start, end, max(done, start + 1))
        if window.first < end and end - start >= shortest:
            found.append(window)
        if end == count:
            break
        done = end
    return found
