"""Run a decoder in the portable layout token by token, and back: prompts, single steps, wide steps, rollback.

Past and present of a layer are one buffer, which the graph writes into where it lies (``runtime.cache``); what
distinguishes the rows of a batch is only where they write and which positions they are told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.errors import DataInvalid, UsageError
from qexport.passes.portable import IDS, LOGITS, POSITIONS, WRITE, present_name
from qexport.runtime.backends.choose import open_session
from qexport.runtime.backends.host import HOST
from qexport.runtime.cache import LEAST, Cache, Counts, Room
from qexport.runtime.demands import is_integer
from qexport.runtime.session import Array, Binding, Buffer, Port, Session, SessionOptions
from qexport.runtime.signature import read_signature
from qexport.runtime.widths import Widths, find_widths

Context: TypeAlias = Mapping[str, NDArray[Any]]  # inputs that stay the same for a whole sequence
Logits: TypeAlias = NDArray[np.float32]  # [batch, sequence, vocabulary]

_INT = np.dtype(np.int64)
_NARROW, _SMALL = 16, 1 << 26  # tokens of a row, bytes of logits: up to these a step is kept for the next like it


@dataclass(frozen=True, slots=True)
class _Step:
    """The arrays of all calls of one shape, which a binding reads and writes beside the buffers.

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


