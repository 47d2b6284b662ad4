"""What a target, and a draft for it, are worth on this machine: plain decoding against every way to look ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qexport.runtime.accounting.acceptance import Acceptance, count_acceptance, predict_speedup
from qexport.runtime.accounting.stats import Stats, account
from qexport.runtime.accounting.utilization import Known
from qexport.runtime.benchmarking.interleaved import Ratio, Timing, compare

SCHEMA = "qexport.bench/1"
PLAIN, AUTO = "plain", "auto"


@dataclass(frozen=True, slots=True)
class Entry:
    """One way to decode.

    Attributes:
        name: Of the way.
        ahead: Tokens that the draft proposes, where their number is fixed.
        tokens_per_second: Prompts included, by a clock outside of the runtime.
        speedup: Over plain decoding, in pairs.
        predicted: The same by formula, from the measured curves and the acceptance by position; with a draft only.
        same: Prompts whose tokens are those of plain decoding.
        stats: What the runtime says.
    """

    name: str
    ahead: int | None
    tokens_per_second: float
    speedup: Ratio
    predicted: float | None
    same: int
    stats: Stats


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Everything that was measured.

    Attributes:
        target: Folder.
        draft: Folder, if there is one.
        prompts: How many.
        max_tokens: Most tokens of each.
        rounds: How often each was decoded in every way.
        known: The machine and the curves.
        entries: Plain decoding first.
        acceptance: Of the draft, over all numbers of tokens ahead that are fixed.
    """

    target: str
    draft: str | None
    prompts: int
    max_tokens: int
    rounds: int
    known: Known
    entries: tuple[Entry, ...]
    acceptance: Acceptance | None

    @property
    def best(self) -> Entry | None:
        """The fastest of those that look a fixed number of tokens ahead."""
        fixed = [entry for entry in self.entries if entry.ahead is not None]
        return max(fixed, key=lambda entry: entry.speedup.value, default=None)

    @property
    def auto_over_best(self) -> float | None:
        """Speed with K chosen by the runtime over that with the best fixed K."""
        auto, best = next((entry for entry in self.entries if entry.name == AUTO), None), self.best
        return auto.speedup.value / best.speedup.value if auto and best else None

    def as_json(self) -> dict[str, Any]:
        """Plain values, for files."""
        told = {"schema": SCHEMA, **asdict(self), "auto_over_best": self.auto_over_best}
        told["best"] = None if self.best is None else self.best.name
        told["entries"] = [
            {**asdict(entry), "stats": entry.stats.as_json()} for entry in self.entries
        ]  # with the chances that follow from counts
        return told


@dataclass(frozen=True, slots=True)
class Subject:
    """What was decoded, and where.

    Attributes:
        target: Folder.
        draft: Folder, if there is one.
        max_tokens: Most tokens of each prompt.
        known: The machine and the curves.
    """

    target: str
    draft: str | None
    max_tokens: int
    known: Known


def summarize(subject: Subject, timings: Sequence[Timing]) -> BenchResult:
    """Sum up; the first timing is that of plain decoding."""
    plain, known = timings[0], subject.known
    acceptance = _drafted([timing for timing in timings if timing.way.ahead is not None])
    baseline = account(plain.runs).tokens_per_second
    return BenchResult(
        target=subject.target,
        draft=subject.draft,
        prompts=len(plain.decoded[0]),
        max_tokens=subject.max_tokens,
        rounds=len(plain.decoded),
        known=known,
        entries=tuple(
            Entry(
                name=timing.way.name,
                ahead=timing.way.ahead,
                tokens_per_second=timing.tokens_per_second,
                speedup=compare(timing, plain),
                predicted=predicted(known, acceptance, timing.way.ahead),
                same=timing.same(plain),
                stats=account(timing.runs, known, baseline),
            )
            for timing in timings
        ),
        acceptance=acceptance,
    )


def predicted(known: Known, acceptance: Acceptance | None, ahead: int | None) -> float | None:
    """Speed over plain decoding for a number of tokens ahead; ``None`` without a draft or its acceptance."""
    draft = known.draft
    if acceptance is None or draft is None or ahead is None:
        return None
    return predict_speedup(
        acceptance.conditional, ahead, known.target.milliseconds, lambda steps: steps * draft.milliseconds(1)
    )


def _drafted(timings: Sequence[Timing]) -> Acceptance | None:
    """What the proposer that proposed most made of it."""
    found = count_acceptance(record for timing in timings for run in timing.runs for record in run.rounds)
    return max(found, key=lambda acceptance: acceptance.proposed, default=None)
