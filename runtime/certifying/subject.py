"""What is certified: the very loop that generates, made anew for each experiment, and models to hold it against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qexport.runtime.accounting.records import RoundRecord
from qexport.runtime.decoder import Decoder
from qexport.runtime.sampling.sampler import Sampler
from qexport.runtime.sampling.settings import Sampling
from qexport.runtime.speculation.cascade import Cascade
from qexport.runtime.speculation.chains import Chains
from qexport.runtime.speculation.draft import Draft
from qexport.runtime.speculation.lookup import Lookup
from qexport.runtime.speculation.proposal import Proposer, Reference, Row
from qexport.runtime.speculation.rounds import Fixed, Policy, Rounds, Rule
from qexport.runtime.speculation.rules import verify
from qexport.runtime.speculation.unrolled import Unrolled

PLAIN, DRAFT, UNROLLED, LOOKUP, CASCADE = "plain", "draft", "unrolled", "lookup", "lookup+draft"
_STRIDES = (3, 0, 1, 4, 2, 0, 0, 1)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to decode.

    Attributes:
        sampling: Settings and seed.
        ahead: Tokens that are proposed at most.
        proposer: ``plain`` for nobody, ``draft``, ``unrolled`` for the same in one call, ``lookup`` for copies, or
            ``lookup+draft``.
        steady: Whether ``ahead`` tokens are asked for in every round, or now more, now fewer, now none.
        coupled: Whether the draft draws with the target's numbers, and tokens are taken by equality.
    """

    sampling: Sampling
    ahead: int = 1
    proposer: str = DRAFT
    steady: bool = True
    coupled: bool = False


class Wandering:
    """Other numbers of tokens in every round, up to some number, and rounds of plain decoding between them."""

    def __init__(self, most: int) -> None:
        """Up to ``most``."""
        self._most, self._round = most, 0

    def plan(self, rows: Sequence[Row]) -> int:
        """The next number."""
        self._round += 1
        return min(self._most, _STRIDES[self._round % len(_STRIDES)])

    def observe(self, record: RoundRecord) -> None:
        """Learn nothing."""


@dataclass(frozen=True)
class Subject:
    """A target and its draft; the loop's decoders share the models with the others and have states of their own.

    Attributes:
        target: The loop's.
        truth: The same model for whole rows.
        draft: The loop's; ``None`` to certify copies alone.
        draft_truth: The same model for whole rows.
        chains: The same model unrolled, where it can be.
        rule: What the loop decides by.
    """

    target: Decoder
    truth: Decoder
    draft: Decoder | None = None
    draft_truth: Decoder | None = None
    chains: Chains | None = field(default=None, kw_only=True)
    rule: Rule = field(default=verify, kw_only=True)

    def loop(self, way: Way) -> Rounds:
        """Rounds that have not begun."""
        sampler = Sampler(way.sampling, coupled=way.coupled)
        policy: Policy = Fixed(way.ahead) if way.steady else Wandering(way.ahead)
        rounds = Rounds(self.target, sampler, self.proposer(way.proposer, sampler), policy)
        rounds.rule = self.rule
        return rounds

    def proposer(self, name: str, sampler: Sampler) -> Proposer | None:
        """Who looks ahead."""
        if name == PLAIN:
            return None
        parts = [self._part(part, sampler) for part in name.split("+")]
        return parts[0] if len(parts) == 1 else Cascade(parts)

    def can(self, name: str) -> bool:
        """Whether this proposer can be made of what is there."""
        return (DRAFT not in name or self.draft is not None) and (UNROLLED not in name or self.chains is not None)

    def _part(self, name: str, sampler: Sampler) -> Proposer:
        if name == LOOKUP:
            return Lookup()
        if name == UNROLLED:
            assert self.chains is not None, "there is no unrolled draft"
            return Unrolled(self.chains, sampler, self.target.signature.vocabulary)
        return self._draft(sampler)

    def _draft(self, sampler: Sampler) -> Proposer:
        assert self.draft is not None, "there is no draft"
        return Draft(self.draft, sampler, self.target.signature.vocabulary)


def make_rows(prompts: Sequence[Sequence[int]], count: int, sources: Sequence[Reference] = ()) -> list[Row]:
    """Rows of one batch: the prompts in turn, each row with a stream of its own, and what it may copy from."""
    return [
        Row(list(prompts[index % len(prompts)]), len(prompts[index % len(prompts)]), index, tuple(sources))
        for index in range(count)
    ]
