"""What whoever sets the pace lets proposers do; it writes, they read."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Terms:
    """Conditions of the next round, for all rows of a batch.

    Attributes:
        limits: Most tokens by proposer, as ``Proposal.proposer`` says; 0 for none. Who is not there has no limit.
        price: What one more token in a call of the target costs, as a share of a call with one token for each row.
        rival: Tokens per row that are decoded in the time of such a call by what is asked where a copy is not
            proposed; 1 where that is plain decoding.
    """

    limits: dict[str, int] = field(default_factory=dict)
    price: float = 0.1
    rival: float = 1.0

    def limit(self, name: str, most: int) -> int:
        """What is left of ``most`` for a proposer."""
        return min(most, self.limits.get(name, most))
