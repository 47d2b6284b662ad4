"""How far to look ahead: as far as makes a token cheapest, by what calls take and by what was accepted.

A round that proposes K tokens takes t(K+1) for the target and u(K) for the draft, and gives E(K) tokens (Leviathan et
al. 2023, section 3.2). t and u are measured curves: their ratio to one another and their shape decide, and no formula
tells them. Everything here is a function of what it was given; nothing looks at a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Curve: TypeAlias = Callable[[float], float]  # time by tokens of a row in one call, in any unit

PRIOR, WEIGHT = 0.6, 4.0  # acceptance before anything was seen, and how many tokens that is worth
SHARED = 16.0  # tokens that the acceptance of all positions is worth to each
MEMORY = 1 - 1 / 16  # what a token counts when one more is seen: acceptance comes in runs, which are worth following
STICKY = 0.01  # of a token's time
STEP, APART = 1 / 8, 1.5  # of a ratio of times towards a new one, and how far that may be off to be believed


class Outlook:
    """The chance of each proposed token to be taken once all before it are, from what became of others.

    Counts fade exponentially. A position leans on the rate of all positions, and this on a prior, by as much as they
    lack in counts of their own: positions that were never proposed have the rate of all.
    """

    def __init__(self, prior: float = PRIOR) -> None:
        """Expect ``prior`` everywhere."""
        self._all = _Count(prior * WEIGHT, WEIGHT)
        self._places: list[_Count] = []

    def observe(self, proposed: int, accepted: int) -> None:
        """One row's proposal: all tokens up to the first that was not taken tell something, the others nothing."""
        while len(self._places) < proposed:
            self._places.append(_Count())
        for place in range(min(accepted + 1, proposed)):
            taken = place < accepted
            self._all.add(taken)
            self._places[place].add(taken)

    def conditional(self, places: int) -> list[float]:
        """The chance at each of the first ``places`` positions."""
        rate = self._all.taken / self._all.seen
        known = [count.lean(rate) for count in self._places[:places]]
        return known + [rate] * (places - len(known))


@dataclass(slots=True)
class _Count:
    taken: float = 0.0
    seen: float = 0.0

    def add(self, taken: bool) -> None:
        self.taken = MEMORY * self.taken + taken
        self.seen = MEMORY * self.seen + 1

    def lean(self, rate: float) -> float:
        return (self.taken + SHARED * rate) / (self.seen + SHARED)


class Times:
    """t and u as curves that were measured once, and what rounds tell beside them.

    How fast a machine is changes from moment to moment, more than what is decided here differs. So times of a round
    are held against the time of the target's own call in it, which had the same moment, and everything is told in the
    unit of the curves.
    """

    def __init__(self, verify: Curve, draft: Curve | None = None, *, most: int) -> None:
        """Begin with the curves as they are.

        Args:
            verify: t, of a call of the target by tokens of a row.
            draft: u, of a proposal by its tokens.
            most: Tokens that are ever proposed.
        """
        self._verify = [verify(ahead + 1) for ahead in range(most + 1)]
        self._draft = [draft(ahead) if draft and ahead else 0.0 for ahead in range(most + 1)]
        self._level, self._rest = 1.0, 0.0

    def load(self, ahead: int, seconds: float) -> float:
        """What a call with ``ahead`` tokens took, as a multiple of what the curve says."""
        return seconds / self._verify[ahead]

    def observe_rest(self, taken: float) -> None:
        """What a round needed besides the target's call and the proposals, in the unit of the curves."""
        self._rest = _towards(self._rest, max(taken, 0.0))

    def observe_draft(self, ahead: int, taken: float) -> None:
        """What a proposal of ``ahead`` tokens needed, in the unit of the curves."""
        if self._draft[ahead]:
            self._level = _towards(self._level, taken / self._draft[ahead])

    def round(self, ahead: int) -> float:
        """What a round takes that has ``ahead`` tokens of the draft."""
        return self._verify[ahead] + self._level * self._draft[ahead] + self._rest

    def verifying(self) -> list[float]:
        """What 0, 1, 2, ... tokens that cost nothing to propose add to a round, as shares of one without."""
        return [(taken - self._verify[0]) / self.round(0) for taken in self._verify]


def _towards(known: float, found: float) -> float:
    """A step, that a disturbed round cannot make large."""
    return known + (min(max(found, known / APART), known * APART) - known) * STEP if known else found


def best(conditional: Sequence[float], taken: Callable[[int], float], most: int, now: int = 0) -> int:
    """The K from 1 to ``most`` with the least time per token, taken(K) / E(K); of equal ones the smallest.

    Args:
        conditional: Chance of each of ``most`` positions that its token is taken once all before it are.
        taken: Time of a round that proposes so many.
        most: At least 1.
        now: The K until now, which stays where it is as good but for ``STICKY``: calls of a new shape cost something.
    """
    tokens = chance = 1.0
    each = [float("inf")]
    for ahead in range(1, most + 1):
        chance *= conditional[ahead - 1]
        tokens += chance  # E(K)
        each.append(taken(ahead) / tokens)
    least = min(each)
    return now if now and each[now] <= (1 + STICKY) * least else each.index(least)
