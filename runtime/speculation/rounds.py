"""The loop: propose, verify in one call of the target, take what the rule takes, go back behind it.

The target's cache always ends before the last token that was decided: that one is pending, and is the first that the
next call reads. So a round costs one call of the target whatever comes of it, and each call gives one token more than
were accepted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from qexport.errors import DataInvalid, UsageError
from qexport.runtime.accounting.records import PrefillRecord, RoundRecord
from qexport.runtime.cache import Counts
from qexport.runtime.decoder import Decoder
from qexport.runtime.sampling.sampler import NotFiniteError, Sampler
from qexport.runtime.speculation.prefill import prefill
from qexport.runtime.speculation.proposal import NO_EFFORT, NOTHING, Effort, Logits, Proposal, Proposer, Row
from qexport.runtime.speculation.rules import Verdict, verify

Rule = Callable[[Proposal, Logits, Row, Sampler], Verdict]


class Policy(Protocol):
    """How far to look ahead."""

    def plan(self, rows: Sequence[Row]) -> int:
        """Most tokens to propose in the next round; 0 for plain decoding."""
        ...

    def observe(self, record: RoundRecord) -> None:
        """Learn from a round."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same number."""

    most: int

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for a number that proposes nothing."""
        if self.most < 1:
            raise UsageError(f"{self.most} tokens ahead, expected at least 1", hint="leave the draft out to switch off")

    def plan(self, rows: Sequence[Row]) -> int:
        """Return the number."""
        return self.most

    def observe(self, record: RoundRecord) -> None:
        """Learn nothing."""


class Outcome(NamedTuple):
    """What a row has got in a round.

    Attributes:
        tokens: In order; none where it failed.
        proposal: What was proposed for them.
        accepted: How many of it were taken.
        failure: Why the row cannot go on.
    """

    tokens: tuple[int, ...]
    proposal: Proposal = NOTHING
    accepted: int = 0
    failure: DataInvalid | None = None


class Round(NamedTuple):
    """What all rows have got, and what it cost."""

    outcomes: tuple[Outcome, ...]
    record: PrefillRecord | RoundRecord


class Rounds:
    """A batch of rows that grow together, each at its own pace; the target's cache is this batch's alone."""

    def __init__(self, target: Decoder, sampler: Sampler, proposer: Proposer | None, policy: Policy) -> None:
        """Begin nothing yet; without a proposer it is plain decoding."""
        self._target, self._sampler, self._proposer, self._policy = target, sampler, proposer, policy
        self.rule: Rule = verify
        self.rows: list[Row] = []
        self._numbers: list[int] = []
        self._effort = NO_EFFORT  # of the proposer, up to the last round

    def begin(self, rows: Sequence[Row]) -> Round:
        """Read the prompts and choose the first token of every row.

        Args:
            rows: With at least one token each.

        Raises:
            DataInvalid: A prompt is longer than the model reads.
        """
        began = time.perf_counter()
        self.rows, self._numbers = list(rows), list(range(len(rows)))
        self._spend()
        self._target.reset(len(rows))
        last, calls = prefill(self._target, [row.ids for row in rows])
        if self._proposer is not None:
            self._proposer.begin(rows)
        outcomes = tuple(self._decide(NOTHING, logits, row) for logits, row in zip(last, rows, strict=True))
        self._commit(outcomes)
        prompts, emitted = tuple(row.prompt for row in rows), tuple(len(found.tokens) for found in outcomes)
        drafted = self._spend().native
        native = self._target.seconds  # since the reset
        return Round(outcomes, PrefillRecord(began, time.perf_counter(), prompts, calls, emitted, native, drafted))

    def step(self, room: Sequence[int]) -> Round:
        """Run one round.

        Args:
            room: Tokens that each row may still get, at least one; no row gets more.
        """
        target, rows = self._target, self.rows
        began, native, start = time.perf_counter(), target.seconds, target.starts
        proposals = self._propose(room)
        proposed, drafted = time.perf_counter(), self._spend()
        ids, counts = _beside(rows, proposals)
        logits = target.extend(ids, counts)
        verified, read = time.perf_counter(), target.seconds
        outcomes = [
            self._decide(proposal, logits[index, : 1 + len(proposal.ids)], row)
            for index, (row, proposal) in enumerate(zip(rows, proposals, strict=True))
        ]
        target.rollback([length + 1 + found.accepted for length, found in zip(start, outcomes, strict=True)])
        self._decide_alone(outcomes, start)
        self._commit(outcomes)
        clock, again = time.perf_counter(), target.seconds - read
        record = RoundRecord(
            began=began,
            clock=clock,
            rows=tuple(self._numbers),
            width=ids.shape[1],
            valid=sum(start),
            proposed=tuple(len(found.proposal.ids) for found in outcomes),
            accepted=tuple(found.accepted for found in outcomes),
            emitted=tuple(len(found.tokens) for found in outcomes),
            proposers=tuple(proposal.proposer for proposal in proposals),
            propose=proposed - began,
            verify=verified - proposed + again,
            accept=clock - verified - again,
            native=target.seconds - native,
            native_draft=drafted.native,
            draft_calls=drafted.calls,
            draft_width=drafted.width,
            draft_valid=drafted.valid,
        )
        self._policy.observe(record)
        return Round(tuple(outcomes), record)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self.rows = [self.rows[index] for index in rows]
        self._numbers = [self._numbers[index] for index in rows]
        self._target.keep(rows)
        if self._proposer is not None:
            self._proposer.keep(rows)

    def _spend(self) -> Effort:
        """What the proposer's models did since this was asked before."""
        if self._proposer is None:
            return NO_EFFORT
        before, self._effort = self._effort, self._proposer.effort
        return self._effort.since(before)

    def _propose(self, room: Sequence[int]) -> list[Proposal]:
        """At most what the policy says, and so much that the target's own token has room behind it."""
        most = 0 if self._proposer is None else self._policy.plan(self.rows)
        if self._proposer is None or most == 0:
            return [NOTHING] * len(self.rows)
        limit = self._target.signature.positions
        wanted = [min(most, left - 1) for left in room]
        if limit is not None:
            wanted = [min(more, limit - len(row.ids)) for more, row in zip(wanted, self.rows, strict=True)]
        return self._proposer.propose(self.rows, wanted)

    def _decide(self, proposal: Proposal, logits: Logits, row: Row) -> Outcome:
        """A failure is the row's own."""
        try:
            verdict = self.rule(proposal, logits, row, self._sampler)
        except NotFiniteError as error:
            return Outcome((), proposal, 0, error)
        return Outcome(verdict.tokens, proposal, verdict.accepted)

    def _decide_alone(self, outcomes: list[Outcome], start: Sequence[int]) -> None:
        """Decide on one token, with none behind it, in rows that failed where something was proposed.

        What is no number may come from a proposed token, whether it is taken or not: masked columns are no part of a
        sum, but for NaN, which nothing times zero is. Those columns go with the old buffers. The same draws decide as
        would have: new ones would give the token behind which there are no numbers a second chance not to come.
        """
        failed = [index for index, found in enumerate(outcomes) if found.failure is not None and found.proposal.ids]
        if not failed:
            return
        rows = self.rows
        self._target.rollback(
            [start[index] if index in failed else now for index, now in enumerate(self._target.starts)]
        )
        self._target.keep(range(len(rows)))
        counts = np.isin(np.arange(len(rows)), failed).astype(np.int64)
        logits = self._target.extend(np.array([[row.ids[-1]] for row in rows], np.int64), counts)
        for index in failed:
            outcomes[index] = self._decide(outcomes[index].proposal.alone(), logits[index, :1], rows[index])

    def _commit(self, outcomes: Sequence[Outcome]) -> None:
        for row, outcome in zip(self.rows, outcomes, strict=True):
            row.ids.extend(outcome.tokens)


def _beside(rows: Sequence[Row], proposals: Sequence[Proposal]) -> tuple[Counts, Counts | None]:
    """The pending token of each row and what is proposed behind it, ``[rows, width]``; and how many if they differ."""
    if len(rows) == 1:
        return np.array([[rows[0].ids[-1], *proposals[0].ids]], np.int64), None
    counts = np.array([1 + len(proposal.ids) for proposal in proposals], np.int64)
    ids = np.zeros((len(rows), counts.max()), np.int64)
    for index, (row, proposal) in enumerate(zip(rows, proposals, strict=True)):
        ids[index, 0] = row.ids[-1]
        ids[index, 1 : counts[index]] = proposal.ids
    return ids, counts
