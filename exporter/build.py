"""The main road: load, run the recipe, verify, build the engine, publish."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from qexport.calibration.reading.given import Data
from qexport.calibration.reading.spec import keeps_cache
from qexport.errors import ModelInvalid, UsageError
from qexport.exporter.admit import Limits, admit_file
from qexport.exporter.engines.child import build_in_child
from qexport.exporter.engines.engine import EngineOptions
from qexport.exporter.engines.kept import plan_once
from qexport.exporter.engines.shapes import engine_shapes
from qexport.exporter.load import Source, load_source
from qexport.exporter.looking.sparsity import zeros_of
from qexport.exporter.onnx_file import save_onnx
from qexport.exporter.options import Advance, BuildOptions, Progress
from qexport.exporter.outcome.artefact import MODEL, Evidence, summarize, write_artefact
from qexport.exporter.outcome.receipt import kept_by_step, replay_section
from qexport.exporter.outcome.result import EngineInfo, Result
from qexport.exporter.outcome.speed import keep_profile, runs_on_processor
from qexport.exporter.precision.backoff import settle
from qexport.exporter.precision.bench import BuildBench
from qexport.exporter.precision.recalled import RecallingBench
from qexport.exporter.proof.gates import check_judge
from qexport.exporter.recipe import Recipe, load_recipe, override
from qexport.exporter.report.gather import Material, gather
from qexport.exporter.report.values import Report
from qexport.exporter.resume.checkpoint import recipe_once
from qexport.exporter.resume.journal import Journal, open_journal
from qexport.exporter.samples import Samples, open_samples
from qexport.exporter.steps import find_pass
from qexport.passes.portable import PAST
from qexport.passes.quantize import quantized_nodes
from qexport.passes.target import Target, find_target
from qexport.safe_io import Stage, publish


def build(
    model: str | Path,
    *,
    recipe: str | Path | Recipe = "int8",
    calib: Data | None = None,
    eval: Data | None = None,
    target: str | None = None,
    options: BuildOptions | None = None,
) -> Result:
    """Build an artefact folder from a model.

    Args:
        model: An .onnx file or a Hugging Face folder; it is never changed.
        recipe: Name of a shipped recipe, path of a TOML file, or a loaded one.
        calib: Calibration data; recipes that quantize need it. A path, or a function that returns samples (dictionaries
            of arrays without a batch axis), the same ones at every call.
        eval: Held-out data to judge by; with labels it gives a task metric.
        target: Backend the result is for; the recipe's when not given.
        options: Overrides, gates, output folder, progress.

    Returns:
        Everything that was found out; the same object is ``result.json`` in the folder.

    Raises:
        QexportError: One subclass per exit code; nothing is published and an earlier artefact stays as it was.
    """
    started = time.perf_counter()
    asked = options or BuildOptions()
    chosen = choose_recipe(recipe, asked if target is None else replace(asked, target=target))
    row = find_target(chosen.export.target)
    output = asked.output or Path(f"{Path(model).resolve().stem}-{chosen.name}")
    stages = asked.progress
    with (
        publish(output, inputs=[path for path in (model, calib, eval) if isinstance(path, str | Path)]) as stage,
        ExitStack() as held,
    ):
        with stages.stage("load"):
            limits = Limits(allow_nonfinite=asked.allow_nonfinite)
            source = load_source(model, limits, cached=chosen.export.cached)
            refuse_appended(source)
            refuse_quantized(source, chosen)
            refuse_newer(source, row)
            samples = open_samples(source, chosen, calib, eval)
            check_judge(samples, chosen.gates)
            check_profiles(source, chosen, samples)
        journal = held.enter_context(open_journal(asked.open_cache(), source, chosen, samples, asked))
        product = recipe_once(journal, source, chosen, samples, asked)
        bench = BuildBench(source, product, samples, row, stages)
        careful = chosen.export.never_worse
        found = settle(product, RecallingBench(bench, journal, careful), chosen.gates, never_worse=careful)
        with stages.stage("write"):
            save_onnx(found.product.model, stage, MODEL)
            admit_file(stage.path / MODEL, Limits(allow_nonfinite=asked.allow_nonfinite))
        engine = build_plan(found.product.model, chosen, samples, stage, stages, journal)
        unmeasured = keep_profile(stage, found.product.model) if runs_on_processor(row) else ()
        facts = summarize(chosen, found.product, samples, time.perf_counter() - started)
        again = replay_section(asked, source, samples, (calib, eval), kept_by_step(product, found.kept))
        remarks = (*found.remarks, *unmeasured, *journal.doubts(product.warnings))
        evidence = Evidence(
            found.quality, found.latency, engine, found.backed_off, remarks, found.tried, tuple(journal.resumed)
        )

        def tell(result: Result) -> Report:
            show = chosen.data.report_samples
            with stages.stage("report"):
                return gather(
                    Material(source, row, found.product, result, samples, bench, journal.cache, show_samples=show)
                )

        return write_artefact(stage, output, source, replace(facts, replay=again), evidence, tell)


def choose_recipe(recipe: str | Path | Recipe, asked: BuildOptions) -> Recipe:
    """Load the recipe and apply what the caller asked for on top.

    Raises:
        UsageError: No such recipe or option, or an opset that the target does not read.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    settings = list(asked.set)
    if asked.target is not None:
        settings.append(f"export.target={asked.target}")
    if asked.max_drop is not None:
        settings.append(f"gates.max_drop={asked.max_drop}")
    chosen = override(chosen, settings)
    opset, target = chosen.export.opset, find_target(chosen.export.target)
    if opset is not None and opset > target.opset:
        raise UsageError(
            f"opset {opset} is too new for {target.name}, which reads up to {target.opset}",
            where="export.opset",
            hint=f"set {target.opset} or lower, or leave it out",
        )
    return chosen


