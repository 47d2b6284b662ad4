"""``report.md``: the whole result for people, in tables, worst things first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from qexport.errors import printable
from qexport.exporter.outcome.result import DecisionInfo, LayerQuality, Quality, Result
from qexport.exporter.outcome.summary import (
    LOSS,
    counts,
    cut_line,
    engine_line,
    human_bytes,
    latency_line,
    quality_line,
    size_line,
    task_line,
)

EXAMPLES = 4
"""Names shown of each group of decisions; ``result.json`` has them all."""


def report_markdown(result: Result) -> str:
    """Return the report as GitHub-flavoured Markdown; names from the model are escaped."""
    parts = (_head, _sizes, _cut, _quality, _layers, _latency, _backed_off, _engine, _decisions, _steps, _provenance)
    return "\n".join(line for part in parts for line in part(result)) + "\n"


def text(value: object) -> str:
    """Escape a name or a sentence that may hold anything, for use in running text or a table cell."""
    flat = " ".join(printable(str(value)).split())
    return "".join(f"\\{c}" if c in "\\`*_[]<|~" else c for c in flat)


def code(value: object) -> str:
    """Write a name as code, for use in running text or a table cell."""
    flat = " ".join(printable(str(value)).split()).replace("`", "'").replace("|", "\\|")
    return f"`{flat}`" if flat else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield a table with an empty line behind it; columns whose title ends in ``:`` are aligned right."""
    yield f"| {' | '.join(title.removesuffix(':') for title in header)} |"
    yield f"|{'|'.join('---:' if title.endswith(':') else '---' for title in header)}|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _head(result: Result) -> Iterator[str]:
    recipe = str(result.recipe.get("name", "?"))
    yield f"# {text(result.source.path)}: {text(recipe)} for {text(result.target)}"
    yield ""
    memory = human_bytes(result.peak_rss_bytes)
    yield f"Made by qexport {text(result.version)} in {result.seconds:.1f} s; peak memory {memory}."
    yield ""
    for warning in result.warnings:
        yield f"> **Warning:** {text(warning)}"
        yield ""


def _sizes(result: Result) -> Iterator[str]:
    yield f"## Size: {text(size_line(result))}"
    yield ""
    rows = [(code(name), human_bytes(info.bytes), code(info.digest)) for name, info in result.files.items()]
    source = result.source
    rows.insert(0, (f"source: {code(source.path)}", human_bytes(source.bytes), code(source.digest)))
    yield from table(("file", "size:", "digest"), rows)


def _cut(result: Result) -> Iterator[str]:
    line = cut_line(result)
    if not line:
        return
    yield f"## Cut: {text(line)}"
    yield ""
    yield "What went is no longer in the file: its tensors are smaller. Latency, below, is of both models in turn."
    yield ""
    rows = (
        (text(step.name), code(d.node), f"{d.units[0]} of {d.units[1]}", text(d.reason), text(d.detail))
        for step in result.steps
        for d in step.decisions
        if d.units is not None
    )
    yield from table(("step", "where", "stay:", "what", "numbers"), rows)


def _quality(result: Result) -> Iterator[str]:
    yield "## Quality"
    yield ""
    quality = result.quality
    if quality is None:
        yield "Not measured: no data was given."
        yield ""
        return
    yield f"Float against result: {text(quality_line(quality))}."
    yield ""
    yield from table(("measure", "value:", "gate:"), _measures(quality, result.gates))
    if len(quality.outputs) > 1:
        rows = [
            (code(name), f"{found.cosine_mean:.5f}", f"{found.cosine_worst:.5f}", f"{found.sqnr:.2f}")
            for name, found in quality.outputs.items()
        ]
        yield "Every output; gates judge the worst of them:"
        yield ""
        yield from table(("output", "cosine, mean:", "cosine, worst:", "SQNR, dB:"), rows)
    if quality.task:
        yield f"Task: {text(task_line(quality.task))}."
        yield ""


def _measures(quality: Quality, gates: dict[str, float]) -> Iterator[tuple[str, str, str]]:
    def gate(name: str, sign: str) -> str:
        return f"{sign} {gates[name]:g}" if name in gates else ""

    yield "cosine, mean", f"{quality.cosine_mean:.5f}", gate("min_cosine", ">=")
    yield "cosine, worst sample", f"{quality.cosine_worst:.5f}", gate("min_worst_cosine", ">=")
    yield "SQNR", f"{quality.sqnr:.2f} dB", ""
    yield "largest absolute error", f"{quality.max_error:.4g}", ""
    if task := quality.task:
        yield f"{text(task.name)}, float", f"{task.reference:.2f}", ""
        yield f"{text(task.name)}, result", f"{task.result:.2f}", ""
        yield f"{text(task.name)}, {LOSS[task.better]}", f"{task.drop:+.2f}", gate("max_drop", "<=")


