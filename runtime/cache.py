"""Keys and values of a decoder between steps: buffers that grow in powers of two, and how far each row has come."""

from __future__ import annotations

from collections.abc import Mapping
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
        self._lengths: Counts = np.zeros(batch, np.int64)
        self.capacity = bucket(1, least, most)
        self.buffers = {name: self._zeros(heads, size, dtype) for name, (heads, size) in shapes.items()}

    @property
    def lengths(self) -> Counts:
        """Columns of each row that count."""
        return self._lengths.copy()

    def reserve(self, counts: Counts, width: int) -> bool:
        """Make room for ``width`` more columns in every row, of which ``counts`` will count; whether buffers are new.

        Raises:
            DataInvalid: A row would be longer than ``most``.
        """
        after = self._lengths + counts
        if self.most is not None and after.max() > self.most:
            row = int(after.argmax())
            what = (
                f"row {row} has {self._lengths[row]} tokens and {counts[row]} more, the model has {self.most} positions"
            )
            raise DataInvalid(what, hint="start a new sequence, or go back first")
        needed = int(self._lengths.max()) + width
        if needed <= self.capacity:
            return False
        self.capacity = bucket(needed, self._least, self.most)
        used = int(self._lengths.max())
        for name, old in self.buffers.items():
            new = self._zeros(old.shape[1], old.shape[3], old.dtype)
            new[:, :, :used] = old[:, :, :used]
            self.buffers[name] = new  # one after the other, so that no more than one is there twice
        return True

    def advance(self, counts: Counts) -> None:
        """Count ``counts`` more columns of each row; ``reserve`` made room for them and a step wrote them."""
        self._lengths += counts

    def rollback(self, lengths: Counts) -> None:
        """Go back to ``lengths`` columns; the buffers stay as they are.

        Raises:
            DataInvalid: A row was never that long, or the length is negative.
        """
        if lengths.shape != self._lengths.shape:
            raise DataInvalid(f"{lengths.size} lengths for {self._lengths.size} rows")
        wrong = np.flatnonzero((lengths < 0) | (lengths > self._lengths))
        if wrong.size:
            row = wrong[0]
            what = f"row {row} cannot go back to {lengths[row]} tokens, it has {self._lengths[row]}"
            raise DataInvalid(what)
        self._lengths[:] = lengths

    def _zeros(self, heads: int, size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        return np.zeros((self._lengths.size, heads, self.capacity, size), dtype)


def bucket(needed: int, least: int, most: int | None) -> int:
    """The power of two, from ``least`` up, that holds ``needed`` columns; ``most`` where that is enough."""
    power = max(least, 1 << (needed - 1).bit_length())
    return power if most is None or power <= most else max(most, needed)
