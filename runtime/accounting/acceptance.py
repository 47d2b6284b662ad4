"""How much of what was proposed is taken, position by position, and what that makes of the speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qexport.runtime.accounting.records import RoundRecord


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What became of one proposer's tokens. Position 0 is the first token of a proposal.

    Attributes:
        proposer: Its name.
        rounds: How many proposals it made, one per row and round.
        proposed: Tokens in them.
        accepted: Of these the ones that were taken.
        reached: For each position, how many proposals had a token there and all before it taken.
        taken: For each position, how many of those were taken too.
        offered: For each position, how many proposals had a token there.
    """

    proposer: str
    rounds: int
    proposed: int
    accepted: int
    reached: tuple[int, ...]
    taken: tuple[int, ...]
    offered: tuple[int, ...]

    @property
    def rate(self) -> float:
        """Share of all proposed tokens that were taken."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def conditional(self) -> tuple[float, ...]:
        """For each position, the chance that its token is taken once all before it are."""
        return tuple(
            taken / reached if reached else 0.0 for taken, reached in zip(self.taken, self.reached, strict=True)
        )

    @property
    def cumulative(self) -> tuple[float, ...]:
        """For each position, the chance that its token is taken, given that there is one."""
        return tuple(taken / offered for taken, offered in zip(self.taken, self.offered, strict=True))


def count_acceptance(rounds: Iterable[RoundRecord]) -> tuple[Acceptance, ...]:
    """Count by proposer, in the order of their names."""
    found: dict[str, list[tuple[int, int]]] = {}
    for record in rounds:
        for proposed, accepted, name in zip(record.proposed, record.accepted, record.proposers, strict=True):
            if proposed:
                found.setdefault(name, []).append((proposed, accepted))
    return tuple(_count(name, found[name]) for name in sorted(found))


def _count(name: str, pairs: Sequence[tuple[int, int]]) -> Acceptance:
    places = range(max(proposed for proposed, _ in pairs))
    return Acceptance(
        proposer=name,
        rounds=len(pairs),
        proposed=sum(proposed for proposed, _ in pairs),
        accepted=sum(accepted for _, accepted in pairs),
        reached=tuple(sum(proposed > place <= accepted for proposed, accepted in pairs) for place in places),
        taken=tuple(sum(accepted > place for _, accepted in pairs) for place in places),
        offered=tuple(sum(proposed > place for proposed, _ in pairs) for place in places),
    )


def expected_tokens(conditional: Sequence[float], ahead: int) -> float:
    """E(K): tokens that a round of ``ahead`` proposed tokens gives on average, the target's own included.

    The sum over positions of the chance that all up to there are taken; for a chance that is the same everywhere it is
    (1 - a^(K+1)) / (1 - a) of Leviathan et al. 2023, equation 1. Behind the last position that is known its chance
    stays.
    """
    total = chance = 1.0
    for place in range(ahead):
        chance *= conditional[min(place, len(conditional) - 1)] if conditional else 0.0
        total += chance
    return total


def predict_speedup(
    conditional: Sequence[float], ahead: int, target: Callable[[float], float], draft: Callable[[int], float]
) -> float:
    """Speed over plain decoding: E(K) t(1) / (t(K+1) + u(K)), which is Leviathan et al. 2023, theorem 3.8, measured.

    Args:
        conditional: Chance of each position that its token is taken once all before it are.
        ahead: Tokens that are proposed, K.
        target: t, what a call of so many tokens takes.
        draft: u, what it takes to propose so many, in the same unit.
    """
    return expected_tokens(conditional, ahead) * target(1) / (target(ahead + 1) + draft(ahead))
