"""The road of an export: open the source, write its graphs, hold what was written against the source, publish."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import onnx_ir as ir

import qexport
from qexport.calibration.reading.spec import keeps_cache, scores_tokens
from qexport.errors import UsageError
from qexport.exporter.doors.origin import Origin
from qexport.exporter.doors.torch_modules.callables import is_callable_name
from qexport.exporter.families.folder import CONFIG, INDEX, WEIGHTS
from qexport.exporter.families.form import FLOATS
from qexport.exporter.inspect import dtype_name
from qexport.exporter.load import ONNX_FILE, count_parameters
from qexport.exporter.onnx_file import load_onnx, save_onnx
from qexport.exporter.options import LAYOUTS, ExportOptions
from qexport.exporter.outcome.export_result import ExportResult, PartInfo, PortInfo, Verification
from qexport.exporter.outcome.receipt import MANIFEST, MANIFEST_SCHEMA, files_of, tool_versions
from qexport.exporter.proof.source import Material
from qexport.exporter.proof.verify import verify
from qexport.exporter.surroundings import peak_memory
from qexport.passes.portable import MAX_POSITIONS, parse_positions
from qexport.safe_io import Stage, finite, publish

DOORS = {
    "qexport": "qexport.exporter.doors.own_folder:open_own_folder",
    "onnx": "qexport.exporter.doors.onnx_model:open_onnx",
    "module": "qexport.exporter.doors.torch_source:open_module",
    "torch": "qexport.exporter.doors.torch_source:open_folder_in_torch",
    "optimum": "qexport.exporter.doors.optimum_folder:open_folder_in_optimum",
}
"""Door to the function ``(source, options, folder for scratch) -> Origin`` behind it."""

TOOLS = {"torch": ("torch", "transformers"), "optimum": ("optimum-onnx",)}
"""Packages that shape what comes through a door."""

VIAS = ("auto", "qexport", "torch", "optimum")
INLINE = 32_000_000
"""Bytes of weights from which they go into a file of their own: a file in one piece is in memory three times."""

RESULT = "export.json"


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
    stages, inputs = asked.progress, _paths(source, asked)
    with publish(output, inputs=inputs) as stage, TemporaryDirectory(prefix="qexport-") as scratch:
        with stages.stage("open"):
            origin: Origin = _find(door)(str(source), asked, Path(scratch))
        with stages.stage("write"):
            written = {name: _write(model, stage, name) for name, model in origin.parts.items()}
        with stages.stage("verify"):
            known = _material(origin, asked, written[ONNX_FILE])
            verification, warnings = verify(written, origin, known)
        for companion in origin.companions:
            stage.copy(companion, companion.name)
        result = _result(origin, written, verification, stage)
        result = result.model_copy(
            update={
                "directory": str(output),
                "warnings": (*origin.notes, *warnings),
                "seconds": time.perf_counter() - started,
                "peak_rss_bytes": peak_memory(),
            }
        )
        stage.write_json(RESULT, finite(result.model_dump(mode="json", by_alias=True)))
        stage.write_json(MANIFEST, _manifest(stage, result))
    return result


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
    place = Path(source)
    if not place.exists() and is_callable_name(str(source)):
        return "module"
    if not place.exists():
        hint = "give a Hugging Face folder, an .onnx file, or module:callable"
        raise UsageError("no such file or folder", where=str(source), hint=hint)
    if asked.inputs:
        raise UsageError("--input describes torch modules", where=str(source), hint="leave it out: the model tells")
    checkpoint = any((place / name).exists() for name in (WEIGHTS, INDEX))
    if place.is_file() or ((place / ONNX_FILE).exists() and not checkpoint):
        if asked.via not in ("auto", "qexport"):
            raise UsageError(f"--via {asked.via} is for folders with {CONFIG}", where=str(source))
        return "onnx"
    return "qexport" if asked.via == "auto" else asked.via


def _find(door: str) -> Any:
    module, _, name = DOORS[door].partition(":")
    return getattr(importlib.import_module(module), name)


def _paths(source: str | Path, asked: ExportOptions) -> list[str | Path]:
    """Every path that is read."""
    return [path for path in (source, asked.data, asked.text) if path is not None]


def _write(model: ir.Model, stage: Stage, name: str) -> ir.Model:
    """Write a graph and return what the file says now, its weights mapped."""
    save_onnx(model, stage, name, threshold=INLINE)
    return load_onnx(stage.path / name)


def _material(origin: Origin, asked: ExportOptions, model: ir.Model) -> Material:
    positions = parse_positions(model.metadata_props.get(MAX_POSITIONS, "")) or origin.positions
    data, text = (None if path is None else Path(path) for path in (asked.data, asked.text))
    return Material(data, text, origin.tokenizer, origin.vocabulary, positions)


def _result(origin: Origin, written: Mapping[str, ir.Model], proven: Verification, stage: Stage) -> ExportResult:
    return ExportResult(
        schema="qexport.export/1",
        version=qexport.__version__,
        directory="",
        source=origin.info,
        door=origin.door,
        family=origin.family,
        task=origin.task,
        dtype=dtype_name(origin.dtype),
        layout=_layout(written[ONNX_FILE]),
        parts={name: _part(model) for name, model in written.items()},
        verification=proven,
        files=files_of(stage),
        warnings=(),
        seconds=0.0,
        peak_rss_bytes=0,
    )


def _layout(model: ir.Model) -> Literal["cached", "scoring", "plain"]:
    if keeps_cache(model):
        return "cached"
    return "scoring" if scores_tokens(model) else "plain"


def _part(model: ir.Model) -> PartInfo:
    return PartInfo(
        opset=model.opset_imports.get("", 0),
        nodes=sum(1 for _ in model.graph.all_nodes()),
        parameters=count_parameters(model),
        inputs=tuple(map(_port, model.graph.inputs)),
        outputs=tuple(map(_port, model.graph.outputs)),
    )


def _port(value: ir.Value) -> PortInfo:
    shape = None
    if value.shape is not None:
        shape = tuple(axis if isinstance(axis, int) else str(axis.value or "?") for axis in value.shape)
    return PortInfo(name=value.name or "", dtype=dtype_name(value.dtype), shape=shape)


def _manifest(stage: Stage, result: ExportResult) -> dict[str, Any]:
    """Receipt: what went in, by which tools, what came out and how that was proven."""
    told = result.model_dump(mode="json", by_alias=True)
    kept = ("version", "source", "door", "family", "task", "dtype", "layout", "parts", "verification")
    return {
        "schema": MANIFEST_SCHEMA,
        **{name: finite(told[name]) for name in kept},
        "engine": None,
        "tools": tool_versions(*TOOLS.get(result.door, ())),
        "files": {name: info.model_dump() for name, info in files_of(stage).items()},
    }
