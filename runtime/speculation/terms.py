"""What whoever sets the pace lets proposers do; it writes, they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

LONGEST = 32  # tokens of a copy


def _even() -> tuple[float, ...]:
    return tuple(0.1 * count for count in range(LONGEST + 1))


@dataclass(slots=True)
class Terms:
    """Conditions of the next round, for all rows of a batch.

    Attributes:
        limits: Most tokens by proposer, as ``Proposal.proposer`` says; 0 for none. Who is not there has no limit.
        costs: What it costs to verify 0, 1, 2, ... tokens beside the pending one, as shares of a call with that one
            alone: t(K+1) / t(1) - 1. No copy is longer than that goes.
        worth: Tokens per row that such a call's time is worth, when it is decided how long copies are.
        rival: The same of what is asked where a copy is not proposed; 1 for plain decoding.
    """

    limits: dict[str, int] = field(default_factory=dict)
    costs: Sequence[float] = field(default_factory=_even)
    worth: float = 1.25
    rival: float = 1.0

    def limit(self, name: str, most: int) -> int:
        """What is left of ``most`` for a proposer."""
        return min(most, self.limits.get(name, most))
