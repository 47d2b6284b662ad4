"""What a run was worth: latencies, acceptance, where the time went, how much of the machine was used.

Definitions. TTFT is the time until a row's first token is there. TPOT is the time between two tokens of a row; tokens
that arrive together in a round share its time evenly, so that TPOT compares with plain decoding, and what a reader of
the stream waits for is told as the time of rounds. What the caller does between rounds counts nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qexport.runtime.accounting.acceptance import Acceptance, count_acceptance
from qexport.runtime.accounting.records import RoundRecord, Run
from qexport.runtime.accounting.utilization import Hardware, Known, measure_use

SCHEMA = "qexport.stats/1"


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Milliseconds."""

    mean: float
    p50: float
    p95: float


@dataclass(frozen=True, slots=True)
class Split:
    """Seconds by what they went into: the prompts, and of the rounds all that is not ``prefill``.

    Attributes:
        prefill: Reading prompts, up to the first tokens.
        draft: Proposals.
        verify: Calls of the target without transfers.
        accept: The rule, the commit and the rollback.
        transfer: Copies between a device and the host.
        other: The rest of the rounds.
    """

    prefill: float
    draft: float
    verify: float
    accept: float
    transfer: float
    other: float


@dataclass(frozen=True, slots=True)
class Stats:
    """What a request or a run was worth; see the module for definitions.

    Attributes:
        rows: Sequences.
        prompt_tokens: Of all of them.
        tokens: That came out, of all of them.
        ttft: Of rows.
        tpot: Of tokens but the first of each row; ``None`` where there are none.
        round: Of rounds.
        tokens_per_second: Per second of rounds, all rows together, the first tokens not counted.
        target_calls: Of rounds, one each.
        tokens_per_call: Tokens per row and call of the target, at least 1.
        proposers: What became of proposals.
        split: Where the seconds went.
        overhead: Share of the rounds that was spent outside of backends and transfers, in Python.
        hardware: Only where peaks are known.
        baseline: Tokens per second of plain decoding in the same run, where it was measured.
    """

    rows: int
    prompt_tokens: int
    tokens: int
    ttft: Quantiles
    tpot: Quantiles | None
    round: Quantiles | None
    tokens_per_second: float
    target_calls: int
    tokens_per_call: float
    proposers: tuple[Acceptance, ...]
    split: Split
    overhead: float
    hardware: Hardware | None = None
    baseline: float | None = None

    @property
    def speedup(self) -> float | None:
        """Measured speed over plain decoding."""
        return self.tokens_per_second / self.baseline if self.baseline else None

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the chances that follow from the counts."""
        told = {"schema": SCHEMA, **asdict(self), "speedup": self.speedup}
        chances = ("rate", "conditional", "cumulative")
        for entry, found in zip(told["proposers"], self.proposers, strict=True):
            entry.update({name: getattr(found, name) for name in chances})
        return told


def account(runs: Sequence[Run], known: Known | None = None, baseline: float | None = None) -> Stats:
    """Sum up.

    Args:
        runs: At least one; with the same models where ``known`` is given.
        known: Peaks and costs.
        baseline: Tokens per second of plain decoding in the same run.
    """
    rounds = [record for run in runs for record in run.rounds]
    emitted = sum(sum(record.emitted) for record in rounds)
    seconds = sum(record.seconds for record in rounds)
    split = _split(runs, rounds)
    native = sum(record.native + record.native_draft for record in rounds)
    return Stats(
        rows=sum(len(run.prefill.prompts) for run in runs),
        prompt_tokens=sum(sum(run.prefill.prompts) for run in runs),
        tokens=emitted + sum(sum(run.prefill.emitted) for run in runs),
        ttft=_quantiles([run.prefill.clock - run.prefill.began for run in runs for _ in run.prefill.prompts]),
        tpot=_quantiles(token_seconds(rounds)) if emitted else None,
        round=_quantiles([record.seconds for record in rounds]) if rounds else None,
        tokens_per_second=emitted / seconds if seconds else 0.0,
        target_calls=len(rounds),
        tokens_per_call=emitted / max(sum(len(record.rows) for record in rounds), 1),
        proposers=count_acceptance(rounds),
        split=split,
        overhead=1 - (native + split.transfer) / seconds if seconds else 0.0,
        hardware=None if known is None else measure_use(runs, known),
        baseline=baseline,
    )


def token_seconds(rounds: Iterable[RoundRecord]) -> list[float]:
    """Time of every token of every row: that of its round, shared evenly among those that the row got in it."""
    return [record.seconds / count for record in rounds for count in record.emitted for _ in range(count)]


def _quantiles(seconds: Sequence[float]) -> Quantiles:
    milliseconds = 1e3 * np.asarray(seconds, np.float64)
    low, high = np.percentile(milliseconds, [50, 95])
    return Quantiles(float(milliseconds.mean()), float(low), float(high))


def _split(runs: Sequence[Run], rounds: Sequence[RoundRecord]) -> Split:
    def total(of: Callable[[RoundRecord], float]) -> float:
        return sum(map(of, rounds))

    return Split(
        prefill=sum(run.prefill.clock - run.prefill.began for run in runs),
        draft=total(lambda record: record.propose),
        verify=total(lambda record: record.verify - record.transfer),
        accept=total(lambda record: record.accept),
        transfer=total(lambda record: record.transfer),
        other=total(lambda record: record.seconds - record.propose - record.verify - record.accept),
    )
