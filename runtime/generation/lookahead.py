"""Who looks ahead for a request, how far, and what becomes of it if that fails."""

from __future__ import annotations

from collections.abc import Sequence

from qexport.errors import QexportError
from qexport.runtime.speculation.proposal import NOTHING, Effort, Proposal, Proposer, Row


class Tolerant:
    """A proposer that is left alone once it fails: what it was to speed up goes on without it.

    Attributes:
        failure: What happened to it.
    """

    def __init__(self, inner: Proposer) -> None:
        """Ask ``inner`` for as long as it answers."""
        self.failure: QexportError | None = None
        self._inner = inner

    @property
    def name(self) -> str:
        """That of the proposer."""
        return self._inner.name

    @property
    def effort(self) -> Effort:
        """That of the proposer."""
        return self._inner.effort

    def begin(self, rows: Sequence[Row]) -> None:
        """Begin with these rows."""
        if self.failure is None:
            try:
                self._inner.begin(rows)
            except QexportError as error:
                self.failure = error

    def propose(self, rows: Sequence[Row], most: Sequence[int]) -> list[Proposal]:
        """What it proposes, or nothing."""
        if self.failure is None:
            try:
                return self._inner.propose(rows, most)
            except QexportError as error:
                self.failure = error
        return [NOTHING] * len(rows)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows."""
        if self.failure is None:
            try:
                self._inner.keep(rows)
            except QexportError as error:
                self.failure = error
