"""The artefact folder: what lies in it, and the receipt that vouches for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import qexport
from qexport.exporter.load import Source
from qexport.exporter.outcome.receipt import MANIFEST, MANIFEST_SCHEMA, files_of, tool_versions
from qexport.exporter.outcome.result import (
    DecisionInfo,
    EngineInfo,
    FileInfo,
    Latency,
    Quality,
    Result,
    StepInfo,
)
from qexport.exporter.recipe import Recipe
from qexport.exporter.report.files import NO_TABLES, can_write_tables, write_report
from qexport.exporter.report.markdown import report_markdown
from qexport.exporter.report.values import Report
from qexport.exporter.samples import Samples
from qexport.exporter.steps import PASSES
from qexport.runtime.memory import peak_memory
from qexport.safe_io import Stage, finite

if TYPE_CHECKING:
    from qexport.exporter.precision.backoff import Trial
    from qexport.exporter.product import Product

MODEL = "model.onnx"
RESULT, REPORT = "result.json", "report.md"
PAGE, CARD = "report.html", "README.md"
RESULT_SCHEMA: Literal["qexport.result/1"] = "qexport.result/1"


@dataclass(frozen=True, slots=True)
class Built:
    """What a build has when the model and the engine are written.

    Attributes:
        source: The model as it came.
        recipe: What was run over it.
        samples: The data.
        trial: The result: how good it is, how fast, and what had to stay in float for it.
        engine: What is known of the engine, where there is one.
        remarks: Warnings beside those of data, recipe and result.
        resumed: The stages that an equal build had done before.
        seconds: What it took so far.
    """

    source: Source
    recipe: Recipe
    samples: Samples
    trial: Trial
    engine: EngineInfo | None
    remarks: tuple[str, ...]
    resumed: tuple[str, ...]
    seconds: float


def write_result(stage: Stage, output: Path, built: Built) -> Result:
    """Write what was found out, and the source's other files; model and plan are in the stage already."""
    for companion in built.source.companions:
        stage.copy(companion, companion.name)
    result = _result(built, output, files_of(stage))
    stage.write_json(RESULT, finite(result.model_dump(mode="json", by_alias=True)))
    stage.write_text(REPORT, report_markdown(result))
    return result


def write_pages(stage: Stage, result: Result, report: Report) -> None:
    """Write the report as data and as a page, and the model card."""
    from qexport.exporter.report.card import model_card
    from qexport.exporter.report.html.page import render

    write_report(stage, report)
    stage.write_text(PAGE, render(result, report))
    stage.write_text(CARD, model_card(result, report))


def write_manifest(stage: Stage, result: Result, built: Built, replay: dict[str, Any]) -> None:
    """Write the receipt, last: what went in, by which tools, what came out, and how to build it again."""
    calibration = built.samples.calibration
    told = {
        "schema": MANIFEST_SCHEMA,
        "version": result.version,
        "target": result.target,
        "source": result.source.model_dump(),
        "calibration": None if calibration is None else calibration.digest,
        "recipe": result.recipe,
        "replay": replay,
        "decisions": [d.model_dump() for step in result.steps for d in step.decisions],
        "engine": None if result.engine is None else result.engine.model_dump(mode="json"),
        "tools": tool_versions(),
        "files": {name: info.model_dump() for name, info in files_of(stage).items()},
    }
    stage.write_json(MANIFEST, told)


def _result(built: Built, output: Path, files: dict[str, FileInfo]) -> Result:
    trial, steps = built.trial, step_infos(built.trial.product)
    quantized, skipped = count_decisions(steps)
    return Result(
        schema=RESULT_SCHEMA,
        version=qexport.__version__,
        directory=str(output),
        target=built.recipe.export.target,
        source=built.source.info,
        recipe=built.recipe.as_dict(),
        files=files,
        steps=steps,
        quantized=quantized,
        skipped=skipped,
        bytes_before=built.source.info.bytes,
        bytes_after=sum(info.bytes for name, info in files.items() if name.startswith(MODEL)),
        quality=trial.quality,
        latency=trial.latency,
        engine=built.engine,
        backed_off=trial.backed_off,
        tried=trial.tried,
        gates={k: v for k, v in built.recipe.gates.model_dump().items() if v is not None},
        warnings=tuple(_warnings(built, steps, quantized)),
        resumed=built.resumed,
        seconds=built.seconds,
        peak_rss_bytes=peak_memory(),
    )


def step_infos(product: Product) -> tuple[StepInfo, ...]:
    """What the steps of a recipe did, as a result tells it."""
    return tuple(
        StepInfo(
            name=step.name,
            modified=step.modified,
            seconds=step.seconds,
            nodes=step.nodes,
            parameters=step.parameters,
            proof=proof,
            decisions=tuple(DecisionInfo(**asdict(decision)) for decision in step.decisions),
        )
        for step, proof in zip(product.steps, product.proofs, strict=True)
    )


def count_decisions(steps: Sequence[StepInfo]) -> tuple[int, dict[str, int]]:
    """How many nodes the quantizing steps quantized, and for each reason how many they skipped, most first."""
    decisions = [d for step in steps if PASSES[step.name].quantizes for d in step.decisions]
    skipped = Counter(d.reason for d in decisions if d.action == "skipped")
    return sum(d.action == "quantized" for d in decisions), dict(skipped.most_common())


def _warnings(built: Built, steps: Sequence[StepInfo], quantized: int) -> Iterator[str]:
    """All of them, what matters most first."""
    trial = built.trial
    yield from _idle(steps, quantized)
    yield from (*built.samples.warnings, *trial.product.warnings, *trial.remarks, *built.remarks)
    yield from _judged(trial.quality, trial.latency)
    if not can_write_tables():
        yield NO_TABLES


def _idle(recorded: Sequence[StepInfo], quantized: int) -> Iterator[str]:
    """What the recipe asked for and did not get."""
    asked = [step for step in recorded if not PASSES[step.name].exact]
    refusals = [f"{d.op} {d.node}: {d.reason}" if d.node else d.reason for step in asked for d in step.decisions]
    if any(PASSES[step.name].quantizes for step in asked) and quantized == 0:
        yield f"nothing was quantized ({'; '.join(refusals[:3]) or 'there is nothing to quantize'})"
    elif asked and not any(step.modified for step in asked):
        yield f"the recipe made nothing smaller ({'; '.join(refusals[:3])})"


def _judged(quality: Quality | None, latency: Latency | None) -> Iterator[str]:
    """What is doubtful about speed and quality."""
    if latency is not None and latency.note and not latency.foreign:
        yield f"{latency.runtime}: {latency.speedup:.2f}x the speed of float; {latency.note}"
    if quality is not None and quality.least < 0.9:
        name = quality.worst_output
        sample = quality.outputs[name].worst_sample
        yield f"sample {sample} has a cosine of {quality.least:.3f} to the float model at output {name!r}"
