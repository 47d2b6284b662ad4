"""What is kept for the next who needs it."""

from __future__ import annotations

from qexport.runtime.idle import MOST, Idle


def test_the_latest_are_kept_and_the_others_freed():
    freed = []
    idle = Idle(freed.append)
    for thing in range(MOST + 3):
        idle.give(thing)
    assert freed == [0, 1, 2]
    assert idle.take() == MOST + 2
    idle.close()
    assert sorted([*freed, MOST + 2]) == list(range(MOST + 3))
    assert idle.take() is None
