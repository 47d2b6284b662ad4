"""Keys and values of a decoder between steps: buffers that grow as they fill, and how far each row has come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.errors import DataInvalid, UsageError
from qexport.runtime.backends.host import HOST
from qexport.runtime.demands import is_integer
from qexport.runtime.session import Buffer, Memory

Counts: TypeAlias = NDArray[np.int64]  # [batch], columns
LEAST = 64  # columns
KEPT = 16 << 20  # bytes of buffers that wait to be used again: where calls are short, new ones take longer than those
SHARE = 8  # of the next power of two, by which buffers grow at least


@dataclass(frozen=True, slots=True)
class Room:
    """How many columns buffers have.

    Attributes:
        least: At first, and what they grow by at least; a power of two where they grow.
        most: That count in a row, ``None`` for no end.
        fixed: Whether they never grow.
    """

    least: int = LEAST
    most: int | None = None
    fixed: bool = False

    def __post_init__(self) -> None:
        """Raise ``UsageError`` for a first size that is no power of two."""
        if not is_integer(self.least) or self.least < 1 or (self.least & (self.least - 1) and not self.fixed):
            raise UsageError(f"the capacity is {self.least!r}, expected a power of two")

    def columns(self, needed: int) -> int:
        """Of a buffer that holds ``needed``."""
        return self.least if self.fixed else bucket(needed, self.least, self.most)


class Cache:
    """One buffer ``[batch, heads, capacity, size]`` per name; of row ``r`` the first ``lengths[r]`` columns count.

    What stands behind them is junk that nobody reads and the next step overwrites, so going back costs nothing. A step
    of a batch is as wide as its widest row: the others write padding. Only for that may a buffer be wider than
    ``room.most``, never for columns that count.

    Attributes:
        buffers: Zeros at first, since a column that is masked still must not be NaN.
        capacity: Columns of every buffer.
        room: How they grow.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        dtype: np.dtype[Any],
        batch: int,
        room: Room | None = None,
        memory: Memory = HOST,
    ) -> None:
        """Make room.

        Args:
            shapes: Heads and size of a head, by name.
            dtype: Type of the numbers.
            batch: Rows.
            room: How many columns.
            memory: Where the buffers lie.
        """
        if batch < 1:
            raise DataInvalid(f"the batch is {batch}, expected at least one row")
        self.room, self._memory = room or Room(), memory
        self._lengths = [0] * batch  # plain numbers: of few rows they are added and compared faster than arrays
        self._touched = 0  # columns that hold something
        self.capacity = self.room.columns(1)
        self.buffers = {
            name: memory.zeros((batch, heads, self.capacity, size), dtype) for name, (heads, size) in shapes.items()
        }
        self._spare: dict[int, dict[str, Buffer]] = {}  # by capacity: those that were too small, or will be needed

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
        """Forget everything where there are buffers of a new cache for ``batch`` rows; whether there are."""
        least = self.room.columns(1)
        if self.batch != batch or (self.capacity != least and least not in self._spare):
            return False
        if self.capacity != least:
            self._spare[self.capacity], self.buffers, self.capacity = self.buffers, self._spare.pop(least), least
        for buffer in self.buffers.values():
            self._memory.clear(buffer, min(self._touched, self.capacity))
        self._lengths, self._touched = [0] * batch, 0
        return True

    def demand(self, counts: Sequence[int]) -> None:
        """Raise ``DataInvalid`` where a row that becomes ``counts`` longer would be longer than it may be."""
        most, fixed = self.room.most, self.room.fixed
        for row, (length, count) in enumerate(zip(self._lengths, counts, strict=True)):
            if most is not None and length + count > most:
                limit = f"the engine has room for {most}" if fixed else f"the model has {most} positions"
                what = f"row {row} has {length} tokens and {count} more, {limit}"
                raise DataInvalid(what, hint="start a new sequence, or go back first")

    def reserve(self, width: int) -> bool:
        """Make room for ``width`` more columns in every row; whether buffers were freed for that.

        Where buffers do not grow, there must be room: ``free`` says how much.
        """
        needed = max(self._lengths) + width
        self._touched = max(self._touched, needed)
        if needed <= self.capacity:
            return False
        assert not self.room.fixed, "a step is wider than what is free"
        before, self.capacity = self.capacity, self.room.columns(needed)
        if self._bytes(self.capacity, before, *self._spare) > KEPT:
            self._move(range(self.batch))
            return True
        large, small = self._spare.pop(self.capacity, None), self.buffers
        self.buffers = large or {name: self._zeros(old) for name, old in small.items()}
        for name, old in small.items():
            self._memory.copy(old, self.buffers[name], range(self.batch), self._lengths)
        self._spare[before] = small
        return False

    @property
    def free(self) -> int:
        """Columns behind the longest row."""
        return self.capacity - max(self._lengths)

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
        self._free_spare()
        self._move(rows)

    def close(self) -> None:
        """Free the buffers; a second time does nothing."""
        for buffer in self.buffers.values():
            self._memory.free(buffer)
        self.buffers.clear()
        self._free_spare()

    @property
    def small(self) -> bool:
        """Whether all buffers together are worth keeping while nobody needs them."""
        return self._bytes(self.capacity, *self._spare) <= KEPT

    def _bytes(self, *columns: int) -> int:
        """Of buffers with so many columns, all together."""
        column = sum(old.shape[1] * old.shape[3] * old.dtype.itemsize for old in self.buffers.values())
        return self.batch * column * sum(columns)

    def _zeros(self, old: Buffer) -> Buffer:
        return self._memory.zeros((self.batch, old.shape[1], self.capacity, old.shape[3]), old.dtype)

    def _move(self, rows: Sequence[int]) -> None:
        """Put the columns of ``rows`` that count into new buffers, of which no more than one is there twice."""
        for name, old in self.buffers.items():
            self.buffers[name] = new = self._zeros(old)
            self._memory.copy(old, new, rows, self._lengths)
            self._memory.free(old)

    def _free_spare(self) -> None:
        for buffers in self._spare.values():
            for buffer in buffers.values():
                self._memory.free(buffer)
        self._spare.clear()


def bucket(needed: int, least: int, most: int | None) -> int:
    """Columns that hold ``needed``: multiples of ``least``, from 8 ``least`` on of an eighth of a power of two.

    A step costs as much for columns that are masked as for those that count, and growing costs a copy. So a buffer is
    never a quarter larger than it must be beside ``least``, and all copies together are a few times its size.

    Args:
        needed: At least 1.
        least: Columns of the smallest buffer.
        most: Columns that a row may have; where these are enough, they are.
    """
    grain = max(least, (1 << (needed - 1).bit_length()) // SHARE)
    columns = -(-needed // grain) * grain
    return columns if most is None or columns <= most else max(most, needed)
