"""Which texts run together: batches that cost least, when a run costs its rows times its longest row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = NDArray[np.intp]  # positions in what was packed

OVERHEAD = 6  # tokens that a run costs whatever it reads: MiniLM on one thread, in float32 and in int8


def pack(lengths: Sequence[int], budget: int, most: int | None = None, overhead: int = OVERHEAD) -> list[Rows]:
    """Split rows into batches of the least cost, the longest rows first.

    A batch costs ``overhead + rows x longest``, in tokens. Some best split keeps the order of lengths (swap two rows
    that break it, and no batch gets longer), so a table over the sorted rows finds one: the best cost of the first
    ``i`` rows, by how many of them the last batch takes.

    Args:
        lengths: Tokens of each row, 1 or more.
        budget: Most tokens of a batch, padding counted; a row that is longer runs alone.
        most: Most rows of a batch.
        overhead: What a batch costs besides.

    Returns:
        Positions of the rows of each batch; together every position once.
    """
    order = np.argsort(lengths, kind="stable")
    widths = np.asarray(lengths, np.int64)[order]
    best = np.zeros(len(order) + 1)
    takes = np.zeros(len(order) + 1, np.int64)
    rows = np.arange(1, len(order) + 1)
    room = np.maximum(budget // np.maximum(widths, 1), 1)
    room = np.minimum(np.minimum(room, rows), most or len(order))
    for end in range(1, len(order) + 1):
        count = room[end - 1]
        costs = best[end - count : end][::-1] + widths[end - 1] * rows[:count]  # of the last 1, 2 ... count rows
        take = int(costs.argmin())
        best[end], takes[end] = costs[take] + overhead, take + 1
    found: list[Rows] = []
    end = len(order)
    while end:
        found.append(order[end - takes[end] : end])
        end -= takes[end]
    return found
