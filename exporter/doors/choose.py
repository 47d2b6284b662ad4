"""Which door a source comes in by: the table of doors, and the rules. A new door is a function and a row."""

from __future__ import annotations

import os
from pathlib import Path

from qexport.errors import UsageError
from qexport.exporter.doors.origin import Origin
from qexport.exporter.doors.torch_modules.callables import is_callable_name
from qexport.exporter.families.folder import CONFIG, INDEX, WEIGHTS
from qexport.exporter.families.form import FLOATS
from qexport.exporter.load import ONNX_FILE
from qexport.exporter.lookup import look_up
from qexport.exporter.options import LAYOUTS, ExportOptions

DOORS = {
    "qexport": "qexport.exporter.doors.own_folder:open_own_folder",
    "onnx": "qexport.exporter.doors.onnx_model:open_onnx",
    "module": "qexport.exporter.doors.torch_source:open_module",
    "torch": "qexport.exporter.doors.torch_source:open_folder_in_torch",
    "optimum": "qexport.exporter.doors.optimum_folder:open_folder_in_optimum",
}
"""Door to the function ``(source, options, folder for scratch) -> Origin`` behind it."""

VIAS = ("auto", "qexport", "torch", "optimum")
"""What a person may say of a folder."""


def open_origin(door: str, source: str | Path, asked: ExportOptions, scratch: Path) -> Origin:
    """Go through a door; ``scratch`` is an empty folder that is there for as long as the export."""
    origin: Origin = look_up(DOORS[door])(str(source), asked, scratch)
    return origin


def choose_door(source: str | Path, asked: ExportOptions) -> str:
    """The door that a source comes in by.

    Raises:
        UsageError: There is nothing, an option has a value that does not exist, or options contradict each other.
    """
    for option, value, known in (
        ("--dtype", asked.dtype, FLOATS),
        ("--via", asked.via, VIAS),
        ("--layout", asked.layout, LAYOUTS),
    ):
        if value is not None and value not in known:
            raise UsageError(f"unknown {option} {value!r}", hint=f"known: {', '.join(known)}")
    if asked.python is not None and asked.via != "optimum":
        raise UsageError("--python is for --via optimum", hint="leave it out")
    if not os.path.exists(source):
        return _module(str(source), asked)
    place = Path(source)
    if asked.inputs:
        raise UsageError("--input describes torch modules", where=str(source), hint="leave it out: the model tells")
    checkpoint = any((place / name).exists() for name in (WEIGHTS, INDEX))
    if not place.is_dir() or ((place / ONNX_FILE).exists() and not checkpoint):
        if asked.via not in ("auto", "qexport"):
            raise UsageError(f"--via {asked.via} is for folders with {CONFIG}", where=str(source))
        return "onnx"
    return "qexport" if asked.via == "auto" else asked.via


def _module(source: str, asked: ExportOptions) -> str:
    """The door of what is no path."""
    if not is_callable_name(source):
        hint = "give a Hugging Face folder, an .onnx file, or module:callable"
        raise UsageError("no such file or folder", where=source, hint=hint)
    if asked.via not in ("auto", "torch"):
        raise UsageError(f"--via {asked.via} is for folders with {CONFIG}", where=source, hint="torch writes modules")
    return "module"
