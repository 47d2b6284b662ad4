"""What is kept for the next who needs one like it: buffers, and what is bound to them."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

Thing = TypeVar("Thing")
MOST = 2  # of a kind: as many as threads that ask in turn, not as many as there ever were at a time


class Idle(Generic[Thing]):
    """A few things that nobody uses; several threads may take and give."""

    def __init__(self, most: int = MOST) -> None:
        """Keep ``most``, the latest."""
        self._things: deque[Thing] = deque(maxlen=most)

    def take(self) -> Thing | None:
        """The one that was used last, which is the warmest; ``None`` if there is none."""
        try:
            return self._things.pop()
        except IndexError:
            return None

    def give(self, thing: Thing) -> None:
        """Keep one more."""
        self._things.append(thing)

    def close(self) -> None:
        """Keep none of those that are here."""
        self._things.clear()
