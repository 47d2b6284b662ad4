"""Engines are kept with what is known of them: building one takes minutes, and an equal build wants the same."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import TypeAdapter, ValidationError

from qexport.exporter.engines.engine import EngineOptions
from qexport.exporter.engines.timing import MEASURING
from qexport.exporter.outcome.artefact import MODEL
from qexport.exporter.outcome.receipt import tool_versions
from qexport.exporter.outcome.result import EngineInfo
from qexport.exporter.resume import journal as journals
from qexport.exporter.resume.journal import Journal, digest_json, gpus
from qexport.runtime.backends.artefact import PLAN
from qexport.safe_io import Entry, Stage, read_bytes, write_bytes

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
        return [files, name, _OPTIONS.dump_python(replace(options, progress=None, timings=None), mode="json"), gpus()]

    place = journal.place(ENGINE, about)
    known = None if place is None else _recall(place)
    if known is not None:
        journal.note(ENGINE)
        stage.write_bytes(PLAN, known[1])
        return known[0]
    start = time.perf_counter()
    with _timings(journal, name) as timings:
        info = build(stage.path / MODEL, name, replace(options, timings=timings.path), stage.path / PLAN)
        timings.keep(info)
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


@dataclass(frozen=True, slots=True)
class _Timings:
    """What a builder knew of its kernels, in a file for the time of a build; see ``timing``."""

    place: Entry | None = None
    path: Path | None = None
    known: bytes | None = None

    def keep(self, info: EngineInfo) -> None:
        """Store what the builder knows now; what it did not take is set aside."""
        if self.place is None or self.path is None:
            return
        if info.timings == "refused":
            self.place.set_aside()
            self.place.reject("the builder does not take it")
        found = read_bytes(self.path) if self.path.exists() else b""
        if found and found != self.known:
            self.place.write(found)


@contextmanager
def _timings(journal: Journal, name: str) -> Iterator[_Timings]:
    """The timings of builders of this release on this GPU; none where nothing is kept."""
    if journal.cache.folder is None or name not in MEASURING:
        yield _Timings()
        return
    release = next((version for tool, version in tool_versions().items() if tool == name), "")
    place = journal.cache.entry("timing", digest_json([name, release, gpus()]))
    known = place.read()
    if known is None:
        place.set_aside()
    with TemporaryDirectory(prefix="qexport-") as folder:
        path = Path(folder) / "timings"
        if known is not None:
            write_bytes(path, known)
        yield _Timings(place, path, known)
