"""What came of a build, in a word and a sentence: is the result as good as float, is it smaller, is it faster."""

from __future__ import annotations

from collections.abc import Iterator

from qexport.exporter.outcome.result import Latency, Quality, Result, TaskScore
from qexport.exporter.outcome.summary import growth, human_bytes
from qexport.exporter.report.html.words import many
from qexport.exporter.report.values import Verdict, Word

POINTS = 0.3
"""Most that a task may lose where no gate says so, in points (x100)."""
RISE = 0.01
"""The same as a share of the metric, where lower is better."""
COSINE = 0.95
"""Least cosine of any sample to float where no gate says so."""


def verdict(result: Result) -> Verdict:
    """Judge a build by its own measurements.

    "worse": quality is outside the gates, or outside what is said above where there is none; "mixed": it is inside, but
    the result is slower or larger, or has lost more than is said above and gates allow that; "better": neither, and the
    result is smaller and measured faster; "as good": anything else that was measured. A time of another runtime than
    the target's counts for nothing.
    """
    return Verdict(_word(result), _sentence(result), tuple(_facts(result)))


def broken(quality: Quality, gates: dict[str, float]) -> list[str]:
    """The limits that a result does not hold, as words; gates come first, and without any the usual ones hold."""
    task = quality.task
    found = []
    if task is not None and "max_drop" in gates and not task.drop <= gates["max_drop"]:
        found.append(f"{_lost(task)} where {gates['max_drop']:g} are allowed")
    if "min_cosine" in gates and not quality.least_mean >= gates["min_cosine"]:
        found.append(f"has a mean cosine of {quality.least_mean:.4f} to float where {gates['min_cosine']:g} is asked")
    if "min_worst_cosine" in gates and not quality.least >= gates["min_worst_cosine"]:
        found.append(f"has a sample with cosine {quality.least:.4f} where {gates['min_worst_cosine']:g} is asked")
    return found if gates else losses(quality)


def losses(quality: Quality) -> list[str]:
    """What makes a result less good than float, whatever gates allow, as words."""
    task, found = quality.task, []
    if task is not None and not task.drop <= _allowed(task):
        found.append(_lost(task))
    if not quality.least >= COSINE:
        found.append(f"is far from float on sample {quality.worst_sample} (cosine {quality.least:.3f})")
    return found


def pace(latency: Latency | None) -> int | None:
    """1: faster than float, -1: slower, 0: alike within the noise, ``None``: not known for this target."""
    if latency is None or latency.foreign:
        return None
    return int(latency.speedup_low > 1) - int(latency.speedup_high < 1)


def times(ratio: float) -> str:
    """A ratio in words: ``3.8 times``."""
    return f"{ratio:.1f} times" if ratio >= 1.095 else f"{ratio:.2f} times"


def _allowed(task: TaskScore) -> float:
    return POINTS if task.better == "higher" else RISE * abs(task.reference)


def _lost(task: TaskScore) -> str:
    if task.better == "lower":
        return f"raises {task.name} by {task.drop:.2f}"
    return f"loses {task.drop:.2f} points of {task.name}"


def _word(result: Result) -> Word:
    if result.quality is None:
        return "unmeasured"
    if broken(result.quality, result.gates):
        return "worse"
    speed, size = pace(result.latency), growth(result)
    if size > 0 or speed == -1 or losses(result.quality):
        return "mixed"
    return "better" if speed == 1 and size < 0 else "as good"


def _sentence(result: Result) -> str:
    quality = result.quality
    merits, faults = _merits(result)
    if quality is None:
        told = " and ".join([*merits, *faults]) or "as large as before"
        return f"The result is {told}; how good it is was not measured, as there was no data."
    where = "on held-out data" if quality.held_out else "on data of which calibration has seen some"
    failures = broken(quality, result.gates)
    if lost := failures or losses(quality):
        told = " and ".join([*merits, *faults])
        allowed = "" if failures else ", which its gates allow"
        return f"The result {' and '.join(lost)} {where}{allowed}{f'; it is {told}' if told else ''}{_untimed(result)}."
    good = ", ".join([f"as good as float {where}", *merits[:-1]])
    sentence = f"The result is {good}{f' and {merits[-1]}' if merits else ''}"
    if faults:
        sentence += f", but {' and '.join(faults)}"
    return f"{sentence}{_untimed(result)}."


def _untimed(result: Result) -> str:
    return f"; its speed on {result.target} was not measured" if pace(result.latency) is None else ""


def _merits(result: Result) -> tuple[list[str], list[str]]:
    """What is better and what is worse about size and speed."""
    merits, faults = [], []
    size, speed, latency = growth(result), pace(result.latency), result.latency
    if size < 0:
        merits.append(f"{times(result.bytes_before / max(result.bytes_after, 1))} smaller")
    elif size > 0:
        faults.append(f"{times(result.bytes_after / max(result.bytes_before, 1))} larger")
    if latency is not None and speed == 1:
        merits.append(f"{times(latency.speedup)} faster")
    elif latency is not None and speed == -1:
        faults.append(f"{times(1 / max(latency.speedup, 1e-9))} slower")
    elif speed == 0:
        merits.append("as fast within the noise")
    return merits, faults


def _facts(result: Result) -> Iterator[str]:
    quality, latency = result.quality, result.latency
    if quality is not None and quality.task is not None:
        task = quality.task
        gate = f", {result.gates['max_drop']:g} allowed" if "max_drop" in result.gates else ""
        yield f"{task.name} {task.reference:.2f} → {task.result:.2f} ({task.drop:+.2f} lost{gate})"
    if quality is not None:
        yield f"cosine to float: mean {quality.least_mean:.4f}, worst {quality.least:.4f} of {quality.samples} samples"
    yield f"{human_bytes(result.bytes_before)} → {human_bytes(result.bytes_after)}"
    if latency is not None and not latency.foreign:
        yield (
            f"{latency.reference_ms:.3g} ms → {latency.result_ms:.3g} ms on {latency.runtime}: {latency.speedup:.2f} "
            f"times the speed ({latency.speedup_low:.2f} to {latency.speedup_high:.2f})"
        )
    yield f"{many(result.quantized, 'node')} quantized, {sum(result.skipped.values())} skipped"
    if result.backed_off:
        yield f"{many(len(result.backed_off), 'region')} went back to float"
