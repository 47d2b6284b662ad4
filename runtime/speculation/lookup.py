"""Proposes copies: what stood behind the last tokens where they were seen before, in references or in the row itself.

References are LLMA (N. Yang et al., *Inference with Reference: Lossless Acceleration of Large Language Models*, 2023),
the row's own prompt and output are prompt lookup (A. Saxena, 2023). Both copy a fixed number of tokens behind a fixed
number that must match. Here the numbers follow from what copies are worth: behind ``m`` tokens that match, the next is
right with a chance c(m), and if it is, ``m + 1`` tokens match. So the j-th copied token is taken with the chance c(m)
c(m+1) ... c(m+j-1), and a copy is as long as makes the most of the sum of these less what it costs to verify them. As c
is learned from every token that is decided, copies end by themselves where text is not copied, and start again where
it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from qexport.runtime.speculation.proposal import NO_EFFORT, NOTHING, Proposal, Row, Span
from qexport.runtime.speculation.sources import Chances, History, IndexCache, Reading, Source, foresee
from qexport.runtime.speculation.terms import Terms


class Lookup:
    """Copies from references and from the row's own prompt and output, whatever promises more.

    Needs no model. As a whole it is called ``copy``; tokens that come from references are proposed by ``reference``,
    those that the row itself has by ``lookup``.
    """

    name = "copy"
    effort = NO_EFFORT

    def __init__(self, terms: Terms | None = None, *, least: int = 1) -> None:
        """Know nothing yet.

        Args:
            terms: What a token costs, and limits of ``lookup`` and ``reference``.
            least: Tokens that must match; what follows fewer is still learned.
        """
        self._terms, self._least = terms or Terms(), least
        self._rows: list[_Row | None] = []
        self._indices = IndexCache()

    def begin(self, rows: Sequence[Row]) -> None:
        """Forget the rows, not the references. Prompts are read with the first proposal."""
        self._rows = [None] * len(rows)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the others."""
        self._rows = [self._rows[index] for index in rows]

    def propose(self, rows: Sequence[Row], most: Sequence[int]) -> list[Proposal]:
        """Copies; in a batch none is longer than what its last token is worth to all rows together."""
        best = [self._best(index, row, most[index]) for index, row in enumerate(rows)]
        if not any(chances for _, chances in best):
            return [NOTHING] * len(rows)
        depth = self._depth([chances for _, chances in best])
        return [self._proposal(source, chances[:depth]) for source, chances in best]

    def _best(self, index: int, row: Row, most: int) -> tuple[Source | None, Chances]:
        """The source that promises the most tokens, and the chance of each."""
        best: Source | None = None
        promised: Chances = []
        for source in self._known(index, row).sources:
            if source.matched >= self._least:
                chances = foresee(source, self._terms.limit(source.proposer, most))
                if sum(chances) > sum(promised):
                    best, promised = source, chances
        return best, promised

    def _depth(self, promised: Sequence[Chances]) -> int:
        """Tokens that are worth their time, which is that of all rows: a call is as wide as its widest row."""
        price, costs = len(promised) * self._terms.worth, self._terms.costs
        depth, most, gained = 0, 0.0, 0.0
        for place in range(min(max(map(len, promised)), len(costs) - 1)):
            gained += sum(chances[place] for chances in promised if place < len(chances))
            balance = gained - price * costs[place + 1]
            if balance > most:
                depth, most = place + 1, balance
        return depth

    def _known(self, index: int, row: Row) -> _Row:
        known = self._rows[index]
        if known is None or known.read > len(row.ids):
            known = self._rows[index] = _Row(row, self._indices)
        known.follow(row.ids)
        return known

    def _proposal(self, source: Source | None, chances: Chances) -> Proposal:
        terms, count = self._terms, len(chances)
        if source is None or not count or 1 + sum(chances) < terms.rival * (1 + terms.costs[count]):
            return NOTHING
        return Proposal(source.copy(count), proposer=source.proposer, span=Span(source.name, source.start))


class _Row:
    """One row beside everything it may copy from; ``read`` of its tokens are known."""

    __slots__ = ("read", "sources")

    def __init__(self, row: Row, indices: IndexCache) -> None:
        prompt = row.ids[: row.prompt]
        readings = [Reading(named.name, indices.find(named), prompt) for named in row.references if named.ids]
        self.sources: tuple[Source, ...] = (*readings, History(prompt))
        self.read = row.prompt

    def follow(self, ids: Sequence[int]) -> None:
        for place in range(self.read, len(ids)):
            token = ids[place]
            for source in self.sources:
                source.follow(token)
        self.read = len(ids)
