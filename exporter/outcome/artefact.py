"""The artefact folder: what lies in it, and the receipt that vouches for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import qexport
from qexport.exporter.load import Source
from qexport.exporter.outcome.receipt import MANIFEST, MANIFEST_SCHEMA, files_of, tool_versions
from qexport.exporter.outcome.result import (
    BackedOff,
    DecisionInfo,
    EngineInfo,
    Latency,
    Quality,
    Result,
    StepInfo,
    Tried,
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
    from qexport.exporter.product import Product

MODEL = "model.onnx"
RESULT, REPORT = "result.json", "report.md"
PAGE, CARD = "report.html", "README.md"
RESULT_SCHEMA: Literal["qexport.result/1"] = "qexport.result/1"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a build did, before it is known how good and how large the result is."""

    recipe: Recipe
    steps: tuple[StepInfo, ...]
    quantized: int
    skipped: dict[str, int]
    calibration: str | None
    warnings: tuple[str, ...]
    seconds: float
    replay: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """How good, how fast and how large the result is, what had to stay in float for it, what was known before."""

    quality: Quality | None
    latency: Latency | None
    engine: EngineInfo | None
    backed_off: tuple[BackedOff, ...] = ()
    remarks: tuple[str, ...] = ()
    tried: tuple[Tried, ...] = ()
    resumed: tuple[str, ...] = ()


def summarize(recipe: Recipe, product: Product, samples: Samples, seconds: float) -> Facts:
    """Turn pass records into the report's values."""
    steps = tuple(
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
    decisions = [d for step in steps if PASSES[step.name].quantizes for d in step.decisions]
    return Facts(
        recipe=recipe,
        steps=steps,
        quantized=sum(d.action == "quantized" for d in decisions),
        skipped=dict(Counter(d.reason for d in decisions if d.action == "skipped").most_common()),
        calibration=None if samples.calibration is None else samples.calibration.digest,
        warnings=(*samples.warnings, *product.warnings),
        seconds=seconds,
    )


def write_artefact(
    stage: Stage, output: Path, source: Source, facts: Facts, evidence: Evidence, tell: Callable[[Result], Report]
) -> Result:
    """Write everything but the model and the plan, which are in the stage already; the manifest comes last.

    ``tell`` makes the report of a result.
    """
    quality, latency, engine = evidence.quality, evidence.latency, evidence.engine
    for companion in source.companions:
        stage.copy(companion, companion.name)
    result = Result(
        schema=RESULT_SCHEMA,
        version=qexport.__version__,
        directory=str(output),
        target=facts.recipe.export.target,
        source=source.info,
        recipe=facts.recipe.as_dict(),
        files=files_of(stage),
        steps=facts.steps,
        quantized=facts.quantized,
        skipped=facts.skipped,
        bytes_before=source.info.bytes,
        bytes_after=sum(size for name, (size, _) in stage.files.items() if name.startswith(MODEL)),
        quality=quality,
        latency=latency,
        engine=engine,
        backed_off=evidence.backed_off,
        tried=evidence.tried,
        gates={k: v for k, v in facts.recipe.gates.model_dump().items() if v is not None},
        warnings=(*_idle(facts), *facts.warnings, *evidence.remarks, *_late_warnings(quality, latency), *_tables()),
        resumed=evidence.resumed,
        seconds=facts.seconds,
        peak_rss_bytes=peak_memory(),
    )
    stage.write_json(RESULT, finite(result.model_dump(mode="json", by_alias=True)))
    stage.write_text(REPORT, report_markdown(result))
    report = tell(result)
    write_report(stage, report)
    _write_pages(stage, result, report)
    stage.write_json(MANIFEST, _manifest(stage, result, facts))
    return result


def _write_pages(stage: Stage, result: Result, report: Report) -> None:
    from qexport.exporter.report.card import model_card
    from qexport.exporter.report.html.page import render

    stage.write_text(PAGE, render(result, report))
    stage.write_text(CARD, model_card(result, report))


def _manifest(stage: Stage, result: Result, facts: Facts) -> dict[str, Any]:
    """Receipt: what went in, by which tools, what came out."""
    return {
        "schema": MANIFEST_SCHEMA,
        "version": result.version,
        "target": result.target,
        "source": result.source.model_dump(),
        "calibration": facts.calibration,
        "recipe": result.recipe,
        "replay": facts.replay,
        "decisions": [d.model_dump() for step in facts.steps for d in step.decisions],
        "engine": None if result.engine is None else result.engine.model_dump(mode="json"),
        "tools": tool_versions(),
        "files": {name: info.model_dump() for name, info in files_of(stage).items()},
    }


def _idle(facts: Facts) -> list[str]:
    """What the recipe asked for and did not get."""
    asked = [step for step in facts.steps if not PASSES[step.name].exact]
    made = [step.name for step in asked if step.modified]
    refusals = [f"{d.op} {d.node}: {d.reason}" if d.node else d.reason for step in asked for d in step.decisions]
    if any(PASSES[step.name].quantizes for step in asked) and facts.quantized == 0:
        return [f"nothing was quantized ({'; '.join(refusals[:3]) or 'there is nothing to quantize'})"]
    if asked and not made:
        return [f"the recipe made nothing smaller ({'; '.join(refusals[:3])})"]
    return []


def _tables() -> tuple[str, ...]:
    return () if can_write_tables() else (NO_TABLES,)


def _late_warnings(quality: Quality | None, latency: Latency | None) -> list[str]:
    found = []
    if latency is not None and latency.note and not latency.foreign:
        found.append(f"{latency.runtime}: {latency.speedup:.2f}x the speed of float; {latency.note}")
    if quality is not None and quality.least < 0.9:
        name = quality.worst_output
        sample = quality.outputs[name].worst_sample
        found.append(f"sample {sample} has a cosine of {quality.least:.3f} to the float model at output {name!r}")
    return found
