"""How much of the machine target and draft use: bytes and operations against its peaks.

MBU is the bytes that had to be read, weights once per call and keys and values of what is valid, per second and as a
share of the peak; MFU is the operations that had to be done, likewise. Both go by the seconds inside of the backend;
padding and columns of a cache that are not valid are no work that had to be done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qexport.runtime.accounting.costs import Costs
from qexport.runtime.accounting.machine import CPU, Machine, measure_machine
from qexport.runtime.accounting.profiles import Profile
from qexport.runtime.accounting.records import PrefillRecord, RoundRecord, Run


@dataclass(frozen=True, slots=True)
class Known:
    """What times are held against: peaks of the machine, and what target and draft cost on it.

    Attributes:
        machine: ``None`` where nobody measured the device that the models run on: shares of it are not told then.
        target: Its curve.
        draft: That of the draft, if there is one.
    """

    machine: Machine | None
    target: Profile
    draft: Profile | None = None


def find_known(target: Profile, draft: Profile | None = None) -> Known:
    """Measure the peaks of the processor if the target runs there, with as many threads; nobody measures GPUs yet."""
    machine = measure_machine(target.threads) if target.fingerprint.device == CPU else None
    return Known(machine, target, draft)


@dataclass(frozen=True, slots=True)
class Use:
    """How much of the machine a model used.

    Attributes:
        calls: Of its backend.
        seconds: Inside of it.
        bytes: That had to be read.
        operations: That had to be done.
        intensity: Operations per byte.
        mbu: Share of the peak bandwidth, for a working set of this size.
        mfu: Share of the peak of single precision; more than 1 is possible for products of integers.
        bound: ``memory`` where the bandwidth sets the higher limit on time, or ``compute``. These three are ``None``
            where nobody measured the machine.
    """

    calls: int
    seconds: float
    bytes: float
    operations: float
    intensity: float
    mbu: float | None = None
    mfu: float | None = None
    bound: str | None = None


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the machine was used for.

    Attributes:
        prefill: The target on prompts.
        target: The target in rounds.
        draft: The draft in rounds, where there is one.
        bytes_per_token: Bytes that target and draft read in rounds per token that came of it.
        predicted_speedup: Over plain decoding, by the measured curves and what was accepted.
    """

    prefill: Use
    target: Use
    draft: Use | None
    bytes_per_token: float
    predicted_speedup: float


@dataclass(frozen=True, slots=True)
class _Work:
    """Of one model: calls, tokens of rows in them, tokens in the cache that were looked at, pairs of these, seconds."""

    calls: int
    tokens: float
    cached: float
    pairs: float
    seconds: float


def mbu(read: float, seconds: float, peak: float) -> float:
    """Model bandwidth utilization: bytes that had to be read per second, as a share of the peak.

    For decoding one token at a time it is (weights + keys and values) / TPOT / peak.
    """
    return read / seconds / peak if seconds else 0.0


def mfu(operations: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilization (Chowdhery et al. 2022, appendix B): operations that had to be done per second."""
    return operations / seconds / peak if seconds else 0.0


def measure_use(runs: Sequence[Run], known: Known) -> Hardware:
    """Hold what was run against what the machine can do, as far as that is known."""
    rounds = [record for run in runs for record in run.rounds]
    target = _use(_in_rounds(rounds), known.target.costs, known.machine)
    drafted = any(record.draft_calls for record in rounds)
    draft = _use(_drafted(rounds), known.draft.costs, known.machine) if known.draft and drafted else None
    emitted = sum(sum(record.emitted) for record in rounds)
    read = target.bytes + (draft.bytes if draft else 0.0)
    return Hardware(
        prefill=_use(_in_prompts([run.prefill for run in runs]), known.target.costs, known.machine),
        target=target,
        draft=draft,
        bytes_per_token=read / emitted if emitted else 0.0,
        predicted_speedup=_predicted(rounds, known),
    )


def _use(work: _Work, costs: Costs, machine: Machine | None) -> Use:
    read, done = costs.bytes_read(work.cached, work.calls), costs.operations(work.tokens, work.pairs)
    told = Use(
        calls=work.calls,
        seconds=work.seconds,
        bytes=read,
        operations=done,
        intensity=done / read if read else 0.0,
    )
    if machine is None:
        return told
    peak = machine.peak(read / max(work.calls, 1))
    return replace(
        told,
        mbu=mbu(read, work.seconds, peak),
        mfu=mfu(done, work.seconds, machine.flops),
        bound="memory" if read / peak > done / machine.flops else "compute",
    )


def _in_prompts(told: Sequence[PrefillRecord]) -> _Work:
    prompts = [length for record in told for length in record.prompts]
    return _Work(
        calls=sum(record.calls for record in told),
        tokens=sum(prompts),
        cached=sum(prompts),
        pairs=sum(length * (length + 1) / 2 for length in prompts),
        seconds=sum(record.native for record in told),
    )


def _in_rounds(rounds: Sequence[RoundRecord]) -> _Work:
    """Each row's pending token and its proposal; rows are taken for equally long."""
    tokens = pairs = cached = 0.0
    for record in rounds:
        own = [1 + proposed for proposed in record.proposed]
        tokens += sum(own)
        cached += record.valid + sum(own)
        pairs += record.valid / max(len(own), 1) * sum(own) + sum(count * (count + 1) / 2 for count in own)
    return _Work(len(rounds), tokens, cached, pairs, sum(record.native for record in rounds))


def _drafted(rounds: Sequence[RoundRecord]) -> _Work:
    calls = sum(record.draft_calls for record in rounds)
    tokens = sum(record.draft_width * len(record.rows) for record in rounds)
    valid = sum(record.draft_valid for record in rounds)
    pairs = sum(record.draft_valid * record.draft_width / record.draft_calls for record in rounds if record.draft_calls)
    return _Work(calls, tokens, valid + tokens, pairs + tokens, sum(record.native_draft for record in rounds))


def _predicted(rounds: Sequence[RoundRecord], known: Known) -> float:
    """Time of plain decoding over time of these rounds, both by the curves."""
    plain = spent = 0.0
    for record in rounds:
        plain += sum(record.emitted) / max(len(record.rows), 1) * known.target.milliseconds(1)
        spent += known.target.milliseconds(record.width)
        if known.draft and record.draft_calls:
            spent += record.draft_calls * known.draft.milliseconds(record.draft_width / record.draft_calls)
    return plain / spent if spent else 1.0
