"""The report as files beside the model: JSON with everything, Parquet tables where pyarrow is there."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qexport.errors import DataInvalid, UsageError
from qexport.exporter.outcome.result import Result
from qexport.exporter.report.tables import parquet_bytes, to_table
from qexport.exporter.report.values import Activation, Node, Point, Report, Sample, Weights
from qexport.safe_io import Stage, finite, read_bytes

RESULT_FILE = "result.json"
REPORT_FILE = "report.json"
MOST = 1 << 30  # bytes of either
NO_TABLES = "report tables were written as JSON only: for Parquet, pip install 'qexport[report]'"

_REPORT = TypeAdapter(Report)


def write_report(stage: Stage, report: Report) -> tuple[str, ...]:
    """Write ``report.json`` and, where pyarrow is installed, a Parquet file for each table; returns the names."""
    before = set(stage.files)
    stage.write_json(REPORT_FILE, finite(_REPORT.dump_python(report, mode="json")))
    if can_write_tables():
        for name, cls, rows in tables_of(report):
            stage.write_bytes(f"report-{name}.parquet", parquet_bytes(to_table(rows, cls, report.schema)))
    return tuple(name for name in stage.files if name not in before)


def can_write_tables() -> bool:
    """Whether pyarrow is installed."""
    return importlib.util.find_spec("pyarrow") is not None


def tables_of(report: Report) -> list[tuple[str, type, Sequence[Any]]]:
    """The tables of a report: name, type of the rows, rows."""
    return [
        ("nodes", Node, report.nodes),
        ("activations", Activation, report.activations),
        ("weights", Weights, report.weights),
        ("points", Point, report.points),
        ("samples", Sample, report.samples),
    ]


def load_report(folder: str | Path) -> tuple[Result, Report]:
    """Read what a build left in its folder; digests are not compared, which ``verify`` does.

    Args:
        folder: What ``build`` wrote, or one that holds ``result.json`` and ``report.json`` of it.

    Returns:
        The numbers of the build, and all that its page shows of nodes, tensors, tries and samples.

    Raises:
        UsageError: A file is not there.
        DataInvalid: A file is none of ours, or of another version.
        QexportError: It cannot be read.
    """
    result, report = Path(folder) / RESULT_FILE, Path(folder) / REPORT_FILE
    if missing := [path.name for path in (result, report) if not path.exists()]:
        hint = "name a folder that qexport build wrote"
        raise UsageError(f"{missing[0]} is not there", where=str(folder), hint=hint)
    try:
        return Result.model_validate_json(read_bytes(result, limit=MOST)), _REPORT.validate_json(
            read_bytes(report, limit=MOST)
        )
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        hint = "build the model again with this version"
        raise DataInvalid(
            f"not a report of this version: {place}: {first['msg']}", where=str(folder), hint=hint
        ) from error
