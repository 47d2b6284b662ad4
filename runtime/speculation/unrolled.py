"""A small model that looks ahead, all tokens in one call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qexport.errors import UsageError
from qexport.runtime.sampling.noise import Purpose
from qexport.runtime.sampling.sampler import Sampler
from qexport.runtime.sampling.settings import Sampling
from qexport.runtime.speculation.chains import Chains, Draw
from qexport.runtime.speculation.following import Followed
from qexport.runtime.speculation.proposal import NOTHING, Chances, Effort, Proposal, Row


def unrolls(settings: Sampling) -> bool:
    """Whether tokens are chosen by what the graph of a chain can do: the most likely, or drawn at a temperature."""
    return not (settings.truncated or settings.remembers or settings.logit_bias)


class Unrolled:
    """Proposes what ``Draft`` proposes, with the same numbers for each position, by an unrolled decoder.

    Logits that are no numbers are noticed where tokens are drawn; elsewhere they make tokens that the target refuses.
    """

    name = "draft"

    def __init__(self, chains: Chains, sampler: Sampler, vocabulary: int) -> None:
        """Propose for targets with ``vocabulary`` logits.

        Raises:
            UsageError: The settings ask for more than a graph does.
        """
        if not unrolls(sampler.settings):
            what = "an unrolled draft takes the most likely tokens, or draws at a temperature, and nothing else"
            raise UsageError(what, hint="let it decode step by step")
        self._chains, self._chain = chains, chains.take(vocabulary)
        self._sampler, self._vocabulary = sampler, vocabulary
        self._followed = Followed(chains.signature, spare=sampler.weighed)

    @property
    def effort(self) -> Effort:
        """Calls of the chain."""
        return self._chain.effort

    def give_back(self) -> None:
        """Leave what was bound to the next who asks; nothing may be proposed any more."""
        self._chains.give_back(self._chain)

    def begin(self, rows: Sequence[Row]) -> None:
        """Forget everything."""
        self._chain.reset(len(rows))
        self._followed.begin(len(rows))

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the others."""
        self._chain.keep(rows)
        self._followed.keep(rows)

    def propose(self, rows: Sequence[Row], most: Sequence[int]) -> list[Proposal]:
        """Tokens of the draft; none for rows that are longer than it has positions for, or where it has no numbers.

        Where it has none behind a token of its own, that is the last.
        """
        wanted = self._followed.wanted(rows, most)
        steps = max(wanted)
        if steps == 0:
            return [NOTHING] * len(rows)
        lengths, parts = self._followed.catch_up(rows, wanted)
        self._chain.rollback(lengths)
        said, chances = self._chain.say(parts, steps, self._draw(rows, steps))
        for index, length in enumerate(self._chain.lengths):
            if parts[index]:
                self._followed.add(index, said[index], length)  # the last is not read, nor is what has no position
        proposals = []
        spoilt = []
        for index, more in enumerate(wanted):
            known = _finite(chances[index]) if more else 0
            if more and not known:
                self._followed.lose(index)
            elif more and known < steps:
                spoilt.append(index)
            count = min(more, known)
            proposals.append(self._proposal(said[index][:count], chances[index, :count]))
        if spoilt:
            self._clean(spoilt)
        return proposals

    def _clean(self, spoilt: Sequence[int]) -> None:
        """Take back what was proposed in these rows, and the buffers: what is no number stays none behind a mask."""
        lengths = self._followed.take_back(spoilt)
        self._chain.rollback(lengths)
        self._chain.keep(range(len(lengths)))

    def _draw(self, rows: Sequence[Row], steps: int) -> Draw | None:
        settings = self._sampler.settings
        if settings.greedy:
            return None
        purpose = Purpose.DRAFT if self._sampler.weighed else Purpose.TOKEN
        uniform = [[self._sampler.number(row, place, purpose) for place in range(steps)] for row in rows]
        return Draw(1 / settings.temperature, uniform)

    def _proposal(self, tokens: list[int], chances: Chances) -> Proposal:
        if not tokens:
            return NOTHING
        if not self._sampler.weighed:
            return Proposal(tuple(tokens), proposer=self.name)
        missing = self._vocabulary - chances.shape[1]
        given = np.pad(chances, ((0, 0), (0, missing))) if missing else chances.copy()
        return Proposal(tuple(tokens[:-1]), given, tokens[-1], self.name)


def _finite(chances: Chances) -> int:
    """Steps before the first without numbers; all where none are told, as tokens were not drawn."""
    if not chances.shape[1]:
        return len(chances)
    wrong = np.isnan(chances[:, 0])  # one logit that is no number makes the whole distribution so
    return int(wrong.argmax()) if wrong.any() else len(wrong)
