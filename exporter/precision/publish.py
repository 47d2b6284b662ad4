"""Folders and files of what is found out about precision; they appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

from qexport.exporter.precision.lab import Question
from qexport.exporter.precision.plots import demand_matplotlib, draw
from qexport.exporter.precision.sensitivity import Sensitivity, analyse
from qexport.safe_io import finite, publish

MANIFEST, NUMBERS = "manifest.json", "sensitivity.json"
MANIFEST_SCHEMA = "qexport.manifest/1"


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
        files = {name: {"bytes": size, "digest": digest} for name, (size, digest) in sorted(stage.files.items())}
        stage.write_json(MANIFEST, {"schema": MANIFEST_SCHEMA, "files": files})
    return found
