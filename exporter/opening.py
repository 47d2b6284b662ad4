"""What every road with a recipe begins with: the recipe as it was asked for, and a model that it can be run on."""

from __future__ import annotations

from pathlib import Path

from qexport.calibration.reading.spec import keeps_cache
from qexport.errors import ModelInvalid, UsageError
from qexport.exporter.admit import Limits
from qexport.exporter.engines.shapes import engine_shapes
from qexport.exporter.load import Source, load_source
from qexport.exporter.options import BuildOptions
from qexport.exporter.recipe import Recipe
from qexport.exporter.recipe_files import load_recipe, override
from qexport.exporter.samples import Samples
from qexport.exporter.steps import find_pass, suggest
from qexport.passes.portable import PAST
from qexport.passes.quantize import quantized_nodes
from qexport.passes.target import TARGETS, Target, find_target


def choose_recipe(recipe: str | Path | Recipe, asked: BuildOptions) -> Recipe:
    """Load the recipe and apply what the caller asked for on top.

    Raises:
        UsageError: No such recipe, target or option, or an opset that the target does not read.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    settings = list(asked.set)
    if asked.target is not None:
        if asked.target not in TARGETS:
            raise UsageError(f"unknown target {asked.target!r}", where="target", hint=suggest(asked.target, TARGETS))
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


def open_model(model: str | Path, recipe: Recipe, asked: BuildOptions) -> Source:
    """Load the model, and refuse before any work what the recipe cannot be run on.

    Raises:
        UsageError: A decoder that appends to its caches, or a model that is quantized already and would be again.
        ModelInvalid: The model breaks the rules, or its opset is newer than what the target reads.
    """
    source = load_source(model, Limits(allow_nonfinite=asked.allow_nonfinite), cached=recipe.export.cached)
    _refuse_appended(source)
    _refuse_quantized(source, recipe)
    _refuse_newer(source, find_target(recipe.export.target))
    return source


def builds_engine(recipe: Recipe) -> bool:
    """Whether an engine is part of the result."""
    return recipe.export.engine and find_target(recipe.export.target).engine is not None


def check_profiles(source: Source, recipe: Recipe, samples: Samples) -> None:
    """Raise ``UsageError`` before the work where a profile that the recipe writes does not fit the model."""
    if recipe.export.profiles is not None and builds_engine(recipe):
        engine_shapes(source.model, recipe, samples)


def _refuse_appended(source: Source) -> None:
    """A decoder that appends to its caches can neither be fed with rows nor go back: it is exported first."""
    names = [value.name or "" for value in source.model.graph.inputs]
    past = next((name for name in names if name.startswith(PAST)), None)
    if past is not None and not keeps_cache(source.model):
        raise UsageError(
            f"the decoder appends to its caches ({past!r})",
            where=str(source.path),
            hint=f"bring it into the portable layout first: qexport export {source.path} -o DIR, then build DIR",
        )


def _refuse_quantized(source: Source, recipe: Recipe) -> None:
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


def _refuse_newer(source: Source, target: Target) -> None:
    """A model is never lowered to an older operator set."""
    opset = source.model.opset_imports.get("", source.model.opset_imports.get("ai.onnx", 0))
    if opset > target.opset:
        raise ModelInvalid(
            f"the model has opset {opset}, {target.name} reads up to {target.opset}",
            where=str(source.path),
            hint=f"export it with opset {target.opset} or lower, or choose another target",
        )
