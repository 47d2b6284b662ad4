"""What a draft's cache holds of each row, and what it has to read before it can look ahead again."""

from __future__ import annotations

from collections.abc import Sequence

from qexport.runtime.speculation.proposal import Row


class Followed:
    """The tokens that were read of each row of a batch, those of proposals included."""

    def __init__(self) -> None:
        """No rows yet."""
        self._read: list[list[int]] = []
        self._decided: list[int] = []  # of what was read, the tokens that nobody takes back

    def begin(self, count: int) -> None:
        """So many rows, of which nothing was read."""
        self._read, self._decided = [[] for _ in range(count)], [0] * count

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the others."""
        self._read = [self._read[index] for index in rows]
        self._decided = [self._decided[index] for index in rows]

    def catch_up(self, rows: Sequence[Row], wanted: Sequence[int]) -> tuple[list[int], list[list[int]]]:
        """How far each row goes back, and what it reads from there on; nothing for rows that want no tokens.

        What is to be read counts as read from now on. It always has the last token, for the logits behind it.
        """
        lengths: list[int] = []
        parts: list[list[int]] = []
        for index, (row, read, more) in enumerate(zip(rows, self._read, wanted, strict=True)):
            if not more:
                lengths.append(len(read))
                parts.append([])
                continue
            same = min(_agree(row.ids, read, self._decided[index]), len(row.ids) - 1)
            self._decided[index] = len(row.ids)
            lengths.append(same)
            parts.append(row.ids[same:])
            read[same:] = parts[-1]
        return lengths, parts

    def add(self, index: int, tokens: Sequence[int], length: int | None = None) -> None:
        """Tokens that were proposed and read; of a row that may not be longer than ``length``."""
        self._read[index] += tokens
        if length is not None:
            del self._read[index][length:]


def affordable(row: Row, most: int, positions: int | None, *, spare: bool) -> int:
    """Tokens to propose for a row, the spare one included, where a draft has ``positions``; ``None`` for no end."""
    room = most if positions is None else min(most, positions - len(row.ids))
    return max(0, room + spare)


def _agree(ids: Sequence[int], read: Sequence[int], known: int) -> int:
    """Tokens from the start on in which both agree, of which ``known`` need no look."""
    end = min(len(ids), len(read))
    return next((place for place in range(min(known, end), end) if ids[place] != read[place]), end)
