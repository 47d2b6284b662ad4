"""Keys and values of a decoder between steps: buffers that grow in powers of two, and how far each row has come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.errors import DataInvalid, UsageError

Counts: TypeAlias = NDArray[np.int64]  # [batch], columns
LEAST = 256  # columns


class Cache:
    """One buffer ``[batch, heads, capacity, size]`` per name; of row ``r`` the first ``lengths[r]`` columns count.

    What stands behind them is junk that nobody reads and the next step overwrites, so going back costs nothing. A step
    of a batch is as wide as its widest row: the others write padding. Only for that may a buffer be wider than
    ``most``, never for columns that count.

    Attributes:
        buffers: Zeros at first, since a column that is masked still must not be NaN.
        capacity: Columns of every buffer.
        most: Columns that a row may have; ``None`` for no end.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        dtype: np.dtype[Any],
        batch: int,
        *,
        least: int = LEAST,
        most: int | None = None,
    ) -> None:
        """Make room for ``least`` columns, or for ``most`` where that is less.

        Args:
            shapes: Heads and size of a head, by name.
            dtype: Type of the numbers.
            batch: Rows.
            least: Columns at first, a power of two.
            most: Columns that a row may have.
        """
        if least < 1 or least & (least - 1):
            raise UsageError(f"the capacity is {least}, expected a power of two")
        if batch < 1:
            raise DataInvalid(f"the batch is {batch}, expected at least one row")
        self.most, self._least = most, least
        self._lengths = [0] * batch  # plain numbers: of few rows they are added and compared faster than arrays
        self._touched = 0  # columns that hold something
        self.capacity = bucket(1, least, most)
        self.buffers = {
            name: np.zeros((batch, heads, self.capacity, size), dtype) for name, (heads, size) in shapes.items()
        }

    @property
    def lengths(self) -> Counts:
        """Columns of each row that count."""
        return np.array(self._lengths, np.int64)

    @property
    def starts(self) -> Sequence[int]:
        """The same as plain numbers, to be read only."""
        return self._lengths

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self._lengths)

    def reset(self, batch: int) -> bool:
        """Forget everything where the buffers are those of a new cache for ``batch`` rows; whether they are."""
        if (self.batch, self.capacity) != (batch, bucket(1, self._least, self.most)):
            return False
        for buffer in self.buffers.values():
            buffer[:, :, : self._touched] = 0
        self._lengths, self._touched = [0] * batch, 0
        return True

    def reserve(self, counts: Sequence[int], width: int) -> bool:
        """Make room for ``width`` more columns in every row, of which ``counts`` will count; whether buffers are new.

        Raises:
            DataInvalid: A row would be longer than ``most``.
        """
        if self.most is not None:
            for row, (length, count) in enumerate(zip(self._lengths, counts, strict=True)):
                if length + count > self.most:
                    what = f"row {row} has {length} tokens and {count} more, the model has {self.most} positions"
                    raise DataInvalid(what, hint="start a new sequence, or go back first")
        needed = max(self._lengths) + width
        self._touched = max(self._touched, needed)
        if needed <= self.capacity:
            return False
        self.capacity = bucket(needed, self._least, self.most)
        self._move(range(self.batch))
        return True

    def advance(self, counts: Sequence[int]) -> None:
        """Count ``counts`` more columns of each row; ``reserve`` made room for them and a step wrote them."""
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]

    def rollback(self, lengths: Sequence[int]) -> None:
        """Go back to ``lengths`` columns; the buffers stay as they are.

        Raises:
            DataInvalid: A row was never that long, or the length is negative.
        """
        if len(lengths) != self.batch:
            raise DataInvalid(f"{len(lengths)} lengths for {self.batch} rows")
        for row, (asked, length) in enumerate(zip(lengths, self._lengths, strict=True)):
            if not 0 <= asked <= length:
                raise DataInvalid(f"row {row} cannot go back to {asked} tokens, it has {length}")
        self._lengths = list(lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows in this order; the buffers are new, one after the other, and as wide as before.

        Raises:
            DataInvalid: There is no such row, or none is kept.
        """
        wrong = [row for row in rows if not 0 <= row < self.batch]
        if wrong or not rows:
            what = f"row {wrong[0]} does not exist" if wrong else "no row is kept"
            raise DataInvalid(f"{what}, the batch has {self.batch}")
        self._lengths = [self._lengths[row] for row in rows]
        self._move(rows)

    def _move(self, rows: Sequence[int]) -> None:
        """Put the columns of ``rows`` that count into new buffers, of which no more than one is there twice."""
        for name, old in self.buffers.items():
            new = np.zeros((len(rows), old.shape[1], self.capacity, old.shape[3]), old.dtype)
            for place, (row, used) in enumerate(zip(rows, self._lengths, strict=True)):
                new[place, :, :used] = old[row, :, :used]
            self.buffers[name] = new


def bucket(needed: int, least: int, most: int | None) -> int:
    """The power of two, from ``least`` up, that holds ``needed`` columns; ``most`` where that is enough."""
    power = max(least, 1 << (needed - 1).bit_length())
    return power if most is None or power <= most else max(most, needed)