class Decoder:
    """A decoder with the state of one batch of sequences; not for several threads at once.

    Attributes:
        signature: What the graph asks for.
        seconds: Time inside the backend since ``reset``.
    """

    def __init__(
        self, model: bytes | str | Path | Session, options: SessionOptions | None = None, *, capacity: int = LEAST
    ) -> None:
        """Load a model, or share one that is loaded.

        Args:
            model: What ``open_session`` takes, or a session, which stays open when this is closed; each of several
                decoders of one session has a state of its own, and each may run in a thread of its own.
            options: How to run.
            capacity: Columns that buffers have at first and grow by, a power of two; engines fix them.

        Raises:
            ModelInvalid: The graph is not in the portable layout.
            QexportError: As ``open_session``.
        """
        self._owned = isinstance(model, bytes | str | Path)
        self._session: Session | None = open_session(model, options) if isinstance(model, bytes | str | Path) else model
        self.signature = read_signature(self._session)
        self.seconds = 0.0
        self._least = capacity
        self._presents = {name: present_name(name) for name in self.signature.caches}
        self._steps: dict[tuple[int, ...], _Step] = {}
        self._bindings: dict[tuple[int, ...], Binding] = {}  # of steps to buffers, by capacity and shape
        self._cache: Cache | None = None
        self._widths = Widths()
        self._context: dict[str, Array] = {}
        self._placed: dict[str, Buffer] = {}
        if not self.signature.context:
            self.reset()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def lengths(self) -> Counts:
        """Tokens of each row so far."""
        return self._started().lengths

    @property
    def starts(self) -> Sequence[int]:
        """The same as plain numbers, which stay as they are."""
        return self._started().starts

    @property
    def capacity(self) -> int:
        """Columns of the buffers now."""
        return self._started().capacity

    @property
    def small(self) -> bool:
        """Whether its buffers are worth keeping while nobody needs them."""
        return self._cache is not None and self._cache.small

    @property
    def limit(self) -> int | None:
        """Tokens that a row may have; ``None`` where the model does not say."""
        return self._room(1 if self._cache is None else self._cache.batch).most

    @property
    def widest(self) -> int | None:
        """Tokens of a row that the backend reads at once; ``None`` for any number. More are read in pieces."""
        widths = find_widths(self._opened().profiles, 1) if self._cache is None else self._widths
        return widths.widest

    def close(self) -> None:
        """Free the buffers, and the model if it was loaded here; a second time does nothing."""
        self._drop()
        if self._owned and self._session is not None:
            self._session.close()
        self._session = None

    def reset(self, batch: int = 1, context: Context | None = None) -> None:
        """Forget everything and make room for ``batch`` sequences.

        Args:
            batch: How many.
            context: The inputs that ``signature.context`` names, such as what an encoder found, batch axis first.

        Raises:
            DataInvalid: An input of the context is missing, unknown, or of another type or shape; or an engine is not
                built for such a batch.
        """
        session = self._opened()
        if not (is_integer(batch) and batch >= 1):
            raise DataInvalid(f"the batch is {batch!r}, expected at least one row")
        found, given = self.signature, dict(context or {})
        _check_context(given, found.context, batch)
        self.seconds = 0.0
        if self._cache is not None and self._cache.reset(batch) and not given:
            return
        widths = find_widths(session.profiles, batch)
        self._drop()
        self._widths = widths
        self._cache = Cache(found.caches, found.dtype, batch, self._room(batch), session.memory)
        self._set_context({name: np.ascontiguousarray(array) for name, array in given.items()})

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
        cache.demand(valid)
        if self._fits(cache, width):
            return self._step(cache, ids, valid, whole=counts is None)
        _check_tokens(ids[np.arange(width) < np.array(valid)[:, None]], self.signature.vocabulary)
        return self._pieces(cache, ids, valid)

    def rollback(self, lengths: int | Sequence[int] | Counts) -> None:
        """Go back to ``lengths`` tokens, one number or one per row, in no time: the next step overwrites.

        Raises:
            DataInvalid: A row does not have that many.
        """
        cache = self._started()
        if type(lengths) is int:
            cache.rollback([lengths] * cache.batch)
            return
        if type(lengths) is list and set(map(type, lengths)) == {int}:
            cache.rollback(lengths)
            return
        asked = np.asarray(lengths)
        if asked.dtype.kind not in "iu" or asked.ndim > 1:
            raise DataInvalid(f"lengths are {asked.dtype} {list(asked.shape)}, expected an integer for each row")
        cache.rollback(asked.tolist() if asked.ndim else [int(asked)] * cache.batch)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch in this order; the others are done, and what they held is freed.

        Raises:
            DataInvalid: There is no such row, or none is kept.
        """
        cache, asked = self._started(), np.asarray(rows)
        if asked.ndim != 1 or (asked.size and asked.dtype.kind not in "iu"):
            raise DataInvalid(f"rows are {asked.dtype} {list(asked.shape)}, expected a list of integers")
        kept: list[int] = asked.tolist()
        widths = find_widths(self._opened().profiles, len(kept)) if kept else self._widths
        self._forget_steps()
        cache.keep(kept)
        self._widths = widths
        self._set_context({name: array[kept] for name, array in self._context.items()})

    def _fits(self, cache: Cache, width: int) -> bool:
        """Whether one call reads this many tokens: a profile has them, and there is room for the padding of all."""
        return not cache.room.fixed or (self._widths.first(width) == width and width <= cache.free)

    def _pieces(self, cache: Cache, ids: NDArray[np.integer[Any]], valid: Sequence[int]) -> Logits:
        """Read in calls that the backend takes; either all of it or, where one fails, nothing."""
        before, counts = list(cache.starts), np.array(valid)
        logits: Logits = np.zeros((*ids.shape, self.signature.vocabulary), np.float32)
        at = 0
        try:
            while at < counts.max():
                width = self._widths.first(min(int(counts.max()) - at, cache.free))
                part = np.clip(counts - at, 0, width)
                logits[:, at : at + width] = self._step(cache, ids[:, at : at + width], part.tolist(), whole=False)
                at += width
        except BaseException:
            cache.rollback(before)
            raise
        return logits

    def _step(self, cache: Cache, ids: NDArray[np.integer[Any]], valid: Sequence[int], *, whole: bool) -> Logits:
        """One call; ``whole`` says that all tokens of all rows count."""
        if cache.reserve(ids.shape[1]):
            self._forget_bindings()
        step = self._steps.get(ids.shape) or self._new_step(cache, ids.shape[1])
        binding = self._bindings.get((cache.capacity, *ids.shape)) or self._bind(cache, step)
        step.tokens[...] = ids
        step.start[...] = cache.starts
        np.add(step.start[:, None], step.offsets, out=step.positions)
        if not whole:
            last = np.array(valid)[:, None] - 1
            step.tokens[step.offsets > last] = 0
            np.minimum(step.positions, np.maximum(step.start[:, None] + last, 0), out=step.positions)
        if max(step.unsigned.tolist()) >= self.signature.vocabulary:
            _check_tokens(step.tokens, self.signature.vocabulary)
        began = perf_counter()
        try:
            binding.run()
        finally:
            self.seconds += perf_counter() - began
            if not step.kept:
                binding.close()
        cache.advance(valid)
        return step.logits.copy() if step.kept else step.logits

    def _new_step(self, cache: Cache, width: int) -> _Step:
        """Arrays for calls of this width."""
        session, batch = self._opened(), cache.batch
        size = batch * width * self.signature.vocabulary * np.dtype(np.float32).itemsize
        kept = width <= _NARROW and size <= _SMALL
        make = session.memory.host if kept else HOST.host
        tokens, positions = (make((batch, width), _INT) for _ in range(2))
        start = make((batch,), _INT)
        logits = make((batch, width, self.signature.vocabulary), np.dtype(np.float32))
        flat = tokens.view(np.uint64).reshape(-1)
        step = _Step(tokens, flat, np.arange(width), positions, start, logits, kept)
        if kept:
            self._steps[tokens.shape] = step
        return step

    def _bind(self, cache: Cache, step: _Step) -> Binding:
        """The arrays together with the buffers and the context."""
        given: dict[str, Array | Buffer] = {IDS: step.tokens, POSITIONS: step.positions, WRITE: step.start}
        written = {self._presents[name]: buffer for name, buffer in cache.buffers.items()}
        binding = self._opened().bind({**given, **self._placed, **cache.buffers}, {LOGITS: step.logits, **written})
        if step.kept:
            self._bindings[cache.capacity, *step.tokens.shape] = binding
        return binding

    def _room(self, batch: int) -> Room:
        """Columns of the buffers. In those of an engine one stays free for the padding of rows that wait."""
        positions, columns = self.signature.positions, self.signature.columns
        if columns is None:
            return Room(self._least, positions)
        ends = columns - 1 if batch > 1 else columns
        return Room(columns, ends if positions is None else min(ends, positions), fixed=True)

    def _set_context(self, context: dict[str, Array]) -> None:
        """Put the context where the session runs."""
        memory = self._opened().memory
        self._free_context()
        self._context, self._placed = context, {name: memory.put(array) for name, array in context.items()}

    def _free_context(self) -> None:
        for buffer in self._placed.values():
            self._opened().memory.free(buffer)
        self._context, self._placed = {}, {}

    def _forget_bindings(self) -> None:
        for binding in self._bindings.values():
            binding.close()
        self._bindings.clear()

    def _forget_steps(self) -> None:
        self._forget_bindings()
        self._steps.clear()

    def _drop(self) -> None:
        self._forget_steps()
        if self._cache is not None:
            self._cache.close()
        self._cache = None
        self._free_context()

    def _opened(self) -> Session:
        if self._session is None:
            raise UsageError("the decoder is closed")
        return self._session

    def _started(self) -> Cache:
        if self._cache is None:
            self._opened()
            needed = ", ".join(self.signature.context)
            what = f"the model reads {needed} once per sequence" if needed else "there are no buffers for any row"
            raise DataInvalid(what, hint="give them to reset() first" if needed else "reset() makes them")
        return self._cache


def _check_shape(ids: NDArray[Any], batch: int) -> tuple[int, int]:
    """Rows and tokens of a row."""
    if not isinstance(ids, np.ndarray):
        raise DataInvalid(f"tokens are a {type(ids).__name__}, expected an array", hint="np.array([[...]]) makes one")
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


def _check_tokens(tokens: NDArray[np.integer[Any]], vocabulary: int) -> None:
    wrong = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if wrong.size:
        what = f"token {wrong[0]} does not exist, the model has a vocabulary of {vocabulary}"
        raise DataInvalid(what, hint="is the tokenizer that of the model?")


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
