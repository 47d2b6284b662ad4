"""``qexport plan`` without a budget: a dry run that says what a build would do and take, and changes nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field

from qexport.exporter.engines.shapes import engine_shapes
from qexport.exporter.forecast.pace import WORK, Amounts, Pace, measure_pace, stages
from qexport.exporter.forecast.sizes import REPORT_BYTES, build_memory, cache_bytes, engine_bytes, file_bytes
from qexport.exporter.forecast.standins import Rehearsal, rehearse
from qexport.exporter.load import Source
from qexport.exporter.opening import builds_engine, choose_recipe, open_model
from qexport.exporter.outcome.result import DecisionInfo
from qexport.exporter.precision.lab import Question
from qexport.exporter.proof.gates import check_judge
from qexport.exporter.recipe import Recipe, needs
from qexport.exporter.resume.journal import WORTH, build_key
from qexport.exporter.samples import Samples, calibration_passes, open_samples
from qexport.exporter.steps import PASSES
from qexport.exporter.threads import OneThread
from qexport.passes.base import Decision
from qexport.passes.numbers.range import RANGE_KEY
from qexport.passes.pipeline import Step, run
from qexport.passes.placement import plan
from qexport.passes.target import Target, find_target

QUANTIZED, SKIPPED = "quantized", "skipped"


class Forecast(BaseModel):
    """What a build would do.

    Attributes:
        schema_version: Version of this schema.
        model: The model that was asked about.
        recipe: Name of the recipe.
        target: Where the result would run.
        nodes: Of the result.
        quantized: How many nodes would be quantized, before any goes back to float for what is measured.
        forms: What of them would be stored in few bits, to number of nodes.
        skipped: Reason to number of nodes that would not.
        bytes_before: Size of the model as it came.
        bytes: Size of the result as a file.
        engine_bytes: About the size of the engine, where there would be one.
        seconds: Stage to seconds, about, on this machine.
        disk: Bytes that the artefact and what is kept for the next build would take.
        memory: Bytes of memory at most, about.
        decisions: Each of these nodes, with what would be done and why.
        cached: Stages that an equal build has left in the cache, and that would be recalled.
        warnings: What is doubtful.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_version: Literal["qexport.forecast/1"] = Field("qexport.forecast/1", alias="schema")
    model: str
    recipe: str
    target: str
    nodes: int
    quantized: int
    forms: dict[str, int]
    skipped: dict[str, int]
    bytes_before: int
    bytes: int
    engine_bytes: int | None
    seconds: dict[str, float]
    disk: int
    memory: int
    decisions: tuple[DecisionInfo, ...]
    cached: tuple[str, ...] = ()
    warnings: tuple[str, ...]

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        from qexport.exporter.forecast.words import rows
        from qexport.exporter.report.notebook import table_html

        return table_html(("a build would", ""), rows(self))


@dataclass(frozen=True, slots=True)
class _Rehearsed:
    """The result of a recipe run without data."""

    rehearsal: Rehearsal
    model: ir.Model
    steps: Sequence[Step]

    @property
    def decisions(self) -> Iterator[Decision]:
        """Those that a build counts: of the passes that quantize."""
        return (decision for step in self.steps if PASSES[step.name].quantizes for decision in step.decisions)


def forecast(question: Question) -> Forecast:
    """Run the recipe on a copy of the model with everything left out that takes data or writes.

    Raises:
        QexportError: What a build would refuse, by the same exit code.
    """
    asked = question.options
    recipe = choose_recipe(question.recipe, asked)
    start = time.perf_counter()
    with asked.progress.stage("load"):
        source = open_model(question.model, recipe, asked)
        samples = _samples(source, recipe, question)
        if builds_engine(recipe) and (recipe.export.profiles is not None or samples.calibration is not None):
            engine_shapes(source.model, recipe, samples)  # what it refuses, a build does
    loading = time.perf_counter() - start
    with asked.progress.stage("recipe"), OneThread() as threads:
        rehearsal = rehearse(recipe)
        found = _Rehearsed(rehearsal, *run(source.model, rehearsal.steps, [threads]))
    with asked.progress.stage("pace"):
        pace = measure_pace(source.model, samples.proof, loading)
    return _told(question, recipe, source, samples, found, pace)


def _samples(source: Source, recipe: Recipe, question: Question) -> Samples:
    """The data, as a build opens it; without any, inputs that are made up for taking the time alone."""
    calib, evaluation = question.calib, question.evaluation
    if calib is None:
        return open_samples(source, recipe.model_copy(update={"step": ()}), None, evaluation)
    samples = open_samples(source, recipe, calib, evaluation)
    check_judge(samples, recipe.gates)
    return samples


