"""What a build finds out is kept as it goes: run again after a kill it goes on, of two equal ones one does the work.

The key of a build is a digest of all that its result depends on: the tools, the model, the recipe, the data. Under it
lie entries of a cache, one for everything that took long. Whoever builds holds the folder of its key meanwhile, so that
an equal build waits for it and takes what it left. Times depend on the machine and on the hour: they count for a while.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from pydantic import TypeAdapter, ValidationError

import qexport
from qexport.calibration.statistics.store import key_of
from qexport.errors import EnvironmentMismatch
from qexport.exporter.load import Source
from qexport.exporter.options import BuildOptions
from qexport.exporter.outcome.receipt import processor, tool_versions
from qexport.exporter.recipe import Recipe
from qexport.exporter.samples import Samples
from qexport.runtime.backends.gpus import find_gpus
from qexport.safe_io import Cache, Entry, digest_file

SCHEMA = "build/1"  # part of every key: a change of what is kept must change it
WORTH = 5.0
"""Seconds from which it is worth keeping what they were spent on."""
FRESH = 900.0
"""Seconds for which measured times are believed."""
WAIT = "wait for an equal build"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Journal:
    """What is known of one build.

    Attributes:
        cache: Where it is kept; without a folder nothing is.
        key: That of the build.
        resumed: What was recalled so far, by the names of stages.
    """

    cache: Cache
    key: str = ""
    resumed: list[str] = field(default_factory=list)

    def once(
        self,
        stage: str,
        kind: Any,
        find: Callable[[], T],
        about: Callable[[], object],
        *,
        fresh: float | None = None,
        decides: bool = False,
    ) -> T:
        """What ``find`` returns, or has returned to an equal build.

        Args:
            stage: The name under which it is kept.
            kind: Type of the result, for pydantic.
            find: The work; ``None`` is not kept.
            about: What the result depends on beside the key, as something that JSON takes.
            fresh: Seconds for which an earlier result counts; for good when not given.
            decides: Whether the bytes of the build depend on it, and it would be another one if it were found again: it
                is kept then however fast it was found.

        Raises:
            QexportError: What ``find`` raises, or the cache is not to be trusted.
        """
        place = self.place(stage, about)
        known = None if place is None else _recall(place, TypeAdapter(kind), fresh)
        if known is not None:
            self.note(stage)
            return known  # type: ignore[no-any-return]  # the adapter has looked at it
        start = time.perf_counter()
        found = find()
        worth = decides or time.perf_counter() - start >= WORTH
        if place is not None and found is not None and worth:
            told = {"time": time.time(), "found": TypeAdapter(kind).dump_python(found, mode="json")}
            place.write(json.dumps(told).encode())
        return found

    def place(self, stage: str, about: Callable[[], object]) -> Entry | None:
        """Where something is kept, if anything is."""
        if self.cache.folder is None:
            return None
        return self.cache.entry("builds", f"{self.key}/{stage}-{digest_json(about())[:32]}")

    def doubts(self, told: Collection[str]) -> tuple[str, ...]:
        """What went wrong in the cache, without what was told before."""
        return tuple(doubt for doubt in self.cache.doubts if doubt not in told)

    def note(self, stage: str) -> None:
        """Say that something was recalled."""
        if stage not in self.resumed:
            self.resumed.append(stage)


@contextmanager
def open_journal(
    cache: Cache, source: Source, recipe: Recipe, samples: Samples, asked: BuildOptions
) -> Iterator[Journal]:
    """Hold the folder of a build; the wait for an equal one is a stage.

    Raises:
        Busy: An equal one took longer than ``asked.lock_timeout``.
        UnsafeInput: The cache is not ours alone.
    """
    if cache.folder is None:
        yield Journal(cache)
        return
    name = build_key(source, recipe, samples, allow_nonfinite=asked.allow_nonfinite)
    with ExitStack() as held:
        with ExitStack() as waiting:

            def tell() -> None:
                waiting.enter_context(asked.progress.stage(WAIT))

            held.enter_context(cache.hold("builds", name, asked.lock_timeout, tell))
        yield Journal(cache, name)


def build_key(source: Source, recipe: Recipe, samples: Samples, *, allow_nonfinite: bool) -> str:
    """Digest of all that the result of a build depends on."""
    data, judge = samples.calibration, samples.judge
    told = {
        "schema": SCHEMA,
        "version": qexport.__version__,
        "tools": tool_versions(),
        "processor": processor(),
        "source": source.info.digest,
        "companions": {path.name: digest_file(path) for path in source.companions},
        "recipe": recipe.as_dict(),
        "calibration": None if data is None else _in_order(data.digests),
        "judge": None if judge is None else [judge.data.name, judge.held_out, _in_order(judge.data.digests)],
        "task": None if judge is None else _digest_task(judge.task),
        "allow_nonfinite": allow_nonfinite,
    }
    return digest_json(told)


def digest_model(model: ir.Model) -> str:
    """Digest of the graph and all weights."""
    return key_of(model, {}, (), SCHEMA)


def machine() -> list[object]:
    """What times depend on, beside the processor."""
    return [platform.node(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()]


def gpus() -> list[list[object]]:
    """What engines depend on."""
    with suppress(EnvironmentMismatch):
        return [[gpu.name, gpu.capability, gpu.memory] for gpu in find_gpus()]
    return []


def digest_json(value: object) -> str:
    """Digest of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _recall(place: Entry, adapter: TypeAdapter[Any], fresh: float | None) -> Any:
    """What is kept and sound, else ``None``; ``IntegrityError`` for something else in a strict cache."""
    content = place.read()
    if content is None:
        return None
    try:
        told = json.loads(content)
        if fresh is not None and not 0 <= time.time() - told["time"] < fresh:
            return None
        return adapter.validate_python(told["found"])
    except (ValidationError, ValueError, KeyError, TypeError) as error:
        place.reject(f"it says something else: {type(error).__name__}")
        return None


def _in_order(digests: tuple[bytes, ...]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _digest_task(task: object) -> list[object]:
    """The kind of a task, and its labels or scores."""
    fields = dataclasses.fields(task) if dataclasses.is_dataclass(task) else ()
    values = [getattr(task, entry.name) for entry in fields]
    return [type(task).__name__, *(_plain(value) for value in values)]


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    return str(value)
