"""Texts of concurrent callers in one batch: a bounded queue, a thread that takes what goes well together, futures."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from qexport.errors import BuildFailed, ResourceExhausted, UsageError
from qexport.runtime.demands import demand_integer, is_number
from qexport.runtime.embedding.embedder import Embedder, Vector, Vectors, demand_list
from qexport.runtime.embedding.options import EmbedStats
from qexport.runtime.tokenizing import Encoded

WAIT = 0.002  # seconds
MOST_WAIT, MOST_WORKERS = 60, 1024
LOOK = 256  # waiting texts among which a batch is looked for
_ENDLESS = 1e9  # seconds, of which there is a number that no clock holds


@dataclass(eq=False, slots=True)
class _Request:
    """What one caller waits for."""

    vectors: list[Vector | None]
    missing: int
    known: bool = False  # whether the future has been told that somebody works on it, or that nobody will
    future: Future[Vectors] = field(default_factory=Future)


@dataclass(eq=False, slots=True)
class _Waiting:
    """One text of a request."""

    request: _Request
    index: int
    row: Encoded
    since: float


class Batcher:
    """Embeds for many callers at once; they wait for futures, which may be cancelled.

    The text that has waited longest is served next, with those of the others that fit best beside it. While a batch
    runs, the next ones collect. A batch starts as soon as as many texts wait as the last one had, so that a caller who
    is alone waits for nobody, and those who were just answered may come back. What is wrong with a text is told to its
    caller alone, also where it shows only in the model.
    """

    def __init__(self, embedder: Embedder, *, wait: float = WAIT, room: int = 1024, workers: int = 1) -> None:
        """Start to serve; the embedder stays the caller's, to be closed after this.

        Args:
            embedder: What computes.
            wait: Seconds that a text waits at most for as many others as the last batch had, up to 60.
            room: Texts that may wait; who brings more waits for room.
            workers: Batches that run at the same time.
        """
        if not (is_number(wait) and 0 <= wait <= MOST_WAIT):
            raise UsageError(f"wait is {wait!r}, expected seconds from 0 to {MOST_WAIT}")
        demand_integer("room", room, 1)
        demand_integer("workers", workers, 1, MOST_WORKERS)
        self._embedder, self._wait, self._room = embedder, wait, room
        self._waiting: list[_Waiting] = []
        self._changed = threading.Condition()
        self._closing, self._usual = False, 0
        self._stats = EmbedStats()
        self._workers = [threading.Thread(target=self._work, name="embed", daemon=True) for _ in range(workers)]
        for worker in self._workers:
            worker.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stats(self) -> EmbedStats:
        """What was computed so far."""
        found = EmbedStats()
        with self._changed:
            found.add(self._stats)
        return found

    def embed(self, texts: Sequence[str], timeout: float | None = None) -> Vectors:
        """Vectors of texts in their order, as ``Embedder.embed``; waits for room and for the result.

        Raises:
            TimeoutError: It took longer than ``timeout`` seconds; the texts are no longer waited for.
        """
        timeout = _seconds(timeout)
        end = None if timeout is None else time.monotonic() + timeout
        future = self.submit(texts, timeout)
        try:
            return future.result(None if end is None else max(0.0, end - time.monotonic()))
        except TimeoutError:
            future.cancel()
            raise

    def submit(self, texts: Sequence[str], timeout: float | None = None) -> Future[Vectors]:
        """Bring texts; ``asyncio.wrap_future`` makes the result one that can be awaited.

        Args:
            texts: What to embed.
            timeout: Seconds to wait for room; 0 does not wait, ``None`` waits for as long as it takes.

        Raises:
            DataInvalid: A text cannot be embedded.
            ResourceExhausted: There was no room in time. Nothing of the request is computed.
            UsageError: The batcher is closed, or ``texts`` is no list.
        """
        demand_list(texts)
        timeout = _seconds(timeout)
        rows = self._embedder.tokenize(list(texts))
        request = _Request([None] * len(rows), len(rows))
        if not rows:
            request.future.set_result(self._embedder.embed([]))
        end = None if timeout is None else time.monotonic() + timeout
        for index, row in enumerate(rows):
            self._bring(_Waiting(request, index, row, time.monotonic()), end)
        return request.future

    def close(self, *, drain: bool = True) -> None:
        """Take nothing more, and end when what waits is computed, or cancelled without ``drain``."""
        with self._changed:
            self._closing = True
            left: list[_Request] = []
            if not drain:
                left = [request for request in dict.fromkeys(w.request for w in self._waiting) if _drop(request)]
                self._waiting.clear()
            self._changed.notify_all()
        for request in left:
            _fail(request, UsageError("the batcher was closed before the request was done"))
        for worker in self._workers:
            if worker is not threading.current_thread():
                worker.join()

    # ---------------------------------------------------------------- callers

    def _bring(self, waiting: _Waiting, end: float | None) -> None:
        """Put one text into the queue as soon as there is room; where that fails, none of its request stays there."""
        with self._changed:
            try:
                self._wait_for_room(end)
            except BaseException:
                self._withdraw(waiting.request)
                raise
            self._waiting.append(waiting)
            self._changed.notify_all()

    def _wait_for_room(self, end: float | None) -> None:
        while len(self._waiting) >= self._room and not self._closing:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                what = f"{len(self._waiting)} texts are waiting, there is no room for more"
                raise ResourceExhausted(what, hint="try again later, or allow more to wait")
            self._changed.wait(left)
        if self._closing:
            raise UsageError("the batcher is closed", hint="open another one")

    def _withdraw(self, request: _Request) -> None:
        request.future.cancel()
        self._keep([other for other in self._waiting if other.request is not request])

    def _keep(self, waiting: list[_Waiting]) -> None:
        """Let only these wait; whoever waits for room hears of it."""
        if len(waiting) < len(self._waiting):
            self._changed.notify_all()
        self._waiting = waiting

    # ---------------------------------------------------------------- workers

    def _work(self) -> None:
        while batch := self._take():
            self._serve(batch)

    def _take(self) -> list[_Waiting]:
        """Wait for a batch; none when the batcher is closed and nothing is left."""
        with self._changed:
            while True:
                self._keep([waiting for waiting in self._waiting if _wanted(waiting.request)])
                left = self._left()
                if left is None and self._closing:
                    return []
                if left is not None and left <= 0:
                    if batch := self._choose():
                        return batch
                    continue
                self._changed.wait(left)

    def _left(self) -> float | None:
        """Seconds until a batch should start, ``None`` where nothing waits."""
        if not self._waiting:
            return None
        if self._closing or len(self._waiting) >= self._usual:
            return 0.0
        full = sum(len(waiting.row.ids) for waiting in self._waiting[:LOOK]) >= self._embedder.budget
        return 0.0 if full else self._waiting[0].since + self._wait - time.monotonic()

    def _choose(self) -> list[_Waiting]:
        """Take out the batch in which the oldest text goes best."""
        near = self._waiting[:LOOK]
        try:
            batches = self._embedder.pack([waiting.row for waiting in near])
        except Exception as error:  # noqa: BLE001 - such as too little memory; others may come when there is more
            self._keep(self._waiting[LOOK:])
            for waiting in near:
                _fail(waiting.request, error)
            return []
        chosen = {int(index) for index in next(batch for batch in batches if 0 in batch)}
        self._keep([waiting for index, waiting in enumerate(self._waiting) if index not in chosen])
        self._usual = len(chosen)
        return [near[index] for index in sorted(chosen) if _begin(near[index].request)]

    def _serve(self, batch: Sequence[_Waiting]) -> None:
        """Compute a batch; where that fails, each text alone, so that one cannot spoil the others."""
        stats, begin = EmbedStats(texts=len(batch), cut=sum(w.row.cut for w in batch)), time.perf_counter()
        try:
            vectors = self._embedder.compute([waiting.row for waiting in batch], stats)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to whoever brought the text
            if len(batch) == 1:
                _fail(batch[0].request, error)
                return
            for waiting in batch:
                self._serve([waiting])
            return
        stats.seconds = time.perf_counter() - begin
        with self._changed:
            self._stats.add(stats)
            done = [w.request for w, vector in zip(batch, vectors, strict=True) if _put(w, vector)]
        for request in done:
            self._answer(request)

    def _answer(self, request: _Request) -> None:
        """Hand over what is complete."""
        try:
            found = self._together([vector for vector in request.vectors if vector is not None])
        except Exception as error:  # noqa: BLE001 - the thread must live on
            _fail(request, error)
            return
        with suppress(InvalidStateError):  # it was closed meanwhile
            request.future.set_result(found)

    def _together(self, vectors: list[Vector]) -> Vectors:
        """Vectors of a request as its caller gets them."""
        wrong = next((index for index, vector in enumerate(vectors) if not np.isfinite(vector).all()), None)
        if wrong is not None:
            hint = "qexport check looks at the weights"
            raise BuildFailed(f"the vector of text {wrong} holds NaN or Inf", hint=hint)
        return vectors if self._embedder.form.many else np.stack(vectors)


def _seconds(timeout: float | None) -> float | None:
    """The same, but what is longer than anybody waits is no limit."""
    if timeout is None or timeout == math.inf:
        return None
    if not is_number(timeout):
        raise UsageError(f"timeout is {timeout!r}, expected seconds")
    return timeout if timeout < _ENDLESS else None


def _wanted(request: _Request) -> bool:
    """Whether anybody still waits for a request; one that was cancelled is told that nobody works on it."""
    return not request.future.done() or (request.future.cancelled() and _begin(request))


def _begin(request: _Request) -> bool:
    """Work on a request, if it is still wanted; from now on it cannot be cancelled."""
    if request.known:
        return not request.future.done()
    request.known = True
    return request.future.set_running_or_notify_cancel()


def _drop(request: _Request) -> bool:
    """Cancel a request; whether it is too late for that."""
    request.future.cancel()
    return _begin(request)


def _put(waiting: _Waiting, vector: Vector) -> bool:
    """Keep a vector; whether its request is complete."""
    request = waiting.request
    request.vectors[waiting.index] = vector
    request.missing -= 1
    return not request.missing


def _fail(request: _Request, error: Exception) -> None:
    with suppress(InvalidStateError):  # another of its texts was first
        request.future.set_exception(error)
