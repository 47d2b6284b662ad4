"""What a run leaves behind for accounts: one record of the prompts, one of every round, by whoever runs them.

All clocks are those of ``time.perf_counter``, all times are seconds. A round is one call of the target with what came
before it and after it: tokens are proposed, verified, accepted. Plain decoding is rounds of width 1 with nothing
proposed. Between two rounds the caller has the tokens: that time is nobody's here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class PrefillRecord(NamedTuple):
    """Reading the prompts, up to the first token of each row.

    Attributes:
        began: Clock at the start.
        clock: Clock when the first tokens were there.
        prompts: Tokens of each row's prompt, for the whole batch in order.
        calls: Calls of the target, one per chunk.
        emitted: Tokens that each row has got: one, or none where nothing was to be generated.
        native: Seconds of them inside of the target's backend.
        native_draft: Seconds of them inside of the draft's backend, where it reads the prompts too.
    """

    began: float
    clock: float
    prompts: tuple[int, ...]
    calls: int = 1
    emitted: tuple[int, ...] = ()
    native: float = 0.0
    native_draft: float = 0.0


class RoundRecord(NamedTuple):
    """One round. What is said "of each row" is in the order of ``rows``, and as long.

    Attributes:
        began: Clock at the start, before anything is proposed.
        clock: Clock at the end, when the tokens are committed and the caches rolled back.
        rows: Numbers of the rows that are active, by their place in the batch as it began.
        width: Tokens of a row in the call of the target: the pending one and the longest proposal.
        valid: Tokens in the target's cache before the call, of all rows together.
        proposed: Tokens proposed, of each row.
        accepted: Of these the ones that were taken, of each row; less than ``emitted`` by the target's own token,
            and more where a stop cut a run of accepted tokens short.
        emitted: Tokens that the row has got.
        proposers: Who proposed, of each row; empty where nothing was.
        propose: Seconds for proposals, the draft's caches included.
        verify: Seconds of the whole call of the target, what the runtime does around its backend included.
        accept: Seconds for the rule, the commit and the rollback.
        native: Seconds of ``verify`` inside of the target's backend.
        native_draft: Seconds of ``propose`` inside of the draft's backend.
        transfer: Seconds of ``verify`` for copies between a device and the host; none on the processor. Backends on
            GPUs do not tell them apart yet: there they are part of ``native``.
        draft_calls: Calls of the draft's backend; of an unrolled draft, its steps, as each reads all weights.
        draft_width: Tokens of a row that the draft read in them, all calls together.
        draft_valid: Tokens in the draft's cache before each call, of all rows and all calls together.
    """

    began: float
    clock: float
    rows: tuple[int, ...]
    width: int
    valid: int
    proposed: tuple[int, ...]
    accepted: tuple[int, ...]
    emitted: tuple[int, ...]
    proposers: tuple[str, ...]
    propose: float = 0.0
    verify: float = 0.0
    accept: float = 0.0
    native: float = 0.0
    native_draft: float = 0.0
    transfer: float = 0.0
    draft_calls: int = 0
    draft_width: int = 0
    draft_valid: int = 0

    @property
    def seconds(self) -> float:
        """What the round took."""
        return self.clock - self.began


@dataclass(frozen=True, slots=True)
class Run:
    """One batch from its prompts to its last token."""

    prefill: PrefillRecord
    rounds: tuple[RoundRecord, ...]

    def of_row(self, row: int) -> Run:
        """What one row saw of it: it waits as long as all others."""
        told = self.prefill
        first = told._replace(prompts=told.prompts[row : row + 1], emitted=told.emitted[row : row + 1])
        return Run(
            first, tuple(_of_row(record, record.rows.index(row)) for record in self.rounds if row in record.rows)
        )


def _of_row(record: RoundRecord, place: int) -> RoundRecord:
    here = slice(place, place + 1)
    return record._replace(
        rows=record.rows[here],
        proposed=record.proposed[here],
        accepted=record.accepted[here],
        emitted=record.emitted[here],
        proposers=record.proposers[here],
    )
