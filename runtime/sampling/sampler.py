"""Choosing tokens of one row: logits, what was there before, and the number that belongs to the position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qexport.errors import DataInvalid
from qexport.runtime.sampling.distribution import Chances, adjust, distribution, draw
from qexport.runtime.sampling.noise import Purpose, uniform
from qexport.runtime.sampling.settings import Sampling


class Context(Protocol):
    """What was decided of a row: a ``speculation.proposal.Row``."""

    @property
    def ids(self) -> Sequence[int]:
        """Its tokens so far, the prompt included."""
        ...

    @property
    def stream(self) -> int:
        """Which sequence of the request it is."""
        ...


class NotFiniteError(DataInvalid):
    """Logits from which no token can be chosen; the request fails, the session lives."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """What all rows of a request share.

    Attributes:
        settings: What was asked for.
        coupled: Whether a draft draws its tokens with the numbers of the target: they are certain ones then, which are
            taken where both draw the same.
    """

    settings: Sampling
    coupled: bool = False

    @property
    def weighed(self) -> bool:
        """Whether tokens of a draft are taken by their chances, and not for being those of the target."""
        return not (self.settings.greedy or self.coupled)

    def best(self, logits: NDArray[np.floating[Any]], row: Context, ahead: Sequence[int] = ()) -> int:
        """The most likely token after ``row.ids`` and ``ahead``, the lowest id of equals.

        Raises:
            NotFiniteError: The largest logit is no number.
        """
        scores = adjust(logits, self.settings, self._seen(row, ahead))
        token = int(scores.argmax())
        if not np.isfinite(scores[token]):
            raise _not_finite(float(scores[token]), len(row.ids) + len(ahead))
        return token

    def chances(self, logits: NDArray[np.floating[Any]], row: Context, ahead: Sequence[int] = ()) -> Chances:
        """The distribution of the token after ``row.ids`` and ``ahead``, ``[vocabulary]``; not for greedy settings.

        Raises:
            NotFiniteError: The largest logit is no number.
        """
        scores = adjust(logits, self.settings, self._seen(row, ahead))
        largest = float(scores.max())
        if not np.isfinite(largest):
            raise _not_finite(largest, len(row.ids) + len(ahead))
        return distribution(scores, self.settings)

    def token(self, logits: NDArray[np.floating[Any]], row: Context, ahead: Sequence[int] = ()) -> int:
        """The token that plain decoding has after ``row.ids`` and ``ahead``: the best one, or the one drawn."""
        if self.settings.greedy:
            return self.best(logits, row, ahead)
        return draw(self.chances(logits, row, ahead), self.number(row, len(ahead), Purpose.TOKEN))

    def tokens(self, logits: NDArray[np.floating[Any]], row: Context, ahead: Sequence[int]) -> Iterator[int]:
        """What ``token`` gives after each of the first ``0 ... n - 1`` of ``ahead``, for logits ``[n, vocabulary]``."""
        if not self.settings.greedy or self.settings.adjusts:
            for place, scores in enumerate(logits):
                yield self.token(scores, row, ahead[:place])
            return
        for place, token in enumerate(logits.argmax(-1).tolist()):  # all at once: this is what plain requests come to
            if not isfinite(largest := logits[place, token]):
                raise _not_finite(float(largest), len(row.ids) + place)
            yield token

    def number(self, row: Context, ahead: int, purpose: Purpose) -> float:
        """The uniform number of the position ``ahead`` tokens behind the end of the row."""
        return uniform(self.settings.seed, row.stream, len(row.ids) + ahead, purpose)

    def _seen(self, row: Context, ahead: Sequence[int]) -> set[int]:
        return {*row.ids, *ahead} if self.settings.remembers else set()


def _not_finite(largest: float, position: int) -> NotFiniteError:
    what = f"the largest logit at position {position} is {largest}"
    return NotFiniteError(what, hint="the weights or the number type overflow; qexport build checks float16 for that")