def _told(
    question: Question, recipe: Recipe, source: Source, samples: Samples, found: _Rehearsed, pace: Pace
) -> Forecast:
    target = find_target(recipe.export.target)
    engine = builds_engine(recipe)
    amounts = _amounts(recipe, source, samples, found)
    built = engine_bytes(amounts.bytes, amounts.nodes) if engine else None
    seconds = stages(pace, amounts, target, engine=engine)
    weights = sum(tensor.nbytes for tensor in _tensors(source.model))
    quantized = sum(decision.action == QUANTIZED for decision in found.decisions)
    # the model before numbers change, the one before quantizers, and the result
    models = (1 + (quantized > 0)) * weights + amounts.bytes if seconds["recipe"] >= WORTH else 0
    kept = cache_bytes(_measured(found.model), models)
    return Forecast(
        schema="qexport.forecast/1",
        model=str(question.model),
        recipe=recipe.name,
        target=target.name,
        nodes=amounts.nodes,
        quantized=quantized,
        forms=_reasons(found, QUANTIZED),
        skipped=_reasons(found, SKIPPED),
        bytes_before=source.info.bytes,
        bytes=amounts.bytes,
        engine_bytes=built,
        seconds=seconds,
        disk=amounts.bytes + (built or 0) + REPORT_BYTES + (kept if question.options.cache else 0),
        memory=build_memory(weights),
        decisions=tuple(DecisionInfo(**asdict(decision)) for decision in found.decisions),
        cached=_cached(question, recipe, source, samples),
        warnings=(*source.notes, *_warnings(question, recipe, samples, found)),
    )


def _reasons(found: _Rehearsed, action: str) -> dict[str, int]:
    return dict(Counter(decision.reason for decision in found.decisions if decision.action == action).most_common())


def _amounts(recipe: Recipe, source: Source, samples: Samples, found: _Rehearsed) -> Amounts:
    target = find_target(recipe.export.target)
    asked = max(calibration_passes(recipe), default=0)
    there = asked if samples.calibration is None else len(samples.calibration)
    judged = 0 if samples.judge is None else len(samples.judge.data)
    if samples.judge is None and found.rehearsal.measuring:
        judged = asked  # what calibration would leave over, or its own samples
    exact = [step.exact for _, step in found.rehearsal.steps]
    sites = [site for site in plan(source.model, target).roots if site.weight is not None]
    return Amounts(
        steps=tuple(_working(recipe, target)),
        own=sum(step.seconds for step in found.steps),
        proofs=sum(step.modified and proven for step, proven in zip(found.steps, exact, strict=True)),
        calibration=min(asked, there),
        judged=judged,
        layers=len(sites),
        nodes=sum(1 for _ in found.model.graph.all_nodes()),
        bytes=file_bytes(found.model),
    )


def _working(recipe: Recipe, target: Target) -> Iterator[str]:
    """The steps that take time beside their rewriting: those that look at samples, and ``smooth``, which searches."""
    for step in recipe.step:
        idle = step.pass_ == "extremes" and target.rest == "float32"
        if step.enabled and step.pass_ in WORK and not idle:
            yield step.pass_


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)


def _measured(model: ir.Model) -> int:
    """How many values calibration would have kept something of."""
    values = (*model.graph.inputs, *(value for node in model.graph for value in node.outputs))
    return sum(RANGE_KEY in value.meta for value in values)


def _cached(question: Question, recipe: Recipe, source: Source, samples: Samples) -> tuple[str, ...]:
    """What an equal build has left; without data there is none to be equal to."""
    asked = question.options
    if asked.cache is None or (question.calib is None and needs(recipe, "data")):
        return ()
    key = build_key(source, recipe, samples, allow_nonfinite=asked.allow_nonfinite)
    mine = (entry.key for entry in asked.open_cache().entries() if entry.kind == "builds")
    names = (name.partition("/")[2].rpartition("-")[0] for name in mine if name.startswith(f"{key}/"))
    return tuple(sorted({name for name in names if name}))


def _warnings(question: Question, recipe: Recipe, samples: Samples, found: _Rehearsed) -> Iterator[str]:
    rehearsal = found.rehearsal
    if question.calib is None and rehearsal.measuring:
        yield "no calibration data: times are those of made-up inputs; give --calib"
    if question.calib is not None:
        yield from samples.warnings
    if rehearsal.cuts:
        names = ", ".join(rehearsal.cuts)
        yield f"what {names} would cut out follows from data: sizes are those of the whole model"
    if "triage" in rehearsal.measuring:
        yield "triage leaves at most a layer or two in float, by what it measures"
    if recipe.export.never_worse and not find_target(recipe.export.target).engine:
        yield "a build that is slower than float takes regions back, which takes longer"
