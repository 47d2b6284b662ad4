"""The four numbers that the page begins with: quality, size, speed, and what was built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from qexport.exporter.outcome.result import Latency, Quality, Result
from qexport.exporter.outcome.summary import cut_line, growth, human_bytes, task_change
from qexport.exporter.report.html.plots import spark_deciles, spark_size, spark_speed, spark_steps
from qexport.exporter.report.html.words import count, fixed, many, number, shape
from qexport.exporter.report.values import Report
from qexport.exporter.report.verdict import broken, pace

Tone = Literal["good", "bad", "open"]
TONES: dict[int, Tone] = {1: "good", 0: "open", -1: "bad"}


@dataclass(frozen=True, slots=True)
class Tile:
    """A number before and after, what that means, and the facts behind it."""

    title: str
    before: str
    after: str
    change: str
    tone: Tone
    spark: Markup
    lines: tuple[str, ...]


def tiles(result: Result, report: Report) -> tuple[Tile, ...]:
    """Quality, size, speed, build."""
    return _quality(result, report), _size(result), _speed(result), _build(result)


def _quality(result: Result, report: Report) -> Tile:
    quality = result.quality
    if quality is None:
        return Tile("Quality", "", "not measured", "there was no data", "open", Markup(""), ())
    tone: Tone = "bad" if broken(quality, result.gates) else "good"
    spark, lines = spark_deciles(report.deciles), tuple(_quality_lines(quality, result.gates))
    if (task := quality.task) is None:
        change = f"worst sample {fixed(quality.least, 4)}{_gate(result.gates, 'min_worst_cosine', '≥')}"
        return Tile("Cosine to float, mean", "", fixed(quality.least_mean, 4), change, tone, spark, lines)
    before, after = fixed(task.reference, 2), fixed(task.result, 2)
    change = task_change(task) + _gate(result.gates, "max_drop", "≤")
    return Tile(f"Quality: {task.name}", before, after, change, tone, spark, lines)


def _gate(gates: dict[str, float], name: str, sign: str) -> str:
    return f", gate {sign} {gates[name]:g}" if name in gates else ""


def _quality_lines(quality: Quality, gates: dict[str, float]) -> Iterator[str]:
    if quality.task is not None:
        of = "cosine, worst output" if len(quality.outputs) > 1 else "cosine"
        yield f"{of}: mean {fixed(quality.least_mean, 4)}, worst {fixed(quality.least, 4)}"
        if quality.task.unchanged is not None:
            yield f"{quality.task.unchanged:.1%} of predictions unchanged"
    kind = "held-out" if quality.held_out else "not held-out"
    noise = "no difference" if quality.max_error == 0 else f"SQNR {fixed(quality.sqnr, 1)} dB"
    yield f"{noise}, {many(quality.samples, f'{kind} sample')}"
    asked = [f"{name} {value:g}" for name, value in gates.items() if name != "max_drop"]
    if asked:
        yield f"gates: {', '.join(asked)}"


def _size(result: Result) -> Tile:
    before, after, way = result.bytes_before, result.bytes_after, growth(result)
    change = {-1: f"{number(before / max(after, 1), 2)}× smaller", 0: "as large", 1: "LARGER"}[way]
    lines = [f"{many(result.quantized, 'node')} quantized, {count(sum(result.skipped.values()))} skipped"]
    if result.backed_off:
        lines.append(f"{many(len(result.backed_off), 'region')} went back to float")
    before_it = f"before: {many(result.source.parameters, 'parameter')} in {many(result.source.nodes, 'node')}"
    lines.append(cut_line(result) or before_it)
    lines += [f"engine.plan: {human_bytes(result.engine.bytes)}"] if result.engine is not None else []
    return Tile(
        "Size", human_bytes(before), human_bytes(after), change, TONES[-way], spark_size(before, after), tuple(lines)
    )


def _speed(result: Result) -> Tile:
    latency = result.latency
    if latency is None:
        return Tile("Speed", "", "not measured", "", "open", Markup(""), ())
    if latency.foreign:
        line = f"{latency.reference_ms:.3g} → {latency.result_ms:.3g} ms on {latency.runtime}, which it is not made for"
        words = f"{result.target} was not here to run it"
        return Tile("Speed", "", "not measured", words, "open", Markup(""), (line,))
    way = pace(latency)
    words = {1: "faster", 0: "alike within the noise", -1: "SLOWER than float"}[way or 0]
    change = f"{latency.speedup:.2f}× the speed: {words}"
    before, after = f"{number(latency.reference_ms)} ms", f"{number(latency.result_ms)} ms"
    return Tile("Speed", before, after, change, TONES[way or 0], spark_speed(latency), tuple(_speed_lines(latency)))


def _speed_lines(latency: Latency) -> Iterator[str]:
    yield f"{latency.speedup_low:.2f} to {latency.speedup_high:.2f}× in {latency.pairs} pairs"
    first = next((f", {shape(sizes)}" for sizes in latency.shapes.values()), "")
    yield f"{latency.runtime}, {many(latency.threads, 'thread')}{first}"


def _build(result: Result) -> Tile:
    longest = max(result.steps, key=lambda step: step.seconds, default=None)
    lines = [f"{number(result.seconds)} s, {human_bytes(result.peak_rss_bytes)} of memory at most"]
    lines += [f"longest step: {longest.name}, {number(longest.seconds)} s"] if longest is not None else []
    recipe, engine, spark = str(result.recipe.get("name", "?")), result.engine, spark_steps(result.steps)
    if engine is None:
        return Tile("Build", "", recipe, f"for {result.target}", "open", spark, (*lines, "no engine was asked for"))
    lines.append(f"{engine.module} {engine.version}, {human_bytes(engine.bytes)}, {engine.layers} layers")
    lines.append("the engine ran here" if engine.ran else f"the engine did not run here: {engine.note or 'not tried'}")
    return Tile("Build", "", recipe, f"engine for {result.target}", "open", spark, tuple(lines))
