"""The outcome of an export as validated values; the same object is ``--json`` and the Python API's."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qexport.exporter.outcome.result import FileInfo, SourceInfo


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class CheckInfo(_Record):
    """One output in one kind of run, export against source; see ``proof.closeness`` for what is measured.

    Attributes:
        what: What was run.
        output: Name of the output.
        numbers: How many were compared.
        error: Largest error of a number.
        allowed_error: Most that it may be.
        rms: Root of the mean square of all errors.
        allowed_rms: Most that it may be.
        argmax: Share of the rows of scores whose largest number stands at the same place; ties may fall either way.
    """

    what: str
    output: str
    numbers: int
    error: float
    allowed_error: float
    rms: float
    allowed_rms: float
    argmax: float | None = None


class PortInfo(_Record):
    """An input or an output of a written model; free axes by name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None


class PartInfo(_Record):
    """One written model. ``parameters`` counts elements of initializers."""

    opset: int
    nodes: int
    parameters: int
    inputs: tuple[PortInfo, ...]
    outputs: tuple[PortInfo, ...]


class Verification(_Record):
    """What the written files were held against.

    Attributes:
        reference: What computed the truth.
        data: What on.
        made_up: Whether that is not real.
        checks: The numbers.
    """

    reference: str
    data: str
    made_up: bool
    checks: tuple[CheckInfo, ...]


class ExportResult(_Record):
    """Everything an export found out.

    Attributes:
        door: By which way the source came in.
        family: Its ``model_type``, if it has one.
        task: The head that was asked for, if one was.
        dtype: Type of weights and activations.
        layout: ``cached`` for decoders in the portable layout, ``scoring`` for those that read whole rows, ``plain``
            for everything else.
        parts: File name to what is in it.
    """

    schema_version: Literal["qexport.export/1"] = Field("qexport.export/1", alias="schema")
    version: str
    directory: str
    source: SourceInfo
    door: str
    family: str | None
    task: str | None
    dtype: str
    layout: Literal["cached", "scoring", "plain"]
    parts: dict[str, PartInfo]
    verification: Verification
    files: dict[str, FileInfo]
    warnings: tuple[str, ...]
    seconds: float
    peak_rss_bytes: int

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        from qexport.exporter.report.notebook import export_html

        return export_html(self)
