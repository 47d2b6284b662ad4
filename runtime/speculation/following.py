"""What a draft's cache holds of each row, and what it has to read before it can look ahead again."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qexport.runtime.signature import Signature
from qexport.runtime.speculation.proposal import Row


class Followed:
    """The tokens that were read of each row of a batch, those of proposals included.

    Where tokens are drawn, nothing of this may depend on what is yet to be decided: whether there is a proposal for a
    position follows from the tokens before it, and not from what was drawn there or proposed behind it.
    """

    def __init__(self, signature: Signature, *, spare: bool) -> None:
        """No rows yet.

        Args:
            signature: Of the draft.
            spare: Whether a token more than was asked for is proposed, to spare.
        """
        self._positions, self._vocabulary, self._spare = signature.positions, signature.vocabulary, spare
        self._read: list[list[int]] = []
        self._decided: list[int] = []  # of what was read, the tokens that nobody takes back
        self._lost: list[bool] = []

    def begin(self, count: int) -> None:
        """So many rows, of which nothing was read."""
        self._read, self._decided, self._lost = [[] for _ in range(count)], [0] * count, [False] * count

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the others."""
        self._read = [self._read[index] for index in rows]
        self._decided = [self._decided[index] for index in rows]
        self._lost = [self._lost[index] for index in rows]

    def lose(self, index: int) -> None:
        """Nothing is known behind the tokens that a row has, and so behind those that it gets."""
        self._lost[index] = True

    def wanted(self, rows: Sequence[Row], most: Sequence[int]) -> list[int]:
        """Tokens to propose for each row, the spare one included.

        None for rows that are longer than the draft has positions for, that have a token which it does not know, or
        are lost.
        """
        return [
            0 if self._lost[index] else self._affordable(index, rows[index], more) for index, more in enumerate(most)
        ]

    def _affordable(self, index: int, row: Row, most: int) -> int:
        room = most if self._positions is None else min(most, self._positions - len(row.ids))
        more = max(0, room + self._spare)
        if more and max(row.ids[self._decided[index] :], default=0) >= self._vocabulary:
            self.lose(index)
            return 0
        return more

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

    def take_back(self, rows: Collection[int]) -> list[int]:
        """Forget what was proposed in these rows; how long all rows are now."""
        for index in rows:
            del self._read[index][self._decided[index] :]
        return [len(read) for read in self._read]


def _agree(ids: Sequence[int], read: Sequence[int], known: int) -> int:
    """Tokens from the start on in which both agree, of which ``known`` need no look."""
    end = min(len(ids), len(read))
    return next((place for place in range(min(known, end), end) if ids[place] != read[place]), end)
