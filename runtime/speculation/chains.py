"""Run an unrolled decoder: one call reads what is new and says several tokens, its caches go on as a decoder's do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qexport.errors import DataInvalid, ModelInvalid, ResourceExhausted
from qexport.passes.portable import (
    CHANCES,
    IDS,
    LAST,
    POSITIONS,
    SHARPNESS,
    TOKENS,
    UNIFORM,
    WRITE,
    present_name,
    step_name,
)
from qexport.runtime.backends.choose import open_session
from qexport.runtime.cache import Cache, Room
from qexport.runtime.idle import Idle
from qexport.runtime.session import Array, Binding, Buffer, Session, SessionOptions
from qexport.runtime.signature import read_signature
from qexport.runtime.speculation.proposal import NO_EFFORT, Chances, Effort

LARGEST = 64 << 20
"""Bytes of the largest file that is unrolled: each session has weights of its own, packed for the processor, and a
step of a larger model takes so long that what is spent around it does not matter."""
COLUMNS = 256  # that buffers have at first: they are small, and growing takes longer than reading what is empty
USUAL = 2  # tokens of a row that are read in one call at least, padding included: one or two are new, as it happens
WIDEST = 256  # tokens of a row that are read in one call
_STEP_BY_STEP = "let it decode step by step"
_NARROW, _FRAMES, _CHANCES = 16, 128, 16 << 20  # tokens, shapes, bytes, up to which arrays are kept for the next call


class Kind(NamedTuple):
    """Which of the sessions."""

    steps: int
    """Tokens of a call."""
    drawn: bool
    """Whether they are drawn, or else the most likely."""
    vocabulary: int
    """Tokens that can be chosen, the first ones."""


class Chains:
    """The sessions of one decoder, opened as they are asked for; requests share them.

    Attributes:
        signature: What the decoder asks for.
        memory: Where its caches lie.
    """

    def __init__(self, model: bytes | Path, options: SessionOptions | None = None) -> None:
        """Read a model.

        Args:
            model: The file, or its bytes, with all weights inside.
            options: How to run.

        Raises:
            ResourceExhausted: It is too large to be worth it.
            ModelInvalid: It cannot be unrolled; the reason is told.
        """
        size = len(model) if isinstance(model, bytes) else model.stat().st_size
        if size > LARGEST:
            what = f"a draft of {size >> 20} MiB is not unrolled, those of up to {LARGEST >> 20} MiB are"
            raise ResourceExhausted(what, hint=_STEP_BY_STEP)
        self._options = options or SessionOptions()
        session = open_session(model, self._options)
        self.signature, self.memory = read_signature(session), session.memory
        session.close()
        if self.signature.context or self.signature.columns:
            what = "its caches have a fixed size" if self.signature.columns else f"it reads {[*self.signature.context]}"
            raise ModelInvalid(f"the decoder is not unrolled: {what}", hint=_STEP_BY_STEP)
        self._model = _load(model)
        self._sessions: dict[Kind, Session] = {}
        self._lock = Lock()
        self._idle: Idle[Chain] = Idle()

    def session(self, kind: Kind) -> Session:
        """The session for this many steps; the first time it is unrolled and loaded."""
        with self._lock:
            if kind not in self._sessions:
                self._sessions[kind] = open_session(_unrolled(self._model, kind), self._options)
            return self._sessions[kind]

    def take(self, vocabulary: int) -> Chain:
        """A chain with nothing in it, one that was given back if there is one like it."""
        known = self._idle.take()
        return known if known is not None and known.asked == vocabulary else Chain(self, vocabulary)

    def give_back(self, chain: Chain) -> None:
        """Keep what the next one needs as well, if that is little."""
        if chain.small:
            self._idle.give(chain)

    def close(self) -> None:
        """Free the sessions; a second time does nothing."""
        self._idle.close()
        with self._lock:
            for session in self._sessions.values():
                session.close()
            self._sessions.clear()


def _load(model: bytes | Path) -> Any:
    """The graph, if it can be unrolled."""
    import onnx
    import onnx_ir as ir

    from qexport.passes.unroll import refusal

    proto = onnx.ModelProto.FromString(model if isinstance(model, bytes) else model.read_bytes())
    outside = [weight.name for weight in proto.graph.initializer if weight.data_location == onnx.TensorProto.EXTERNAL]
    loaded = ir.from_proto(proto)
    reason = f"the weight {outside[0]} lies in another file" if outside else refusal(loaded.graph)
    if reason is not None:
        raise ModelInvalid(f"the decoder is not unrolled: {reason}", hint=_STEP_BY_STEP)
    return loaded


def _unrolled(model: Any, kind: Kind) -> bytes:
    import onnx_ir as ir

    from qexport.passes.unroll import Unroll

    work = model.clone()
    Unroll(kind.steps, kind.drawn, kind.vocabulary)(work)
    data: bytes = ir.to_proto(work).SerializeToString()
    return data


@dataclass(frozen=True, slots=True)
class _Frame:
    """The arrays of all calls of one shape, which a binding reads and writes.

    Attributes:
        numbers: All integers that are read, one behind the other: tokens and positions ``[batch, width]``, the columns
            that the first tokens go to and the places of the last ``[batch]``.
        uniform: ``[batch, steps]``.
        sharpness: ``[1]``, what logits are multiplied by.
        tokens: ``[batch, steps]``, what is said.
        chances: ``[batch, steps, vocabulary]``, what each was drawn from; empty where none were.
    """

    numbers: NDArray[np.int64]
    uniform: NDArray[np.float64]
    sharpness: NDArray[np.float32]
    tokens: NDArray[np.int64]
    chances: Chances
    binding: Binding


@dataclass(frozen=True, slots=True)
class Draw:
    """How to draw.

    Attributes:
        sharpness: One over the temperature.
        uniform: Numbers in [0, 1), ``[batch, steps]``.
    """

    sharpness: float
    uniform: Sequence[Sequence[float]]


class Chain:
    """The state of one batch; not for several threads at once.

    Attributes:
        effort: What it did since it was made.
        asked: The vocabulary that was asked for.
        vocabulary: Tokens that are chosen from.
    """

    def __init__(self, chains: Chains, vocabulary: int | None = None) -> None:
        """Make room for one row.

        Args:
            chains: The sessions.
            vocabulary: Tokens that can be chosen, the first ones; all by default.
        """
        self._chains, self._size = chains, chains.signature.vocabulary
        self.asked, self.vocabulary = vocabulary, min(vocabulary or self._size, self._size)
        self.effort: Effort = NO_EFFORT
        self._frames: dict[tuple[int, Kind, int], _Frame] = {}  # by capacity, too
        self._cache = self._new_cache(1)

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each row so far."""
        return self._cache.starts

    @property
    def small(self) -> bool:
        """Whether its buffers are worth keeping while nobody needs them."""
        return self._cache.small

    def reset(self, batch: int) -> None:
        """Forget everything and make room for ``batch`` rows."""
        if not self._cache.reset(batch):
            self._frames.clear()
            self._cache = self._new_cache(batch)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows in this order; the others are done."""
        self._cache.keep(rows)
        self._frames.clear()

    def rollback(self, lengths: Sequence[int]) -> None:
        """Go back to these lengths, in no time."""
        self._cache.rollback(lengths)

    def say(
        self, parts: Sequence[Sequence[int]], steps: int, draw: Draw | None = None
    ) -> tuple[list[list[int]], Chances]:
        """Read what is new of every row, and say what follows; all of that but the last is read as well.

        Args:
            parts: What is new, one token or more of at least one row; a row without any is left alone.
            steps: How many tokens to say, one or more.
            draw: How to draw them; without, the most likely are said.

        Returns:
            Tokens ``[batch, steps]``, and what each was drawn from, ``[batch, steps, vocabulary]``, which the next
            call writes over; empty where nothing was drawn. Behind the positions that the model has, and in rows that
            were left alone, they mean nothing.

        Raises:
            DataInvalid: No token of the model, or more than it has positions for.
        """
        for part in parts:
            if part and (max(part) >= self._size or min(part) < 0):
                wrong = max(part) if max(part) >= self._size else min(part)
                what = f"token {wrong} does not exist, the draft has a vocabulary of {self._size}"
                raise DataInvalid(what, hint="is the tokenizer that of the draft?")
        for first in range(0, max(map(len, parts)) - WIDEST, WIDEST):
            heads = [part[:-WIDEST][first : first + WIDEST] for part in parts]
            self._call(heads, Kind(1, False, self.vocabulary), None)
        frame = self._call([part[-WIDEST:] for part in parts], Kind(steps, draw is not None, self.vocabulary), draw)
        return frame.tokens.tolist(), frame.chances

    def _call(self, parts: Sequence[Sequence[int]], kind: Kind, draw: Draw | None) -> _Frame:
        cache, ahead, counts = self._cache, kind.steps - 1, [len(part) for part in parts]
        cache.demand(counts)
        width, start, most = max(USUAL, *counts), cache.starts, cache.room.most
        if cache.reserve(width + ahead):
            self._frames.clear()
        frame = self._frames.get((cache.capacity, kind, width)) or self._new_frame(kind, width)
        frame.numbers[:] = _numbers(parts, start, width)
        if draw is not None:
            frame.uniform[...], frame.sharpness[...] = draw.uniform, draw.sharpness
        began = perf_counter()
        frame.binding.run()
        self.effort = _with(self.effort, perf_counter() - began, start, counts, ahead)
        after = [count and count + ahead for count in counts]
        if most is not None:
            after = [min(more, most - length) for more, length in zip(after, start, strict=True)]
        cache.advance(after)
        return frame

    def _new_cache(self, batch: int) -> Cache:
        found = self._chains.signature
        return Cache(found.caches, found.dtype, batch, Room(COLUMNS, found.positions), self._chains.memory)

    def _new_frame(self, kind: Kind, width: int) -> _Frame:
        """Arrays for calls of this shape, bound together with the buffers."""
        cache, batch, steps = self._cache, self._cache.batch, kind.steps
        size, pairs = batch * width, 2 * batch * width
        numbers = np.zeros(pairs + 2 * batch, np.int64)
        ids, positions = numbers[:size].reshape(batch, width), numbers[size:pairs].reshape(batch, width)
        start, last = numbers[pairs : pairs + batch], numbers[pairs + batch :]
        tokens, uniform = np.zeros((batch, steps), np.int64), np.zeros((batch, steps))
        sharpness = np.ones(1, np.float32)
        chances: Chances = np.zeros((batch, steps, kind.vocabulary if kind.drawn else 0))
        inputs: dict[str, Array | Buffer] = {WRITE: start, LAST: last, **cache.buffers}
        inputs |= {IDS: ids, POSITIONS: positions}
        outputs: dict[str, Array | Buffer] = {TOKENS: tokens}
        for past, buffer in cache.buffers.items():
            present = present_name(past)
            outputs |= {present: buffer, **{step_name(step, present): buffer for step in range(1, steps)}}
        if kind.drawn:
            inputs |= {UNIFORM: uniform, SHARPNESS: sharpness}
            outputs[CHANCES] = chances
        binding = self._chains.session(kind).bind(inputs, outputs)
        frame = _Frame(numbers, uniform, sharpness, tokens, chances, binding)
        held = sum(known.chances.nbytes for known in self._frames.values())
        if width <= _NARROW and len(self._frames) < _FRAMES and held + chances.nbytes <= _CHANCES:
            self._frames[cache.capacity, kind, width] = frame
        return frame


def _numbers(parts: Sequence[Sequence[int]], start: Sequence[int], width: int) -> list[int]:
    """Tokens, positions, first columns and last places of all rows.

    What is behind the tokens of a shorter row goes into columns that are written over, at a position that is there.
    """
    ids: list[int] = []
    positions: list[int] = []
    for part, at in zip(parts, start, strict=True):
        end = at + len(part)
        padding = width - len(part)
        ids += part
        positions += range(at, end)
        if padding:
            ids += [0] * padding
            positions += [max(end - 1, 0)] * padding
    return [*ids, *positions, *start, *(max(len(part) - 1, 0) for part in parts)]


def _with(done: Effort, seconds: float, start: Sequence[int], counts: Sequence[int], ahead: int) -> Effort:
    """And a call: a step that reads what is new, and ``ahead`` more, each of which reads all weights again."""
    valid = sum(start) * (1 + ahead)
    valid += sum(count * ahead + ahead * (ahead - 1) // 2 for count in counts if count)
    return done.plus(seconds, 1 + ahead, max(counts) + ahead, valid)