def check_profiles(source: Source, recipe: Recipe, samples: Samples) -> None:
    """Raise ``UsageError`` before the work where a profile that the recipe writes does not fit the model."""
    if recipe.export.profiles is not None and recipe.export.engine and find_target(recipe.export.target).engine:
        engine_shapes(source.model, recipe, samples)


def build_plan(
    model: ir.Model, recipe: Recipe, samples: Samples, stage: Stage, stages: Progress, journal: Journal
) -> EngineInfo | None:
    """Build the engine for targets that have one, from the file that was just written, in a child process."""
    target = find_target(recipe.export.target)
    if target.engine is None or not recipe.export.engine:
        return None
    shapes = engine_shapes(model, recipe, samples)
    wanted = recipe.export.compute_capabilities
    with stages.stage("engine", 100) as advance:
        sparse = any(zeros.two_of_four for zeros in zeros_of(model))
        options = EngineOptions(
            shapes.profiles,
            compute_capabilities=wanted,
            sparse=sparse,
            progress=_percent(advance),
            frozen=shapes.frozen,
        )
        return plan_once(journal, stage, target.engine, options, build_in_child)


def _percent(advance: Advance) -> Callable[[str, float], None]:
    """Return a callback that takes a growing fraction and advances by whole hundredths."""
    done = 0

    def hear(_phase: str, fraction: float) -> None:
        nonlocal done
        more = max(int(100 * fraction) - done, 0)
        done += more
        advance(more)

    return hear


def refuse_appended(source: Source) -> None:
    """A decoder that appends to its caches can neither be fed with rows nor go back: it is exported first."""
    names = [value.name or "" for value in source.model.graph.inputs]
    past = next((name for name in names if name.startswith(PAST)), None)
    if past is not None and not keeps_cache(source.model):
        raise UsageError(
            f"the decoder appends to its caches ({past!r})",
            where=str(source.path),
            hint=f"bring it into the portable layout first: qexport export {source.path} -o DIR, then build DIR",
        )


def refuse_quantized(source: Source, recipe: Recipe) -> None:
    """A model that is quantized already is not quantized again."""
    if not any(find_pass(step.pass_, recipe.name).quantizes and step.enabled for step in recipe.step):
        return
    found = quantized_nodes(source.model)
    if found:
        raise UsageError(
            f"the model is quantized already: {len(found)} nodes, such as {found[0].name!r} ({found[0].op_type})",
            where=str(source.path),
            hint="give the float model, or use the recipe float32 to clean this one up",
        )


def refuse_newer(source: Source, target: Target) -> None:
    """A model is never lowered to an older operator set."""
    opset = source.model.opset_imports.get("", source.model.opset_imports.get("ai.onnx", 0))
    if opset > target.opset:
        raise ModelInvalid(
            f"the model has opset {opset}, {target.name} reads up to {target.opset}",
            where=str(source.path),
            hint=f"export it with opset {target.opset} or lower, or choose another target",
        )
