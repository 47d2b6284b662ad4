"""Replay a receipt: the files are those that were written, and the same inputs give the same bytes again.

Bytes follow from model, calibration data and recipe. What is taken back to float may follow from measured times, so
the manifest names it, and a replay leaves those nodes in float from the start; it judges and times nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import qexport
from qexport.calibration.reading.given import Data, name_of
from qexport.errors import DataInvalid, IntegrityError, ModelInvalid, UsageError
from qexport.exporter.admit import Limits
from qexport.exporter.load import ONNX_FILE, Source, load_source
from qexport.exporter.onnx_file import save_onnx
from qexport.exporter.options import BuildOptions, Progress, Silent
from qexport.exporter.outcome.intact import FileCheck, check_folder, judge_files
from qexport.exporter.outcome.receipt import MANIFEST, Given, ReplayInfo, processor, tool_versions
from qexport.exporter.product import run_recipe
from qexport.exporter.recipe import Recipe
from qexport.exporter.samples import Samples, open_samples
from qexport.runtime.backends.artefact import Artefact, open_artefact
from qexport.safe_io import publish

_DIFFERENT = "not what the build was given"
_AGAIN = "build it again: manifests of earlier versions do not say how; --files checks the digests alone"


@dataclass(frozen=True)
class Inputs:
    """Where inputs are now, if not where they were."""

    model: str | Path | None = None
    calib: Data | None = None
    eval: Data | None = None


class Replayed(BaseModel):
    """What a verification found.

    Attributes:
        folder: The artefact.
        files: Every file of it.
        replayed: Whether it was built again.
        same: Whether nothing speaks against it.
        notes: What is different around it, and what was left out.
        seconds: What it took.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_version: Literal["qexport.verify/1"] = Field("qexport.verify/1", alias="schema")
    folder: str
    files: tuple[FileCheck, ...]
    replayed: bool
    same: bool
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        from qexport.exporter.report.notebook import titled

        how = "built again" if self.replayed else "files alone"
        title = f"{self.folder}, {how}: {'nothing speaks against it' if self.same else 'not the same'}"
        rows = ((file.name, file.verdict, file.digest, file.found) for file in self.files)
        return titled(title, self.notes, ("file", "", "manifest", "found"), rows)


def verify(
    folder: str | Path,
    *,
    model: str | Path | None = None,
    calib: Data | None = None,
    eval: Data | None = None,
    files: bool = False,
    progress: Progress | None = None,
) -> Replayed:
    """Check an artefact folder against its manifest, then build it again and compare the bytes.

    Args:
        folder: What ``build`` wrote; it is only read.
        model: Where the source is now; where the manifest says, when not given.
        calib: Where the calibration data is now, likewise; a function that gave samples is given again.
        eval: Where the evaluation data is now, likewise; it is not needed, as it does not shape the bytes.
        files: Check the files alone.
        progress: Who hears about stages.

    Returns:
        Every file with its verdict. Bytes that differ are no exception: see ``same``.

    Raises:
        IntegrityError: A file is not the one that was written, or an input is not what the build was given.
        UsageError: There is no such folder, the manifest does not say how to build again, or an input is not there.
        UnsafeInput: There is no manifest, or a file of the folder is a link.
    """
    started, stages = time.perf_counter(), progress or Silent()
    if not Path(folder).is_dir():
        raise UsageError("no such folder", where=str(folder), hint="name a folder that qexport build wrote")
    artefact = open_artefact(Path(folder))
    with stages.stage("files"):
        intact, notes = check_folder(artefact)
    if files:
        seconds = time.perf_counter() - started
        return Replayed(
            schema="qexport.verify/1",
            folder=str(folder),
            files=intact,
            replayed=False,
            same=True,
            notes=notes,
            seconds=seconds,
        )
    info, recipe = read_replay(artefact)
    again = replay_recipe(recipe, info.keep)
    with stages.stage("inputs"):
        inputs, left_out = _find_inputs(info, Inputs(model, calib, eval))
        source, samples = _open_inputs(info, inputs, again)
    built = _build_again(source, samples, again, stages)
    judged = tuple(judge_files(intact, built))
    return Replayed(
        schema="qexport.verify/1",
        folder=str(folder),
        files=judged,
        replayed=True,
        same=all(file.verdict in ("intact", "same") for file in judged),
        notes=(*notes, *left_out, *_surroundings(artefact, info)),
        seconds=time.perf_counter() - started,
    )


