"""Engines are kept with what is known of them: building one takes minutes, and an equal build wants the same."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from qexport.exporter import journal as journals
from qexport.exporter.engines.engine import EngineOptions
from qexport.exporter.journal import Journal, gpus
from qexport.exporter.outcome.artefact import MODEL
from qexport.exporter.outcome.result import EngineInfo
from qexport.runtime.backends.artefact import PLAN
from qexport.safe_io import Entry, Stage, read_bytes

ENGINE = "engine"
_OPTIONS = TypeAdapter(EngineOptions)

Build = Callable[[Path, str, EngineOptions, Path], EngineInfo]


def plan_once(journal: Journal, stage: Stage, name: str, options: EngineOptions, build: Build) -> EngineInfo:
    """Build the engine of the model in the stage, or take the one that an equal build has left.

    Args:
        journal: What is known of this build.
        stage: Holds the model; gets the engine.
        name: ``tensorrt`` or ``tensorrt_rtx``.
        options: How to build.
        build: Does it, as ``build_in_child``.

    Raises:
        QexportError: What ``build`` raises, or the cache is not to be trusted.
    """

    def about() -> object:
        files = {file: digest for file, (_, digest) in stage.files.items() if file.startswith(MODEL)}
        return [files, name, _OPTIONS.dump_python(replace(options, progress=None), mode="json"), gpus()]

    place = journal.place(ENGINE, about)
    known = None if place is None else _recall(place)
    if known is not None:
        journal.note(ENGINE)
        stage.write_bytes(PLAN, known[1])
        return known[0]
    start = time.perf_counter()
    info = build(stage.path / MODEL, name, options, stage.path / PLAN)
    stage.adopt(PLAN)
    if place is not None and time.perf_counter() - start >= journals.WORTH:
        head = json.dumps(info.model_dump(mode="json")).encode()
        place.write(head + b"\n" + read_bytes(stage.path / PLAN))
    return info


def _recall(place: Entry) -> tuple[EngineInfo, bytes] | None:
    content = place.read()
    if content is None:
        return None
    head, _, plan = content.partition(b"\n")
    try:
        info = EngineInfo.model_validate_json(head)
    except ValidationError:
        place.reject("it says something else")
        return None
    if info.bytes != len(plan):
        place.reject("the engine has another size than it says")
        return None
    return info, plan
