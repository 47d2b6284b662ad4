"""What a caller may ask of an export; light to import."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qexport.exporter.options import Progress, Silent

LAYOUTS = ("cached", "scoring")


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