def read_replay(artefact: Artefact) -> tuple[ReplayInfo, Recipe]:
    """What the manifest says of how it was built; ``UsageError`` where it does not, or in another version's words."""
    where = str(artefact.folder / MANIFEST)
    section, recipe = (artefact.manifest.get(name) for name in ("replay", "recipe"))
    if "door" in artefact.manifest:
        hint = "export the source again and compare both: qexport diff A B; --files checks the digests alone"
        raise UsageError("exports cannot be replayed, only what qexport build wrote", where=where, hint=hint)
    if section is None or recipe is None:
        raise UsageError("the manifest does not say how to build it again", where=where, hint=_AGAIN)
    try:
        info = ReplayInfo.model_validate(section)
        return info, Recipe.model_validate_json(json.dumps(recipe), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        written = artefact.manifest.get("version")
        what = f"{place}: {first['msg']}; it was written by qexport {written}, this is {qexport.__version__}"
        raise UsageError(what, where=where, hint=_AGAIN) from error


def replay_recipe(recipe: Recipe, keep: Mapping[int, tuple[str, ...]]) -> Recipe:
    """The recipe that leaves from the start in float what was taken back, and chooses and demands nothing by itself.

    Raises:
        UsageError: ``keep`` names a step that is not there.
    """
    document: dict[str, Any] = recipe.as_dict()
    enabled = [step for step in document["step"] if step.get("enabled", True)]
    for number, names in keep.items():
        if not 1 <= number <= len(enabled):
            raise UsageError(f"the recipe has no step {number}", where="replay.keep", hint=_AGAIN)
        step = enabled[number - 1]
        step["keep"] = [*step.get("keep", ()), *names]
    document["export"] |= {"never_worse": False, "engine": False}
    document["gates"] = {}
    return Recipe.model_validate_json(json.dumps(document), strict=True)


def _find_inputs(info: ReplayInfo, now: Inputs) -> tuple[Inputs, tuple[str, ...]]:
    """Where the inputs are; evaluation data that is gone is left out, and that is told."""
    notes: tuple[str, ...] = ()
    evaluation = _place("eval", info.eval, now.eval)
    if now.eval is None and evaluation is not None and not _is_there(evaluation):
        told = f"the evaluation data is not there ({_name(evaluation)}); the bytes do not depend on it"
        evaluation, notes = None, (told,)
    calib = _place("calib", info.calib, now.calib)
    model = info.model.path if now.model is None else now.model
    for option, path in (("model", model), ("calib", calib), ("eval", evaluation)):
        if path is not None and not _is_there(path):
            what = f"what the build was given as {option} is not there"
            raise UsageError(what, where=_name(path), hint=f"say where it is with --{option} PATH")
    return Inputs(model, calib, evaluation), notes


def _place(option: str, given: Given | None, now: Data | None) -> Data | None:
    if given is None and now is not None:
        raise UsageError(
            f"the build was not given any --{option}", where=f"--{option} {_name(now)}", hint="leave it out"
        )
    return now if now is not None or given is None else given.path


def _is_there(data: Data) -> bool:
    return callable(data) or os.path.exists(data)


def _name(data: Data) -> str:
    if callable(data):
        return name_of(data)
    return str(data) or "a function of Python"


def _open_inputs(info: ReplayInfo, inputs: Inputs, recipe: Recipe) -> tuple[Source, Samples]:
    """Open them and compare digests of what they hold now; what cannot be read any more has changed."""
    reading = str(inputs.model)
    try:
        limits = Limits(allow_nonfinite=info.allow_nonfinite)
        source = load_source(inputs.model or "", limits, cached=recipe.export.cached)
        _demand(source.info.digest, info.model, reading)
        reading = _name(inputs.calib or inputs.eval or "")
        samples = open_samples(source, recipe, inputs.calib, inputs.eval)
    except (ModelInvalid, DataInvalid) as error:
        raise IntegrityError(f"{_DIFFERENT}: {error.what}", where=error.where or reading) from error
    if samples.calibration is not None:
        _demand(samples.calibration.digest, info.calib, reading)
    if samples.judge is not None and inputs.eval is not None:
        _demand(samples.judge.data.digest, info.eval, _name(inputs.eval))
    return source, samples


def _build_again(source: Source, samples: Samples, recipe: Recipe, stages: Progress) -> dict[str, str]:
    """Run the recipe and write what follows from the inputs, in a folder for that alone; returns digests by name."""
    product = run_recipe(source, recipe, samples, BuildOptions(progress=stages))
    with TemporaryDirectory(prefix="qexport-verify-") as scratch, publish(Path(scratch) / "again") as stage:
        with stages.stage("write"):
            save_onnx(product.model, stage, ONNX_FILE)
            for companion in source.companions:
                stage.copy(companion, companion.name)
        return {name: digest for name, (_, digest) in stage.files.items()}


def _demand(digest: str, given: Given | None, where: str) -> None:
    if given is not None and digest != given.digest:
        hint = "give what the build was given; other inputs make another artefact, which qexport diff compares"
        raise IntegrityError(_DIFFERENT, where=where, hint=hint)


def _surroundings(artefact: Artefact, info: ReplayInfo) -> Iterator[str]:
    """What is different here from where it was built, and may shape the bytes."""
    told, here = artefact.manifest.get("tools"), tool_versions()
    before = told if isinstance(told, dict) else {}
    for name in sorted({*before, *here}):
        if before.get(name) != here.get(name):
            yield f"{name} was {before.get(name) or 'not there'}, is {here.get(name) or 'not there'}"
    if artefact.manifest.get("version") != qexport.__version__:
        yield f"qexport was {artefact.manifest.get('version')}, is {qexport.__version__}"
    if info.processor and info.processor != processor():
        yield f"the processor was {info.processor}, is {processor()}"
