"""Requests while they are answered: rows in batches, tokens as they come, nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

from qexport.runtime.accounting.records import PrefillRecord, RoundRecord, Run
from qexport.runtime.generation.replies import Completion, Reply, Token
from qexport.runtime.speculation.rounds import Rounds

News: TypeAlias = Generator[tuple[int, Token], None, None]
OpenRounds: TypeAlias = Callable[[], AbstractContextManager[Rounds]]
"""Opens what a group of rows is decoded in: its caches, and the loop over its rows."""


class Batch:
    """Tokens of all prompts of a request, as they come: pairs of a prompt's number and a token.

    Nothing runs before the first is asked for. When the last has come, or ``close`` is called, or nobody holds it any
    more, the memory of caches is free, but for a few small ones that the next request gets. Threads that read it
    take turns.

    Attributes:
        runs: What it took so far, for ``runtime.accounting.stats``: one for every group of rows that is done.
    """

    def __init__(self, open_rounds: OpenRounds, replies: Sequence[Reply], size: int) -> None:
        """Answer ``size`` rows at a time."""
        self.runs: list[Run] = []
        self._replies, self._size = replies, size
        self._tokens = _answer(open_rounds, replies, size, self.runs)
        self._turn, self._closed = threading.Lock(), False

    def __iter__(self) -> Iterator[tuple[int, Token]]:
        return self

    def __next__(self) -> tuple[int, Token]:
        try:
            with self._turn:
                if not self._closed:
                    return next(self._tokens)
        finally:
            if self._closed:
                self._free()
        raise StopIteration

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def completions(self) -> list[Completion | None]:
        """Outputs that have ended, in the order of the prompts; ``None`` for the others."""
        return [self.completion(number) for number in range(len(self._replies))]

    def completion(self, number: int) -> Completion | None:
        """The output of one prompt, once it has ended."""
        reply = self._replies[number]
        return None if reply.reason is None else reply.completion()

    def run_of(self, number: int) -> Run:
        """What the output of one prompt took, once its group has ended."""
        group, place = divmod(number, self._size)
        return self.runs[group].of_row(place)

    def close(self) -> None:
        """Stop here and free the memory; a second time does nothing.

        Any thread may do so. Where another one is computing a token, that is its last, and it frees the memory.
        """
        self._closed = True
        self._free()

    def _free(self) -> None:
        """Unless somebody computes, who looks at ``_closed`` when that is done."""
        if self._turn.acquire(blocking=False):
            try:
                self._tokens.close()
            finally:
                self._turn.release()


class Stream:
    """Tokens of one output, as they come; see :class:`Batch`. An output that fails raises its error at the end."""

    def __init__(self, batch: Batch) -> None:
        """Read a request of one prompt."""
        self._batch = batch

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        try:
            return next(self._batch)[1]
        except StopIteration:
            if self.completion is not None and self.completion.error is not None:
                raise self.completion.error from None
            raise

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def completion(self) -> Completion | None:
        """The output, once it has ended."""
        return self._batch.completion(0)

    @property
    def runs(self) -> list[Run]:
        """What it took."""
        return self._batch.runs

    def close(self) -> None:
        """Stop here and free the memory, as :meth:`Batch.close`."""
        self._batch.close()


def _answer(open_rounds: OpenRounds, replies: Sequence[Reply], size: int, runs: list[Run]) -> News:
    """One group of rows after the other, each in caches of its own: what one leaves there never meets another."""
    for first in range(0, len(replies), size):
        with open_rounds() as rounds:  # its caches are let go of as soon as it ends
            yield from _answer_group(rounds, replies[first : first + size], runs)


def _answer_group(rounds: Rounds, replies: Sequence[Reply], runs: list[Run]) -> News:
    """Rounds until all rows have ended; those that have leave the batch."""
    records: list[RoundRecord] = []
    active = list(replies)
    found = rounds.begin([reply.row for reply in active])
    prefill = found.record
    assert isinstance(prefill, PrefillRecord)
    try:
        while True:
            news = [
                reply.take(outcome, prompt=found.record is prefill)
                for reply, outcome in zip(active, found.outcomes, strict=True)
            ]
            if isinstance(found.record, RoundRecord):
                records.append(_cut(found.record, [len(tokens) for tokens in news]))
            for reply, tokens in zip(active, news, strict=True):
                for token in tokens:
                    yield reply.number, token
            going = [place for place, reply in enumerate(active) if reply.reason is None]
            if not going:
                return
            if len(going) < len(active):
                rounds.keep(going)
                active = [active[place] for place in going]
            found = rounds.step([reply.left for reply in active])
    finally:
        runs.append(Run(prefill, tuple(records)))


def _cut(record: RoundRecord, emitted: Sequence[int]) -> RoundRecord:
    """The record with what came out of it, where outputs end inside of it."""
    told = tuple(emitted)
    return record if record.emitted == told else record._replace(emitted=told)
