"""A small model that looks ahead, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qexport.runtime.decoder import Decoder
from qexport.runtime.sampling.distribution import draw
from qexport.runtime.sampling.noise import Purpose
from qexport.runtime.sampling.sampler import NotFiniteError, Sampler
from qexport.runtime.speculation.following import Followed
from qexport.runtime.speculation.prefill import prefill
from qexport.runtime.speculation.proposal import NO_EFFORT, NOTHING, Chances, Effort, Logits, Proposal, Row


class Draft:
    """Proposes what a decoder of the same vocabulary would say.

    Greedy requests get its best tokens, others tokens that it draws from its own distribution, adjusted and truncated
    by the same settings as the target's, together with that distribution unless both draw alike. It knows of a row
    what it has read; what was rejected is taken back, what was decided without it is read first, both with the next
    proposal.
    """

    name = "draft"

    def __init__(self, decoder: Decoder, sampler: Sampler, vocabulary: int) -> None:
        """Propose for targets with ``vocabulary`` logits; they may have more or less padding than the draft."""
        self.decoder, self._sampler, self._vocabulary = decoder, sampler, vocabulary
        self._followed = Followed(decoder.signature, spare=sampler.weighed)
        self._done = NO_EFFORT

    @property
    def effort(self) -> Effort:
        """Calls of the decoder."""
        return self._done

    def begin(self, rows: Sequence[Row]) -> None:
        """Forget everything."""
        self.decoder.reset(len(rows))
        self._followed.begin(len(rows))

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the others."""
        self.decoder.keep(rows)
        self._followed.keep(rows)

    def propose(self, rows: Sequence[Row], most: Sequence[int]) -> list[Proposal]:
        """Tokens of the draft; none for rows that are longer than it has positions for, or where it has no numbers.

        Where it has none behind a token of its own, that is the last.
        """
        wanted, spoilt = self._followed.wanted(rows, most), []
        found: list[list[int]] = [[] for _ in rows]
        chances: list[list[Chances]] = [[] for _ in rows]
        logits = self._catch_up(rows, wanted)
        for place in range(max(wanted)):
            going = [index for index, more in enumerate(wanted) if more > place]
            for index in going:
                try:
                    self._choose(logits[index], rows[index], found[index], chances[index])
                except NotFiniteError:
                    wanted[index] = 0
                    if place:
                        spoilt.append(index)
                    else:
                        self._followed.lose(index)
            going = [index for index in going if wanted[index] > place + 1]
            if going:
                logits = self._feed({index: found[index][-1] for index in going}, len(rows))
        if spoilt:
            self._clean(spoilt)
        return [self._proposal(ids, given) for ids, given in zip(found, chances, strict=True)]

    def _choose(self, logits: Logits, row: Row, ids: list[int], chances: list[Chances]) -> None:
        scores = self._fit(logits[0])
        if not self._sampler.weighed:
            ids.append(self._sampler.token(scores, row, ids))
            return
        given = self._sampler.chances(scores, row, ids)
        chances.append(given)
        ids.append(draw(given, self._sampler.number(row, len(ids), Purpose.DRAFT)))

    def _fit(self, scores: Logits) -> Logits:
        """As many scores as the target has; tokens that the draft does not know never come."""
        if scores.size >= self._vocabulary:
            return scores[: self._vocabulary]
        return np.pad(scores, (0, self._vocabulary - scores.size), constant_values=-np.inf)

    def _catch_up(self, rows: Sequence[Row], wanted: Sequence[int]) -> list[Logits]:
        """Take back what was rejected and read what was decided, of rows that want something."""
        lengths, missing = self._followed.catch_up(rows, wanted)
        self.decoder.rollback(lengths)
        if not any(missing):
            return []
        began, valid = self.decoder.seconds, int(self.decoder.lengths.sum())
        last, calls = prefill(self.decoder, missing)
        self._done = self._done.plus(self.decoder.seconds - began, calls, max(map(len, missing)), valid)
        return last

    def _feed(self, tokens: dict[int, int], batch: int) -> list[Logits]:
        """One token more of some rows."""
        ids, counts = np.zeros((batch, 1), np.int64), np.zeros(batch, np.int64)
        for index, token in tokens.items():
            ids[index, 0], counts[index] = token, 1
            self._followed.add(index, (token,))
        began, valid = self.decoder.seconds, int(self.decoder.lengths.sum())
        logits = self.decoder.extend(ids, counts)
        self._done = self._done.plus(self.decoder.seconds - began, 1, 1, valid)
        return list(logits)

    def _clean(self, spoilt: Sequence[int]) -> None:
        """Take back what was proposed in these rows, and the buffers: what is no number stays none behind a mask."""
        lengths = self._followed.take_back(spoilt)
        self.decoder.rollback(lengths)
        self.decoder.keep(range(len(lengths)))

    def _proposal(self, ids: list[int], chances: list[Chances]) -> Proposal:
        if not ids:
            return NOTHING
        if not self._sampler.weighed:
            return Proposal(tuple(ids), proposer=self.name)
        return Proposal(tuple(ids[:-1]), np.stack(chances), ids[-1], self.name)
