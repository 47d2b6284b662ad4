"""The last words of a build: what was done, how good and how fast it is, where it is, what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

from qexport.errors import printable
from qexport.exporter.outcome.result import BackedOff, EngineInfo, Latency, Quality, Result, TaskScore

MAX_LINES = 15
ALIKE = 0.01
"""Sizes closer than this share are alike."""
_UNITS = ("B", "kB", "MB", "GB", "TB")


def summary_lines(result: Result) -> list[str]:
    """Return at most ``MAX_LINES`` lines of plain text, one fact each."""
    facts = list(_facts(result))
    last = ("next", f"qexport inspect {shlex.quote(str(PurePath(result.directory) / 'model.onnx'))}")
    room = MAX_LINES - len(facts) - 1
    lines = [*facts, *_warnings(result.warnings, room), last]
    return [f"{label:<10} {' '.join(printable(text).split())}" for label, text in lines]


def human_bytes(count: int) -> str:
    """Write a number of bytes with three digits in decimal units."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.3g} {_UNITS[unit]}"


def counts(reasons: Mapping[str, int]) -> str:
    """Write reasons with their counts, most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))


def growth(result: Result) -> int:
    """1: larger than before, -1: smaller, 0: alike."""
    before, after = result.bytes_before, result.bytes_after
    return int(after > before * (1 + ALIKE)) - int(after < before * (1 - ALIKE))


def size_line(result: Result) -> str:
    """Write both sizes and their ratio."""
    before, after = human_bytes(result.bytes_before), human_bytes(result.bytes_after)
    ratio = result.bytes_before / max(result.bytes_after, 1)
    change = {-1: f"{ratio:.1f}x smaller" if ratio >= 1.05 else "a little smaller", 0: "as large", 1: "LARGER"}
    return f"{before} -> {after} ({change[growth(result)]})"


def cut_line(result: Result) -> str:
    """Write how many units of each kind stay, and what that makes of the parameters; empty where none were cut."""
    kept: dict[str, list[int]] = {}
    for step in result.steps:
        for decision in step.decisions:
            if decision.units is not None:
                total = kept.setdefault(decision.op, [0, 0])
                total[:] = (total[0] + decision.units[0], total[1] + decision.units[1])
    if all(left == count for left, count in kept.values()):
        return ""
    units = ", ".join(f"{left:,} of {count:,} {kind}" for kind, (left, count) in kept.items())
    before, after = parameters_around(result)
    share = f" ({1 - after / before:.1%} fewer)" if before else ""
    return f"{units} stay; {before:,} -> {after:,} parameters{share}"


def parameters_around(result: Result) -> tuple[int, int]:
    """Parameters before the first and after the last step that cut units out."""
    cuts = [
        place
        for place, step in enumerate(result.steps)
        if any(d.units is not None and d.units[0] < d.units[1] for d in step.decisions)
    ]
    first, last = cuts[0], cuts[-1]
    before = result.steps[first - 1].parameters if first else result.source.parameters
    return before, result.steps[last].parameters


def quality_line(quality: Quality) -> str:
    """Write how close the result is to the float model."""
    data = "held-out samples" if quality.held_out else "samples, some of them from calibration,"
    worst = "" if quality.worst_output == quality.output else _worst(quality)
    return (
        f"cosine mean {quality.cosine_mean:.4f}, worst {quality.cosine_worst:.4f} (sample {quality.worst_sample}), "
        f"SQNR {quality.sqnr:.1f} dB on {quality.samples} {data} of {quality.data}{worst}"
    )


def _worst(quality: Quality) -> str:
    name = quality.worst_output
    found = quality.outputs[name]
    return f"; output {name!r}: mean {found.cosine_mean:.4f}, worst {found.cosine_worst:.4f}"


LOSS = {"higher": "drop", "lower": "rise"}
"""What a loss is called, by the way a metric is better."""


def task_change(task: TaskScore) -> str:
    """Write what a task has lost, without its sign."""
    if abs(task.drop) < 0.005:  # two digits are told
        return f"no {LOSS[task.better]}"
    return f"{LOSS[task.better]} {task.drop:.2f}" if task.drop > 0 else f"better by {-task.drop:.2f}"


def task_line(task: TaskScore) -> str:
    """Write the task metric before and after."""
    unchanged = "" if task.unchanged is None else f", {task.unchanged:.1%} of predictions unchanged"
    change = f"{LOSS[task.better]} {round(task.drop, 2) + 0.0:+.2f}"
    return f"{task.name} {task.reference:.2f} -> {task.result:.2f} ({change}{unchanged})"


def latency_line(latency: Latency) -> str:
    """Write the paired measurement; a result that is slower than float says so in capitals."""
    verdict = "faster" if latency.speedup >= 1 else "SLOWER than float"
    if latency.speedup_low < 1 < latency.speedup_high:
        verdict = "no faster than float, within the noise"
    if latency.foreign:
        verdict = "not the target's speed, which needs its own hardware to measure"
    shapes = ", ".join("x".join(map(str, shape)) for shape in latency.shapes.values())
    return (
        f"{latency.reference_ms:.3g} ms -> {latency.result_ms:.3g} ms, {latency.speedup:.2f}x: {verdict} "
        f"({latency.runtime}, {latency.threads} thread{'' if latency.threads == 1 else 's'}, {shapes})"
    )


def backed_off_line(entries: Sequence[BackedOff]) -> str:
    """Write how many regions went back to float, and why the first of them did."""
    first = entries[0]
    more = len(first.nodes) - 1
    which = f"{first.nodes[0]} and {more} more" if more else first.nodes[0]
    what = f"{len(entries)} {'region' if len(entries) == 1 else 'regions'} of int8 to float"
    return f"{what}, such as {which}: {first.detail}"


def engine_line(engine: EngineInfo) -> str:
    """Write what was built, and whether it ran."""
    ran = "ran here" if engine.ran else "not run here"
    note = f"; {engine.note}" if engine.note else ""
    return (
        f"{engine.module} {engine.version}, {human_bytes(engine.bytes)}, {engine.layers} layers, "
        f"built in {engine.seconds:.1f} s, {ran}{note}"
    )


def _facts(result: Result) -> Iterator[tuple[str, str]]:
    recipe = result.recipe.get("name", "?")
    yield "built", f"{result.source.path} with recipe {recipe} for {result.target} in {result.seconds:.1f} s"
    if result.resumed:
        yield "resumed", f"{', '.join(result.resumed)}: done by an equal build before"
    yield "size", size_line(result)
    if cut := cut_line(result):
        yield "cut", cut
    yield "quantized", f"{result.quantized} nodes"
    if result.skipped:
        yield "skipped", f"{sum(result.skipped.values())} nodes: {counts(result.skipped)}"
    if result.backed_off:
        yield "backed off", backed_off_line(result.backed_off)
    yield "quality", quality_line(result.quality) if result.quality else "not measured: no data was given"
    if result.quality and result.quality.task:
        yield "task", task_line(result.quality.task)
    if result.gates:
        yield "gates", "passed: " + ", ".join(f"{name} {value:g}" for name, value in result.gates.items())
    yield "latency", latency_line(result.latency) if result.latency else "not measured"
    latency = result.latency
    if latency and latency.note and not latency.foreign and not _told(latency.note, result.warnings):
        yield "note", latency.note
    if result.engine:
        yield "engine", engine_line(result.engine)
    yield "files", f"{result.directory}: {', '.join(result.files)}; how good it is and why: report.html"


def _told(note: str, warnings: tuple[str, ...]) -> bool:
    return any(note in warning for warning in warnings)


def _warnings(warnings: tuple[str, ...], room: int) -> Iterator[tuple[str, str]]:
    shown = warnings if len(warnings) <= room else warnings[: room - 1]
    for warning in shown:
        yield "warning", warning
    if len(shown) < len(warnings):
        yield "warning", f"and {len(warnings) - len(shown)} more in report.html"
