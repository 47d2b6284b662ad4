"""The road of an export: open the source, write its graphs, hold what was written against the source, publish."""

from __future__ import annotations

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from qexport.errors import QexportError, UsageError
from qexport.exporter.doors.choose import choose_door, open_origin
from qexport.exporter.doors.origin import Origin
from qexport.exporter.load import ONNX_FILE
from qexport.exporter.onnx_file import load_onnx, save_onnx
from qexport.exporter.options import ExportOptions
from qexport.exporter.outcome.export_folder import write_export
from qexport.exporter.outcome.export_result import ExportResult
from qexport.exporter.outcome.speed import keep_profile
from qexport.exporter.proof.source import Material
from qexport.exporter.proof.verify import verify
from qexport.passes.portable import MAX_POSITIONS, parse_positions
from qexport.safe_io import Stage, open_file, publish

INLINE = 32_000_000
"""Bytes of weights from which they go into a file of their own: a file in one piece is in memory three times."""


def export(source: str | Path, *, output: str | Path, options: ExportOptions | None = None) -> ExportResult:
    """Write a source as one portable graph, or a few, proven to compute the same.

    Args:
        source: A Hugging Face folder, an .onnx file, or ``module:callable`` that returns a torch module.
        output: Folder to make, or to replace where an earlier export made it.
        options: Type, head, inputs, data and more.

    Returns:
        Everything that was found out; the same object is ``export.json`` in the folder.

    Raises:
        QexportError: One subclass per exit code; nothing is published and an earlier export stays as it was.
    """
    started = time.perf_counter()
    asked = options or ExportOptions()
    door = choose_door(source, asked)
    _demand_data(asked)
    stages, inputs = asked.progress, _paths(source, asked)
    # scratch lies in the stage, where whatever a process leaves that is killed is found by the next one
    with publish(output, inputs=inputs) as stage, TemporaryDirectory(prefix="scratch-", dir=stage.path) as scratch:
        with stages.stage("open"):
            origin = open_origin(door, source, asked, Path(scratch))
        with stages.stage("write"):
            written = {name: _write(model, stage, name) for name, model in origin.parts.items()}
        with stages.stage("verify"):
            known = _material(origin, asked, written[ONNX_FILE])
            verification, warnings = verify(written, origin, known)
        remarks = keep_profile(stage, written[ONNX_FILE])
        for companion in origin.companions:
            stage.copy(companion, companion.name)
        proven = verification, (*warnings, *remarks)
        return write_export(stage, origin, written, proven, (str(output), time.perf_counter() - started))


def _paths(source: str | Path, asked: ExportOptions) -> list[str | Path]:
    """Every path that is read."""
    return [path for path in (source, asked.data, asked.text) if path is not None]


def _demand_data(asked: ExportOptions) -> None:
    """Raise where what is to be read at the end is not there, or is too much."""
    if asked.data is not None and asked.text is not None:
        raise UsageError("--data and --text exclude each other", hint="give one of them")
    for path in (asked.data, asked.text):
        if path is not None and not os.path.isdir(path):
            open_file(path).close()


def _write(model: ir.Model, stage: Stage, name: str) -> ir.Model:
    """Write a graph and return what the file says now, its weights mapped."""
    save_onnx(model, stage, name, threshold=INLINE)
    try:
        return load_onnx(stage.path / name)
    except QexportError as error:  # nobody ever sees the folder that it was written into
        error.where = (error.where or name).replace(f"{stage.path}{os.sep}", "")
        raise


def _material(origin: Origin, asked: ExportOptions, model: ir.Model) -> Material:
    positions = parse_positions(model.metadata_props.get(MAX_POSITIONS, "")) or origin.positions
    data, text = (None if path is None else Path(path) for path in (asked.data, asked.text))
    return Material(data, text, origin.tokenizer, origin.vocabulary, positions)
