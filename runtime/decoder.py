"""Run a decoder in the portable layout token by token, and back: prompts, single steps, wide steps, rollback.

Past and present of a layer are one buffer, which the graph writes into where it lies (``runtime.cache``); what
distinguishes the rows of a batch is only where they write and which positions they are told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.errors import DataInvalid, EnvironmentMismatch, UsageError
from qexport.passes.portable import IDS, LOGITS, POSITIONS, WRITE, present_name
from qexport.runtime.cache import LEAST, Cache, Counts
from qexport.runtime.session import Binding, Port, Session, SessionOptions
from qexport.runtime.signature import read_signature

Context: TypeAlias = Mapping[str, NDArray[Any]]  # inputs that stay the same for a whole sequence
Logits: TypeAlias = NDArray[np.float32]  # [batch, sequence, vocabulary]

CPU = "CPUExecutionProvider"
_NARROW, _SMALL = 16, 1 << 22  # tokens of a row, bytes of logits: up to these a step is kept for the next like it


@dataclass(frozen=True, slots=True)
class _Step:
    """The arrays of all calls of one shape, which a binding reads and writes.

    Attributes:
        tokens: ``[batch, width]``.
        unsigned: The same numbers in a row; a negative one is large without its sign.
        offsets: 0, 1, 2 ... ``width``.
        positions: ``[batch, width]``.
        start: ``[batch]``, the columns that the first tokens go to.
        logits: ``[batch, width, vocabulary]``.
        kept: Whether another call will use it.
    """

    tokens: NDArray[np.int64]
    unsigned: NDArray[np.uint64]
    offsets: NDArray[np.int64]
    positions: NDArray[np.int64]
    start: Counts
    logits: Logits
    kept: bool
    binding: Binding


class Decoder:
    """A decoder with the state of one batch of sequences; not for several threads at once.

    Attributes:
        signature: What the graph asks for.
        seconds: Time inside the backend since ``reset``.
    """

    def __init__(
        self, model: bytes | Path | Session, options: SessionOptions | None = None, *, capacity: int = LEAST
    ) -> None:
        """Load a model, or share one that is loaded.

        Args:
            model: The file, its bytes, or a session, which stays open when this is closed; each of several decoders
                of one session has a state of its own, and each may run in a thread of its own.
            options: How to run; on the processor, where the buffers are.
            capacity: Columns that buffers have at first, a power of two.

        Raises:
            ModelInvalid: The graph is not in the portable layout.
            BuildFailed: onnxruntime cannot load it.
        """
        self._session: Session | None = model if isinstance(model, Session) else _open(model, options)
        self.signature = read_signature(self._session)
        self.seconds = 0.0
        self._least = capacity
        self._steps: dict[tuple[int, ...], _Step] = {}
        self._cache: Cache | None = None
        self._context: dict[str, NDArray[Any]] = {}
        if not self.signature.context:
            self.reset()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def lengths(self) -> Counts:
        """Tokens of each row so far."""
        return self._started().lengths

    @property
    def capacity(self) -> int:
        """Columns of the buffers now."""
        return self._started().capacity

    @property
    def limit(self) -> int | None:
        """Tokens that a row may have; ``None`` where the model does not say."""
        return self.signature.positions

    @property
    def widest(self) -> int | None:
        """Tokens of a row that the backend reads at once; ``None`` for any number. More are read in pieces."""
        return None

    def close(self) -> None:
        """Free the buffers; a second time does nothing."""
        self._session = self._cache = None
        self._steps.clear()
        self._context = {}

    def reset(self, batch: int = 1, context: Context | None = None) -> None:
        """Forget everything and make room for ``batch`` sequences.

        Args:
            batch: How many.
            context: The inputs that ``signature.context`` names, such as what an encoder found, batch axis first.

        Raises:
            DataInvalid: An input of the context is missing, unknown, or of another type or shape.
        """
        self._opened()
        found, given = self.signature, dict(context or {})
        _check_context(given, found.context, batch)
        self.seconds = 0.0
        if self._cache is not None and self._cache.reset(batch) and not given:
            return
        self._steps.clear()
        self._cache = Cache(found.caches, found.dtype, batch, least=self._least, most=found.positions)
        self._context = {name: np.ascontiguousarray(array) for name, array in given.items()}

    def extend(self, ids: NDArray[np.integer[Any]], counts: Sequence[int] | Counts | None = None) -> Logits:
        """Read more tokens of every row: a prompt, one token, or several that are to be verified.

        Args:
            ids: Tokens ``[batch, sequence]``.
            counts: How many of them belong to each row, ``[batch]``, zero or more; what stands behind is ignored.

        Returns:
            Logits ``[batch, sequence, vocabulary]``, a new array; those behind a row's count mean nothing.

        Raises:
            DataInvalid: Not integers of that shape, outside of the vocabulary, or more than the model has positions
                for. The state is as before.
        """
        cache = self._started()
        batch, width = _check_shape(ids, cache.batch)
        valid = [width] * batch if counts is None else _check_counts(counts, batch, width)
        if cache.reserve(valid, width):
            self._steps.clear()
        step = self._steps.get(ids.shape) or self._new_step(cache, width)
        step.tokens[...] = ids
        step.start[...] = cache.starts
        np.add(step.start[:, None], step.offsets, out=step.positions)
        if counts is not None:
            last = np.array(valid)[:, None] - 1
            step.tokens[step.offsets > last] = 0
            np.minimum(step.positions, np.maximum(step.start[:, None] + last, 0), out=step.positions)
        if max(step.unsigned.tolist()) >= self.signature.vocabulary:
            raise _no_such_token(step.tokens, self.signature.vocabulary)
        began = perf_counter()
        step.binding.run()
        self.seconds += perf_counter() - began
        cache.advance(valid)
        return step.logits.copy() if step.kept else step.logits

    def rollback(self, lengths: int | Sequence[int] | Counts) -> None:
        """Go back to ``lengths`` tokens, one number or one per row, in no time: the next step overwrites.

        Raises:
            DataInvalid: A row does not have that many.
        """
        cache = self._started()
        if type(lengths) is int:
            cache.rollback([lengths] * cache.batch)
            return
        asked = np.asarray(lengths)
        if asked.dtype.kind not in "iu":
            raise DataInvalid(f"lengths are {asked.dtype}, expected integers")
        cache.rollback(asked.tolist() if asked.ndim else [int(asked)] * cache.batch)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch in this order; the others are done, and what they held is freed.

        Raises:
            DataInvalid: There is no such row, or none is kept.
        """
        cache = self._started()
        cache.keep(rows)
        self._context = {name: array[list(rows)] for name, array in self._context.items()}
        self._steps.clear()

    def _new_step(self, cache: Cache, width: int) -> _Step:
        """Arrays for calls of this width, bound together with the buffers and the context."""
        tokens = np.zeros((cache.batch, width), np.int64)
        positions, start = np.zeros_like(tokens), np.zeros(cache.batch, np.int64)
        logits: Logits = np.empty((*tokens.shape, self.signature.vocabulary), np.float32)
        binding = self._opened().bind(
            {IDS: tokens, POSITIONS: positions, WRITE: start, **cache.buffers, **self._context},
            {LOGITS: logits, **{present_name(name): buffer for name, buffer in cache.buffers.items()}},
        )
        kept = width <= _NARROW and logits.nbytes <= _SMALL
        flat = tokens.view(np.uint64).reshape(-1)
        step = _Step(tokens, flat, np.arange(width), positions, start, logits, kept, binding)
        if kept:
            self._steps[tokens.shape] = step
        return step

    def _opened(self) -> Session:
        if self._session is None:
            raise UsageError("the decoder is closed")
        return self._session

    def _started(self) -> Cache:
        if self._cache is None:
            self._opened()
            needed = ", ".join(self.signature.context)
            raise DataInvalid(f"the model reads {needed} once per sequence", hint="give them to reset() first")
        return self._cache


