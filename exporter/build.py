"""The main road: load, run the recipe, verify, build the engine, publish."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from qexport.calibration.reading.given import Data
from qexport.exporter.admit import Limits, admit_file
from qexport.exporter.engines.child import build_in_child
from qexport.exporter.engines.engine import EngineOptions
from qexport.exporter.engines.kept import plan_once
from qexport.exporter.engines.shapes import engine_shapes
from qexport.exporter.looking.sparsity import zeros_of
from qexport.exporter.onnx_file import save_onnx
from qexport.exporter.opening import builds_engine, check_profiles, choose_recipe, open_model
from qexport.exporter.options import Advance, BuildOptions, Progress
from qexport.exporter.outcome.artefact import MODEL, Built, write_manifest, write_pages, write_result
from qexport.exporter.outcome.receipt import kept_by_step, replay_section
from qexport.exporter.outcome.result import EngineInfo, Result
from qexport.exporter.outcome.speed import keep_profile, runs_on_processor
from qexport.exporter.precision.backoff import settle
from qexport.exporter.precision.bench import BuildBench
from qexport.exporter.precision.recalled import RecallingBench
from qexport.exporter.proof.gates import check_judge
from qexport.exporter.recipe import Recipe
from qexport.exporter.report.gather import Material, gather
from qexport.exporter.resume.checkpoint import recipe_once
from qexport.exporter.resume.journal import Journal, open_journal
from qexport.exporter.samples import Samples, open_samples
from qexport.passes.target import find_target
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
    row, stages, careful = find_target(chosen.export.target), asked.progress, chosen.export.never_worse
    output = asked.output or Path(f"{Path(model).resolve().stem}-{chosen.name}")
    with publish(output, inputs=[path for path in (model, calib, eval) if isinstance(path, str | Path)]) as stage:
        with stages.stage("load"):
            source = open_model(model, chosen, asked)
            samples = open_samples(source, chosen, calib, eval)
            check_judge(samples, chosen.gates)
            check_profiles(source, chosen, samples)
        with open_journal(asked.open_cache(), source, chosen, samples, asked) as journal:
            product = recipe_once(journal, source, chosen, samples, asked)
            bench = BuildBench(source, product, samples, row, stages)
            trial = settle(product, RecallingBench(bench, journal, careful), chosen.gates, never_worse=careful)
            with stages.stage("write"):
                save_onnx(trial.product.model, stage, MODEL)
                admit_file(stage.path / MODEL, Limits(allow_nonfinite=asked.allow_nonfinite))
            engine = build_plan(trial.product.model, chosen, samples, stage, stages, journal)
            unmeasured = keep_profile(stage, trial.product.model) if runs_on_processor(row) else ()
            seconds = time.perf_counter() - started
            remarks = (*unmeasured, *journal.doubts(product.warnings))
            built = Built(source, chosen, samples, trial, engine, remarks, tuple(journal.resumed), seconds)
            result = write_result(stage, output, built)
            with stages.stage("report"):
                show = chosen.data.report_samples
                report = gather(Material(source, row, trial.product, result, samples, bench, journal.cache, show))
            write_pages(stage, result, report)
            again = replay_section(asked, source, samples, (calib, eval), kept_by_step(product, trial.kept))
            write_manifest(stage, result, built, again)
            return result


def build_plan(
    model: ir.Model, recipe: Recipe, samples: Samples, stage: Stage, stages: Progress, journal: Journal
) -> EngineInfo | None:
    """Build the engine for targets that have one, from the file that was just written, in a child process."""
    name = find_target(recipe.export.target).engine
    if name is None or not builds_engine(recipe):
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
        return plan_once(journal, stage, name, options, build_in_child)


def _percent(advance: Advance) -> Callable[[str, float], None]:
    """Return a callback that takes a growing fraction and advances by whole hundredths."""
    done = 0

    def hear(_phase: str, fraction: float) -> None:
        nonlocal done
        more = max(int(100 * fraction) - done, 0)
        done += more
        advance(more)

    return hear
