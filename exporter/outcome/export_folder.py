"""The folder of an export: the record of what was written and proven, and the receipt that vouches for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import onnx_ir as ir

import qexport
from qexport.calibration.reading.spec import keeps_cache, scores_tokens
from qexport.exporter.doors.origin import Origin
from qexport.exporter.load import ONNX_FILE, count_parameters
from qexport.exporter.looking.inspect import dtype_name
from qexport.exporter.outcome.export_result import ExportResult, PartInfo, PortInfo, Verification
from qexport.exporter.outcome.receipt import MANIFEST, MANIFEST_SCHEMA, files_of, tool_versions
from qexport.runtime.memory import peak_memory
from qexport.safe_io import Stage, finite

RESULT = "export.json"
TOOLS = {"torch": ("torch", "transformers"), "optimum": ("optimum-onnx",)}
"""Packages that shape what comes through a door."""

Proven: TypeAlias = tuple[Verification, tuple[str, ...]]


def write_export(
    stage: Stage, origin: Origin, written: Mapping[str, ir.Model], proven: Proven, told: tuple[str, float]
) -> ExportResult:
    """Write everything but the models and what travels along, which are in the stage already; the manifest comes last.

    Args:
        stage: Where the folder is made.
        origin: What came through the door.
        written: File name to the graph that was written.
        proven: What the written files were held against, and warnings.
        told: The folder as the person named it, and the seconds that were taken.
    """
    verification, warnings = proven
    directory, seconds = told
    result = ExportResult(
        schema="qexport.export/1",
        version=qexport.__version__,
        directory=directory,
        source=origin.info,
        door=origin.door,
        family=origin.family,
        task=origin.task,
        dtype=dtype_name(origin.dtype),
        layout=_layout(written[ONNX_FILE]),
        parts={name: _part(model) for name, model in written.items()},
        verification=verification,
        files=files_of(stage),
        warnings=(*origin.notes, *warnings),
        seconds=seconds,
        peak_rss_bytes=peak_memory(),
    )
    stage.write_json(RESULT, finite(result.model_dump(mode="json", by_alias=True)))
    stage.write_json(MANIFEST, _manifest(stage, result))
    return result


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
