"""Running text cut into windows of equal length, for models that score the next token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qexport.calibration.reading.spec import DataSpec, InputSpec, Sample
from qexport.calibration.reading.text import MAKERS, choose_tokenizer, encode, load_tokenizer, padded, text_length
from qexport.errors import DataInvalid, UsageError
from qexport.passes.portable import MASK
from qexport.safe_io import read_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TEXT_BYTES = 16 << 20  # it is tokenized as a whole, anew on every pass
SUFFIX = ".txt"


@dataclass(frozen=True)
class WindowSource:
    """Consecutive windows of ``size`` tokens, without overlap.

    The text is tokenized as a whole, so that what the tokenizer puts at its ends stands there once. The rest at the end
    is a shorter window, unless it is a single token or the model could not tell it from padding.
    """

    files: tuple[Path, ...]
    size: int
    shortest: int
    inputs: tuple[InputSpec, ...]
    tokenizer: Tokenizer

    def __iter__(self) -> Iterator[Sample]:
        encoding = encode(self.tokenizer, read_running_text(self.files[0]), str(self.files[0]))
        tokens = {entry: MAKERS[entry.name](encoding) for entry in self.inputs}
        for start in range(0, len(encoding.ids) - self.shortest + 1, self.size):
            yield {entry.name: padded(ids[start : start + self.size], entry) for entry, ids in tokens.items()}


def open_windows(path: Path, inputs: tuple[InputSpec, ...], spec: DataSpec, tokenizer: Path | None) -> WindowSource:
    """Open running text for a model that reads token ids.

    Raises:
        DataInvalid: There is no tokenizer, or the model asks for something else.
        UsageError: The file is no plain text, or the windows are shorter than a model without a mask wants them.
    """
    if path.suffix.lower() != SUFFIX:
        hint = "give plain text, or set data.windows to false"
        raise UsageError(f"windows are cut from {SUFFIX} files", where=str(path), hint=hint)
    chosen = choose_tokenizer(path, inputs, spec, tokenizer)
    size = text_length(inputs, spec)
    fixed = [entry.shape[1] for entry in inputs if entry.shape[1] is not None]
    blind = bool(fixed) and all(entry.name != MASK for entry in inputs)
    if blind and size < min(fixed):
        what = f"the model reads {min(fixed)} tokens and has no {MASK} to hide padding"
        raise UsageError(what, where="data.max_length", hint=f"set it to {min(fixed)}")
    return WindowSource((path,), size, size if blind else min(size, 2), inputs, load_tokenizer(chosen, None))


def read_running_text(path: Path) -> str:
    """Return the text of a file as it is, without a byte order mark.

    Raises:
        DataInvalid: It is not UTF-8.
        ResourceExhausted: It is longer than 16 MiB.
    """
    try:
        return read_bytes(path, limit=MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataInvalid(f"cannot be read: {error}", where=str(path)) from error
