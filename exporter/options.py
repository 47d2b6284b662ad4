"""What a caller may ask of a build and of an export, and how they tell how far they are; light to import."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qexport.safe_io.caches import LIMIT, Cache

LAYOUTS = ("cached", "scoring")
"""How decoders are written: with caches of keys and values, or reading whole rows."""

Advance = Callable[..., None]
"""Called as ``advance()`` or ``advance(n)`` when one or ``n`` units of a stage are done."""


class Progress(Protocol):
    """Hears which stage runs and how far it is; stages may nest."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Enter a stage of ``total`` units, or of unknown length; yields ``advance``."""


class Silent:
    """The progress of the Python API: says nothing."""

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Enter a stage and keep quiet about it."""
        yield _nothing


def _nothing(n: int = 1) -> None:
    """Advance nothing."""


@dataclass(frozen=True)
class BuildOptions:
    """The small choices of one build.

    Attributes:
        target: Backend that replaces the recipe's.
        set: Overrides such as ``smooth.alpha=0.6``, applied in order.
        max_drop: Gate: how many points of the task metric may be lost; replaces the recipe's.
        output: Folder of the artefact; derived from the model's name when not given.
        cache: Folder where what took long is kept for the next build; nothing is kept when not given.
        cache_limit: Bytes that it may take; 20 GiB when not given.
        strict_cache: Whether what is damaged in the cache ends the build; else it is computed again, with a warning.
        lock_timeout: Seconds to wait for an equal build that is under way.
        allow_nonfinite: Whether weights may hold NaN or infinity.
        progress: Who hears about stages.
    """

    target: str | None = None
    set: tuple[str, ...] = ()
    max_drop: float | None = None
    output: Path | None = None
    cache: Path | None = None
    cache_limit: int | None = None
    strict_cache: bool = False
    lock_timeout: float = 3600.0
    allow_nonfinite: bool = False
    progress: Progress = field(default_factory=Silent)

    def open_cache(self) -> Cache:
        """The cache that was asked for; one of its own for each build, since doubts are those of one build."""
        return Cache(self.cache, self.cache_limit or LIMIT, self.strict_cache)


@dataclass(frozen=True)
class ExportOptions:
    """The choices of one export.

    Attributes:
        dtype: ``float32``, ``float16`` or ``bfloat16``; when not given, float32 for Hugging Face folders, and the type
            that everything else has already.
        task: The head, such as ``embedding`` or ``classification``; the one that the folder was saved with when not
            given.
        via: Who writes the graph: ``qexport``, ``torch``, ``optimum``, or ``auto`` for whoever is at home in the
            source.
        inputs: Inputs of a torch module, each as ``NAME:DTYPE[DIM,...]``.
        data: Real inputs to verify on, in a format that calibration reads.
        text: Real text to verify on.
        layout: ``cached``, decoders with caches of keys and values, or ``scoring``, those that read whole rows.
        python: The interpreter that has optimum; this one when not given.
        allow_pickle: Whether checkpoints that are pickles are read, as numbers alone.
        progress: Who hears about stages.
    """

    dtype: str | None = None
    task: str | None = None
    via: str = "auto"
    inputs: tuple[str, ...] = ()
    data: Path | None = None
    text: Path | None = None
    layout: str = "cached"
    python: Path | None = None
    allow_pickle: bool = False
    progress: Progress = field(default_factory=Silent)
