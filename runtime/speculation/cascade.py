"""Several proposers, the first that knows something counts."""

from __future__ import annotations

from collections.abc import Sequence

from qexport.runtime.speculation.proposal import NO_EFFORT, NOTHING, Effort, Proposal, Proposer, Row
from qexport.runtime.speculation.terms import Terms

NOT_ASKED = -1  # less than none: not even a token to spare


class Cascade:
    """Asks proposers in their order, each for the rows that have nothing yet; so cheap ones come first.

    Who is not asked for a row falls behind and catches up by itself when it is asked again.
    """

    def __init__(self, proposers: Sequence[Proposer], terms: Terms | None = None) -> None:
        """Ask ``proposers``, each within its limit of ``terms``; one with a limit of 0 is left alone."""
        self._proposers, self._terms = tuple(proposers), terms or Terms()
        self.name = "+".join(proposer.name for proposer in self._proposers)

    @property
    def effort(self) -> Effort:
        """All of theirs."""
        all_of_them = NO_EFFORT
        for effort in [proposer.effort for proposer in self._proposers]:
            if effort is not NO_EFFORT:
                all_of_them = effort if all_of_them is NO_EFFORT else all_of_them.plus(*effort)
        return all_of_them

    def begin(self, rows: Sequence[Row]) -> None:
        """Tell all."""
        for proposer in self._proposers:
            proposer.begin(rows)

    def keep(self, rows: Sequence[int]) -> None:
        """Tell all."""
        for proposer in self._proposers:
            proposer.keep(rows)

    def propose(self, rows: Sequence[Row], most: Sequence[int]) -> list[Proposal]:
        """For each row the first proposal with a token, or with one to spare."""
        found = [NOTHING] * len(rows)
        for proposer in self._proposers:
            limit = self._terms.limits.get(proposer.name)
            if limit != 0:
                asked = [
                    NOT_ASKED if _told(known) else more if limit is None else min(more, limit)
                    for known, more in zip(found, most, strict=True)
                ]
                if max(asked) > NOT_ASKED:
                    told = proposer.propose(rows, asked)
                    found = [known if _told(known) else new for known, new in zip(found, told, strict=True)]
        return found


def _told(proposal: Proposal) -> bool:
    return bool(proposal.ids) or proposal.spare is not None
