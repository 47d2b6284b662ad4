"""The door for Hugging Face folders by way of optimum: it writes an ONNX file, which comes in by the door for those."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qexport.errors import BuildFailed, UsageError
from qexport.exporter.doors.onnx_model import open_onnx
from qexport.exporter.doors.optimum_process import OptimumOptions, export_optimum
from qexport.exporter.doors.origin import Origin
from qexport.exporter.doors.safe_folder import files_of
from qexport.exporter.families.folder import CONFIG, Folder
from qexport.exporter.load import ONNX_FILE, describe, digests_of, find_companions
from qexport.exporter.options import ExportOptions


def open_folder_in_optimum(source: str, asked: ExportOptions, scratch: Path) -> Origin:
    """Let optimum export the folder into ``scratch``; what it wrote is the truth.

    Raises:
        QexportError: As ``export_optimum`` and ``open_onnx``.
    """
    if asked.dtype not in (None, "float32"):
        hint = f"export first, then qexport build --recipe {asked.dtype}"
        raise UsageError(f"optimum does not export in {asked.dtype}", where=source, hint=hint)
    files = export_optimum(source, scratch, OptimumOptions(task=asked.task, python=asked.python))
    if files[0].name != ONNX_FILE:
        names = ", ".join(file.name for file in files)
        raise BuildFailed(f"optimum wrote no {ONNX_FILE} but {names}", where=source, hint="leave --via out")
    path = Path(source)
    origin = open_onnx(str(files[0]), replace(asked, task=None, dtype=None), scratch)
    kind = Folder(path).json(CONFIG).get("model_type")
    return replace(
        origin,
        door="optimum",
        info=describe(path, digests_of(files_of(path)), origin.parts[ONNX_FILE]),
        told="the graph that optimum wrote, in onnxruntime",
        family=str(kind) if kind else None,
        task=asked.task,
        companions=find_companions(path),
        notes=(*origin.notes, "the truth is what optimum wrote, not the weights of the folder"),
    )