def _open(model: bytes | Path, options: SessionOptions | None) -> Session:
    chosen = options or SessionOptions()
    if chosen.providers != (CPU,):
        what = f"decoders run on {CPU}, not on {', '.join(chosen.providers)}"
        raise EnvironmentMismatch(what, hint="build an engine for a GPU")
    return Session(model, chosen)


def _check_shape(ids: NDArray[Any], batch: int) -> tuple[int, int]:
    """Rows and tokens of a row."""
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise DataInvalid(f"tokens are {ids.dtype} {list(ids.shape)}, expected integers [batch, sequence], not empty")
    if len(ids) != batch:
        raise DataInvalid(f"tokens of {len(ids)} rows for a batch of {batch}", hint="reset() sets the batch")
    return ids.shape[0], ids.shape[1]


def _check_counts(counts: Sequence[int] | Counts, batch: int, width: int) -> list[int]:
    """Valid tokens of each row."""
    valid = np.asarray(counts)
    found: list[int] = valid.tolist()
    if valid.shape != (batch,) or valid.dtype.kind not in "iu" or min(found) < 0 or max(found) > width:
        raise DataInvalid(f"counts are {found}, expected {batch} integers from 0 to {width}")
    return found


def _no_such_token(tokens: NDArray[np.int64], vocabulary: int) -> DataInvalid:
    wrong = tokens[(tokens < 0) | (tokens >= vocabulary)][0]
    what = f"token {wrong} does not exist, the model has a vocabulary of {vocabulary}"
    return DataInvalid(what, hint="is the tokenizer that of the model?")


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
