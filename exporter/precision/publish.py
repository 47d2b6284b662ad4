"""Folders and files of what is found out about precision; they appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from qexport.errors import UsageError
from qexport.exporter import toml
from qexport.exporter.precision.lab import Question, open_lab
from qexport.exporter.precision.plan import Plan, make_plan, recipe_document
from qexport.exporter.precision.plots import draw
from qexport.exporter.precision.sensitivity import Sensitivity, analyse
from qexport.runtime.figures import demand_matplotlib
from qexport.safe_io import finite, publish, write_text

NUMBERS = "sensitivity.json"


def publish_sensitivity(question: Question, output: Path) -> Sensitivity:
    """Analyse, and put the numbers and the plots into a folder.

    Raises:
        EnvironmentMismatch: There is no matplotlib; told before the work.
        UsageError: The folder holds something else.
    """
    demand_matplotlib()
    inputs = [path for path in (question.model, question.calib, question.evaluation) if path is not None]
    with publish(output, inputs=inputs) as stage:
        found = analyse(question)
        stage.write_json(NUMBERS, finite(found.model_dump(mode="json", by_alias=True)))
        for name, picture in draw(found).items():
            stage.write_bytes(name, picture)
        stage.write_manifest()
    return found


def publish_plan(question: Question, output: Path) -> Plan:
    """Make a plan and write it as a recipe.

    Raises:
        UsageError: The file could not be loaded as a recipe, or is the one that it would extend; there are overrides
            that are no gates, which a recipe that extends another would not hold.
        GateFailed: Nothing fits the budget; nothing is written.
    """
    _refuse_overrides(question)
    extends = _reference(question.recipe, output)
    if output.suffix != ".toml":
        raise UsageError("the name of a recipe file must end in .toml", where=str(output))
    if not output.absolute().parent.is_dir():
        raise UsageError("no such folder", where=str(output.absolute().parent), hint="make it first")
    lab = open_lab(question)
    plan = make_plan(question, lab)
    point = plan.points[plan.chosen]
    assert point.cosine_mean is not None  # it fits
    loss = "" if point.drop is None else f"drop {point.drop:.3f}, "
    head = (
        f"# Made by qexport plan: {point.quantized} layers quantized, {point.kept} in float, {point.bytes} bytes.\n"
        f"# Measured on {plan.data!r}: {loss}cosine mean {point.cosine_mean:.5f}, worst {point.cosine_worst:.5f}.\n"
    )
    document = recipe_document(lab, plan, extends)
    write_text(output, "\n".join([head, *toml.dump(document)]) + "\n")
    return plan


def _refuse_overrides(question: Question) -> None:
    """The recipe holds its gates by itself; it would be measured with other overrides, and written without them."""
    lost = [setting for setting in question.options.set if not setting.strip().startswith("gates.")]
    if lost:
        raise UsageError(
            f"a plan cannot keep the override {lost[0]!r}",
            where=f"--set {lost[0]}",
            hint="write a recipe file that extends this one and has the setting, and plan with that",
        )


def _reference(recipe: str | Path, output: Path) -> str:
    """What a recipe in ``output`` calls the one it extends: a shipped name, or a path from its folder."""
    name = os.fspath(recipe)
    if not isinstance(recipe, Path) and not name.endswith(".toml") and "/" not in name:
        return name
    if os.path.realpath(name) == os.path.realpath(output):
        raise UsageError("the plan would replace the recipe it extends", where=str(output), hint="choose another name")
    relative = os.path.relpath(os.path.realpath(name), os.path.realpath(output.absolute().parent))
    return relative if "/" in relative else f"./{relative}"
