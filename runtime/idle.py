"""What is kept for the next who needs one like it: buffers, and what is bound to them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

Thing = TypeVar("Thing")
MOST = 2  # of a kind: as many as threads that ask in turn, not as many as there ever were at a time


class Idle(Generic[Thing]):
    """A few things that nobody uses; several threads may take and give."""

    def __init__(self, free: Callable[[Thing], object] = lambda _: None) -> None:
        """Keep the latest ``MOST``; the others are freed."""
        self._free, self._things = free, deque[Thing]()

    def take(self) -> Thing | None:
        """The one that was used last, which is the warmest; ``None`` if there is none."""
        try:
            return self._things.pop()
        except IndexError:
            return None

    def give(self, thing: Thing) -> None:
        """Keep one more, and free the one that waited longest where there are too many."""
        self._things.append(thing)
        if len(self._things) > MOST:
            with suppress(IndexError):  # another thread took it
                self._free(self._things.popleft())

    def close(self) -> None:
        """Free those that are here."""
        while (thing := self.take()) is not None:
            self._free(thing)
