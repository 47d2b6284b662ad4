"""``README.md`` of an artefact: a model card, with front matter that catalogues of models read."""

from __future__ import annotations

import json
from collections.abc import Iterator

from qexport.exporter.outcome.result import Result
from qexport.exporter.outcome.summary import counts, human_bytes
from qexport.exporter.report.html.words import many, model_name, name
from qexport.exporter.report.markdown import code, table, text
from qexport.exporter.report.values import Report

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt"}
"""Targets whose results another library runs than onnxruntime."""
WORST = 3  # samples that are told


def model_card(result: Result, report: Report) -> str:
    """The card as Markdown; what comes from a model or its data is escaped."""
    parts = (_front_matter, _what, _numbers, _made, _run, _limits, _provenance)
    return "\n".join(line for part in parts for line in part(result, report)) + "\n"


def _front_matter(result: Result, report: Report) -> Iterator[str]:
    """YAML whose scalars are written as JSON, so that a name cannot end them."""
    tags = ["onnx", "qexport", _recipe(result), result.target, *(["quantized"] if result.quantized else [])]
    yield "---"
    yield f"base_model: {_scalar(model_name(result.source.path))}"
    yield f"library_name: {_scalar(LIBRARIES.get(result.target, 'onnxruntime'))}"
    yield "tags:"
    yield from (f"  - {_scalar(tag)}" for tag in dict.fromkeys(tags))
    if result.quality and result.quality.task:
        yield "metrics:"
        yield f"  - {_scalar(result.quality.task.name)}"
    yield "---"
    yield ""


def _scalar(value: object) -> str:
    return json.dumps(name(value), ensure_ascii=False)


def _recipe(result: Result) -> str:
    return str(result.recipe.get("name", "?"))


def _what(result: Result, report: Report) -> Iterator[str]:
    yield f"# {text(name(model_name(result.source.path)))}, {text(_recipe(result))} for {text(result.target)}"
    yield ""
    yield text(report.verdict.sentence)
    yield ""
    yield f"Verdict: **{text(report.verdict.word)}**. All plots and the reason for every choice: `report.html`."
    yield ""


def _numbers(result: Result, report: Report) -> Iterator[str]:
    yield "## Numbers"
    yield ""
    rows = [("size", human_bytes(result.bytes_before), human_bytes(result.bytes_after))]
    quality, latency = result.quality, result.latency
    if quality is not None:
        if (task := quality.task) is not None:
            rows.append((text(task.name), f"{task.reference:.2f}", f"{task.result:.2f}"))
        rows.append(("cosine to float, mean", "1", f"{quality.least_mean:.4f}"))
        rows.append(("cosine to float, worst sample", "1", f"{quality.least:.4f}"))
    if latency is not None and not latency.foreign:
        rows.append((f"ms a call, {text(latency.runtime)}", f"{latency.reference_ms:.3g}", f"{latency.result_ms:.3g}"))
    yield from table(("", "float:", "this model:"), rows)
    if quality is not None:
        kind = "none" if quality.held_out else "some"
        yield f"Judged on {quality.samples} samples of {code(quality.data)}, {kind} of them used for calibration."
        yield ""
    if latency is not None and not latency.foreign:
        interval = f"{latency.speedup:.2f}x ({latency.speedup_low:.2f} to {latency.speedup_high:.2f})"
        yield f"Speed against float: {interval}, {many(latency.pairs, 'pair')}, {many(latency.threads, 'thread')}."
        yield ""


def _made(result: Result, report: Report) -> Iterator[str]:
    yield "## How it was made"
    yield ""
    skipped = f"; {sum(result.skipped.values())} skipped: {text(counts(result.skipped))}" if result.skipped else ""
    recipe = code(_recipe(result))
    yield f"qexport {text(result.version)}, recipe {recipe}: {result.quantized} nodes quantized{skipped}."
    yield ""
    changed = [step.name for step in result.steps if step.modified]
    if changed:
        yield f"Steps that changed the graph: {', '.join(code(step) for step in changed)}."
        yield ""
    if result.gates:
        yield f"Gates that it passed: {', '.join(f'{code(gate)} {value:g}' for gate, value in result.gates.items())}."
        yield ""
    if result.backed_off:
        yield f"{many(len(result.backed_off), 'region')} went back to float: {text(result.backed_off[0].reason)}."
        yield ""


def _run(result: Result, report: Report) -> Iterator[str]:
    yield "## How to run it"
    yield ""
    yield "```python"
    yield "from qexport.runtime import open_session"
    yield ""
    yield 'session = open_session(".")  # this folder'
    yield "outputs = session.run(feeds)  # arrays by the names of the inputs"
    yield "```"
    yield ""
    if result.target not in LIBRARIES:
        yield "`model.onnx` runs in onnxruntime without qexport as well."
        yield ""
    elif result.engine is not None:
        asked = ", ".join(result.engine.compute_capabilities)
        where = f"of compute capability {text(asked)}" if asked else "that this release knows"
        made = f"{text(result.engine.module)} {text(result.engine.version)}"
        yield f"`engine.plan` needs {made} and a GPU {where}."
        yield ""


def _limits(result: Result, report: Report) -> Iterator[str]:
    yield "## Limits"
    yield ""
    quality = result.quality
    if quality is None:
        yield "- How good it is was not measured."
    else:
        yield f"- Quality is known on {code(quality.data)} alone; other data may lose more."
        yield from (f"- Sample {s.index} has a cosine of {s.cosine:.4f} to float." for s in report.samples[:WORST])
    if result.latency is None or result.latency.foreign:
        yield f"- Its speed on {text(result.target)} was not measured."
    yield from (f"- {text(warning)}" for warning in result.warnings[:20])
    if report.samples:
        yield "- `report.html` and `report.json` show evaluation samples: mind what is in them before sharing."
    yield ""


def _provenance(result: Result, report: Report) -> Iterator[str]:
    yield "## Provenance"
    yield ""
    source = result.source
    rows = [("source", code(source.path), code(source.digest))]
    rows += [("file", code(file), code(info.digest)) for file, info in result.files.items() if file.startswith("model")]
    yield from table(("what", "name", "digest"), rows)
    yield "`manifest.json` has the digests of all files, the recipe and the versions of all tools."
