"""Run a decoder in the portable layout token by token, and back: prompts, single steps, wide steps, rollback.

Past and present of a layer are one buffer, which the graph writes into where it lies (``runtime.cache``); what
distinguishes the rows of a batch is only where they write and which positions they are told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.errors import DataInvalid, EnvironmentMismatch
from qexport.passes.portable import IDS, LOGITS, POSITIONS, WRITE, present_name
from qexport.runtime.cache import LEAST, Cache, Counts
from qexport.runtime.session import Port, Session, SessionOptions
from qexport.runtime.signature import read_signature

Context: TypeAlias = Mapping[str, NDArray[Any]]  # inputs that stay the same for a whole sequence
Logits: TypeAlias = NDArray[np.float32]  # [batch, sequence, vocabulary]

CPU = "CPUExecutionProvider"


class Decoder:
    """A decoder with the state of one batch of sequences; not for several threads at once."""

    def __init__(self, model: bytes | Path, options: SessionOptions | None = None, *, capacity: int = LEAST) -> None:
        """Load a model.

        Args:
            model: The file, or its bytes.
            options: How to run; on the processor, where the buffers are.
            capacity: Columns that buffers have at first, a power of two.

        Raises:
            ModelInvalid: The graph is not in the portable layout.
            BuildFailed: onnxruntime cannot load it.
        """
        chosen = options or SessionOptions()
        if chosen.providers != (CPU,):
            what = f"decoders run on {CPU}, not on {', '.join(chosen.providers)}"
            raise EnvironmentMismatch(what, hint="build an engine for a GPU")
        self._session = Session(model, chosen)
        self.signature = read_signature(self._session)
        self._least = capacity
        self._binding = self._session.bind()
        self._cache: Cache | None = None
        if not self.signature.context:
            self.reset()

    @property
    def lengths(self) -> Counts:
        """Tokens of each row so far."""
        return self._started().lengths

    @property
    def capacity(self) -> int:
        """Columns of the buffers now."""
        return self._started().capacity

    def reset(self, batch: int = 1, context: Context | None = None) -> None:
        """Forget everything and make room for ``batch`` sequences.

        Args:
            batch: How many.
            context: The inputs that ``signature.context`` names, such as what an encoder found, batch axis first.

        Raises:
            DataInvalid: An input of the context is missing, unknown, or of another type or shape.
        """
        given = dict(context or {})
        _check_context(given, self.signature.context, batch)
        found, binding = self.signature, self._session.bind()
        cache = Cache(found.caches, found.dtype, batch, least=self._least, most=found.positions)
        for name, array in given.items():
            binding.read(name, array)
        self._binding, self._cache = binding, cache
        self._place()

    def extend(self, ids: NDArray[np.integer[Any]], counts: Sequence[int] | Counts | None = None) -> Logits:
        """Read more tokens of every row: a prompt, one token, or several that are to be verified.

        Args:
            ids: Tokens ``[batch, sequence]``.
            counts: How many of them belong to each row, ``[batch]``, zero or more; what stands behind is ignored.

        Returns:
            Logits ``[batch, sequence, vocabulary]``; those behind a row's count mean nothing.

        Raises:
            DataInvalid: Not integers of that shape, outside of the vocabulary, or more than the model has positions
                for. The state is as before.
        """
        cache = self._started()
        valid = _check_counts(ids, counts, cache.lengths.size)
        tokens = self._check_ids(ids, valid)
        width, start = tokens.shape[1], cache.lengths
        if cache.reserve(valid, width):
            self._place()
        last = np.maximum(start + valid - 1, 0)
        logits: Logits = np.empty((*tokens.shape, self.signature.vocabulary), np.float32)
        self._binding.feed(IDS, tokens)
        self._binding.feed(POSITIONS, np.minimum(start[:, None] + np.arange(width), last[:, None]))
        self._binding.feed(WRITE, start)
        self._binding.write(LOGITS, logits)
        self._binding.run()
        cache.advance(valid)
        return logits

    def rollback(self, lengths: int | Sequence[int] | Counts) -> None:
        """Go back to ``lengths`` tokens, one number or one per row, in no time: the next step overwrites.

        Raises:
            DataInvalid: A row does not have that many.
        """
        cache = self._started()
        asked = np.asarray(lengths)
        if asked.dtype.kind not in "iu":
            raise DataInvalid(f"lengths are {asked.dtype}, expected integers")
        rows = np.full(cache.lengths.size, asked) if asked.ndim == 0 else asked
        cache.rollback(rows.astype(np.int64))

    def _place(self) -> None:
        """Let the session read and write the buffers of the cache."""
        for name, buffer in self._started().buffers.items():
            self._binding.read(name, buffer)
            self._binding.write(present_name(name), buffer)

    def _started(self) -> Cache:
        if self._cache is None:
            needed = ", ".join(self.signature.context)
            raise DataInvalid(f"the model reads {needed} once per sequence", hint="give them to reset() first")
        return self._cache

    def _check_ids(self, ids: NDArray[np.integer[Any]], valid: Counts) -> NDArray[np.int64]:
        """The tokens with zeros behind every row's own."""
        real = np.arange(ids.shape[1]) < valid[:, None]
        wrong = ids[real & ((ids < 0) | (ids >= self.signature.vocabulary))]
        if wrong.size:
            what = f"token {wrong[0]} does not exist, the model has a vocabulary of {self.signature.vocabulary}"
            raise DataInvalid(what, hint="is the tokenizer that of the model?")
        return np.where(real, ids, 0).astype(np.int64)


def _check_counts(ids: NDArray[Any], counts: Sequence[int] | Counts | None, batch: int) -> Counts:
    """Valid tokens of each row."""
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise DataInvalid(f"tokens are {ids.dtype} {list(ids.shape)}, expected integers [batch, sequence], not empty")
    if len(ids) != batch:
        raise DataInvalid(f"tokens of {len(ids)} rows for a batch of {batch}", hint="reset() sets the batch")
    if counts is None:
        return np.full(batch, ids.shape[1], np.int64)
    valid = np.asarray(counts)
    if valid.shape != (batch,) or valid.dtype.kind not in "iu" or valid.min() < 0 or valid.max() > ids.shape[1]:
        what = f"counts are {valid.tolist()}, expected {batch} integers from 0 to {ids.shape[1]}"
        raise DataInvalid(what)
    return valid.astype(np.int64)


def _check_context(given: Context, wanted: Mapping[str, Port], batch: int) -> None:
    if given.keys() != wanted.keys():
        what = f"the context has {sorted(given) or 'nothing'}, the model reads {sorted(wanted) or 'none'}"
        raise DataInvalid(what)
    for name, port in wanted.items():
        array = given[name]
        sizes = (batch, *port.shape[1:])
        fits = array.ndim == len(sizes) and all(
            not isinstance(size, int) or size == found for size, found in zip(sizes, array.shape, strict=True)
        )
        if array.dtype != port.dtype or not fits:
            expected = f"{port.dtype} {[size if isinstance(size, int) else '?' for size in sizes]}"
            raise DataInvalid(f"{name!r} is {array.dtype} {list(array.shape)}, the model reads {expected}")