def _layers(result: Result) -> Iterator[str]:
    layers: tuple[LayerQuality, ...] = result.quality.layers if result.quality else ()
    if not layers:
        return
    yield "## Layers, noisiest first"
    yield ""
    yield "Signal over quantization noise of each output against its float value."
    yield "A layer far below the others is the one to keep in float."
    yield ""
    worst = sorted(layers, key=lambda layer: layer.sqnr)
    yield from table(("node", "tensor", "SQNR, dB:"), ((code(x.node), code(x.tensor), f"{x.sqnr:.1f}") for x in worst))


def _latency(result: Result) -> Iterator[str]:
    yield "## Latency"
    yield ""
    latency = result.latency
    if latency is None:
        yield "Not measured."
        yield ""
        return
    note = f" {text(latency.note)}." if latency.note else ""
    yield f"{text(latency_line(latency))}.{note}"
    yield ""
    shapes = ", ".join(f"{code(name)} {shape}" for name, shape in latency.shapes.items())
    rows = [
        ("float", f"{latency.reference_ms:.4g} ms"),
        ("result", f"{latency.result_ms:.4g} ms"),
        ("speedup", f"{latency.speedup:.2f} ({latency.speedup_low:.2f} to {latency.speedup_high:.2f})"),
        ("pairs", str(latency.pairs)),
        ("shapes", shapes),
    ]
    yield from table(("measure", "value:"), rows)


def _backed_off(result: Result) -> Iterator[str]:
    if not result.backed_off:
        return
    yield f"## Backed off: {len(result.backed_off)} regions of int8 went back to float"
    yield ""
    rows = (
        (", ".join(code(node) for node in entry.nodes), text(entry.reason), text(entry.detail))
        for entry in result.backed_off
    )
    yield from table(("region", "reason", "numbers"), rows)


def _engine(result: Result) -> Iterator[str]:
    engine = result.engine
    if engine is None:
        return
    yield "## Engine"
    yield ""
    yield f"{text(engine_line(engine))}."
    yield ""
    yield f"Devices: {text(', '.join(engine.compute_capabilities) or 'portable')}."
    yield ""
    rows = [
        (str(number), code(name), *(str(shape) for shape in shapes))
        for number, profile in enumerate(engine.profiles)
        for name, shapes in profile.items()
    ]
    yield from table(("profile:", "input", "smallest", "best", "largest"), rows)


def _decisions(result: Result) -> Iterator[str]:
    yield f"## Decisions: {result.quantized} nodes quantized, {sum(result.skipped.values())} skipped"
    yield ""
    if result.skipped:
        yield f"Skipped: {text(counts(result.skipped))}."
        yield ""
    groups: dict[tuple[str, str, str, str], list[DecisionInfo]] = defaultdict(list)
    for step in result.steps:
        for decision in step.decisions:
            groups[step.name, decision.action, decision.op, decision.reason].append(decision)
    if not groups:
        return
    rows = (
        (text(step), text(action), code(op), text(reason), str(len(found)), _names(found))
        for (step, action, op, reason), found in groups.items()
    )
    yield from table(("step", "action", "operator", "reason", "nodes:", "which"), rows)


def _names(found: Sequence[DecisionInfo]) -> str:
    more = f" and {len(found) - EXAMPLES} more" if len(found) > EXAMPLES else ""
    return ", ".join(code(decision.node) for decision in found[:EXAMPLES]) + more


def _steps(result: Result) -> Iterator[str]:
    yield "## Steps"
    yield ""
    yield "Proof is the largest relative error against the step before, for steps that may not change a number."
    yield ""
    rows = (
        (
            str(number),
            text(step.name),
            "yes" if step.modified else "no",
            str(step.nodes),
            f"{step.seconds:.2f}",
            "" if step.proof is None else f"{step.proof:.1e}",
        )
        for number, step in enumerate(result.steps, 1)
    )
    yield from table(("step:", "pass", "changed", "nodes:", "seconds:", "proof:"), rows)


def _provenance(result: Result) -> Iterator[str]:
    source = result.source
    yield "## Provenance"
    yield ""
    rows = [
        ("source", code(source.path)),
        ("source digest", code(source.digest)),
        ("source nodes", str(source.nodes)),
        ("source parameters", str(source.parameters)),
        ("qexport", text(result.version)),
        ("target", text(result.target)),
    ]
    if result.quality:
        rows.append(("evaluation data", code(result.quality.data)))
    if result.engine:
        rows.append(("engine builder", f"{text(result.engine.module)} {text(result.engine.version)}"))
    yield from table(("what", "value"), rows)
    yield "The recipe as it was run stands in `result.json`."
