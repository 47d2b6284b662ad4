"""What ``sensitivity`` and ``plan`` ask about a model in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from qexport.cli.common import default_cache

if TYPE_CHECKING:
    from qexport.exporter.precision.lab import Question


class Asked(TypedDict):
    """The options of both commands as click hands them over."""

    recipe: str
    calib: str | None
    evaluation: str | None
    target: str | None
    samples: int
    output: Path | None
    cache_limit: int | None
    as_json: bool


def question_about(model: str, asked: Asked) -> Question:
    """The question as the library takes it, its progress told on the terminal."""
    from qexport.cli.progress import RichProgress
    from qexport.exporter.options import BuildOptions
    from qexport.exporter.precision.lab import Question

    options = BuildOptions(
        target=asked["target"], cache=default_cache(), cache_limit=asked["cache_limit"], progress=RichProgress()
    )
    return Question(model, asked["recipe"], asked["calib"], asked["evaluation"], options, asked["samples"])
