"""Logits of whole windows, piece by piece, from a decoder in either layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.errors import ModelInvalid
from qexport.exporter.admit import admit_file
from qexport.passes.portable import IDS, LOGITS, MASK, MAX_POSITIONS, PAST, WRITE, parse_positions
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.decoder import Decoder
from qexport.runtime.session import Port, SessionOptions

Tokens: TypeAlias = NDArray[np.int64]  # [batch, sequence], zeros behind the end of a row
Pieces: TypeAlias = Iterator[tuple[int, NDArray[np.floating[Any]]]]  # first column, logits [batch, columns, vocabulary]


class Scorer(Protocol):
    """A decoder that tells how likely every next token is.

    Attributes:
        layout: What its graph is called: ``cached`` or ``scoring``.
        vocabulary: Size of the logits.
        longest: Tokens that it reads at most; ``None`` where the model does not say.
        shortest: Tokens of a window that it can tell from padding, at least 2.
        rows: Windows that go together, where the graph fixes that.
    """

    layout: str
    vocabulary: int
    longest: int | None
    shortest: int
    rows: int | None

    def pieces(self, ids: Tokens, lengths: Tokens) -> Pieces:
        """Logits of windows ``[batch, sequence]``, each by itself from its first token on, ``lengths`` tokens long.

        Those of the last column may be left out, since no token follows it.
        """


def open_scorer(path: Path, options: SessionOptions, chunk: int) -> Scorer:
    """Open a model file.

    Args:
        path: An .onnx file.
        options: How to run.
        chunk: Tokens of a row at a time, where the layout lets one choose.

    Raises:
        ModelInvalid: It is no decoder; or as ``admit_file``.
    """
    names = {value.name for value in admit_file(path).graph.input}
    if WRITE in names or any(name.startswith(PAST) for name in names):
        return Cached(path, options, chunk)
    return WholeRows(path, options)


class Cached:
    """The portable layout: a window is read in chunks, each of which sees the ones before through the cache."""

    layout, shortest = "cached", 2

    def __init__(self, path: Path, options: SessionOptions, chunk: int) -> None:
        self.rows: int | None = None
        self._decoder, self._chunk = Decoder(path, options), chunk
        signature = self._decoder.signature
        if signature.context:
            what = f"it reads {', '.join(signature.context)} besides tokens"
            raise ModelInvalid(what, where=str(path), hint="running text is for decoders that stand alone")
        self.vocabulary, self.longest = signature.vocabulary, signature.positions

    def pieces(self, ids: Tokens, lengths: Tokens) -> Pieces:
        """Yield at most ``chunk`` columns at a time."""
        self._decoder.reset(len(ids))
        for start in range(0, ids.shape[1] - 1, self._chunk):
            part = ids[:, start : min(start + self._chunk, ids.shape[1] - 1)]
            yield start, self._decoder.extend(part, np.clip(lengths - start, 0, part.shape[1]))


class WholeRows:
    """The scoring layout, ``input_ids[, attention_mask] -> logits``: a window is one call."""

    layout = "scoring"

    def __init__(self, path: Path, options: SessionOptions) -> None:
        self._session, self._where = OrtSession(path, options), str(path)
        ports = {port.name: port for port in self._session.ports}
        logits = next((port for port in self._session.results if port.name == LOGITS), None)
        if IDS not in ports or not ports.keys() <= {IDS, MASK} or logits is None or len(logits.shape) != 3:
            what = f"no decoder: it reads {', '.join(ports)} and gives {', '.join(self._session.outputs)}"
            hint = f"expected {IDS}[, {MASK}] and {LOGITS} [batch, sequence, vocabulary], or the portable layout"
            raise ModelInvalid(what, where=str(path), hint=hint)
        self.vocabulary = self._fixed(logits, 2)
        rows, columns = ports[IDS].shape if len(ports[IDS].shape) == 2 else (None, None)
        self.rows, self._columns = (size if isinstance(size, int) else None for size in (rows, columns))
        told = parse_positions(self._session.metadata.get(MAX_POSITIONS, ""))
        self.longest = min((size for size in (told, self._columns) if size is not None), default=None)
        self._types = {name: port.dtype or np.dtype(np.int64) for name, port in ports.items()}
        self.shortest = 2 if self._columns is None or MASK in ports else self._columns

    def pieces(self, ids: Tokens, lengths: Tokens) -> Pieces:
        """Yield the logits of all columns at once; sizes that the graph fixes are filled up with masked zeros."""
        count, width = ids.shape
        filled = np.zeros((self.rows or count, self._columns or width), np.int64)
        filled[:count, :width] = ids
        mask = np.zeros_like(filled)
        mask[:count] = np.arange(filled.shape[1]) < lengths[:, None]
        feeds = {IDS: filled, MASK: mask}
        typed = {name: feeds[name].astype(dtype, copy=False) for name, dtype in self._types.items()}
        yield 0, self._session.run(typed, [LOGITS])[LOGITS][:count, :width]

    def _fixed(self, port: Port, axis: int) -> int:
        size = port.shape[axis]
        if not isinstance(size, int):
            raise ModelInvalid(f"the size of the vocabulary is not known from {port.name!r}", where=self._where)
        return size
