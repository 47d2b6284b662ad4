"""Admission: look at a model file before anything else does, and refuse what is broken or dangerous.

Stock libraries cannot be leaned on here: between them they accept negative offsets, cycles, duplicate names, scales of
zero or NaN, and files that never end. Everything is read from the parsed protobuf, in near-linear time, without
recursion, and without allocating what a model merely claims.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import onnx
from google.protobuf import unknown_fields  # type: ignore[import-untyped]  # protobuf ships no types
from google.protobuf.internal import api_implementation  # type: ignore[import-untyped]  # the same
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # the same

from qexport.errors import EnvironmentMismatch, ModelInvalid, QexportError
from qexport.exporter.admit import external, functions, graphs, operators, quantization, sizes, tensors, values
from qexport.exporter.admit.kinds import refuse_other_kinds
from qexport.exporter.admit.subject import Limits, Subject, examine
from qexport.safe_io import read_bytes

__all__ = ["RULES", "Limits", "admit_file", "admit_proto", "parse"]

RULES: tuple[Callable[[Subject], None], ...] = (
    external.check_files,
    graphs.check_interface,
    graphs.check_text,
    operators.check_versions,
    tensors.check,
    external.check_ranges,
    graphs.check_writers,
    graphs.check_readers,
    functions.check_functions,
    operators.check_operators,
    sizes.check_sizes,
    quantization.check_scales,
    values.check_finite,
)
"""In the order they run: first what could reach outside, then structure, then numbers."""


def admit_file(path: str | os.PathLike[str], limits: Limits | None = None) -> onnx.ModelProto:
    """Parse and check a model file; external data is checked where it lies, not loaded into the model.

    Raises:
        UsageError: There is no such file.
        ModelInvalid: It is not ONNX, damaged, or breaks a rule.
        UnsafeInput: It is a pickle, or its external data lead outside of its folder.
        BuildFailed: It uses an operator of an unknown domain.
        ResourceExhausted: It is larger than the limits.
    """
    limits = limits or Limits()
    where = os.fspath(path)
    model = parse(read_bytes(path, limit=limits.max_model_bytes), where)
    admit_proto(model, where=where, root=Path(path).parent, limits=limits)
    return model


def parse(data: bytes, where: str) -> onnx.ModelProto:
    """Parse the bytes of a model; ``ModelInvalid`` or ``UnsafeInput`` when they are something else or damaged."""
    try:
        return _parse(data)
    except QexportError as error:
        error.where = where
        raise


def admit_proto(model: onnx.ModelProto, *, where: str, root: Path | None = None, limits: Limits | None = None) -> None:
    """Check a parsed model; raises as ``admit_file``.

    Args:
        model: The model; it is not changed.
        where: How messages call it.
        root: Folder of its external data; without one, external data is refused.
        limits: How much it may ask for.
    """
    try:
        subject = examine(model, root, limits or Limits())
        for rule in RULES:
            rule(subject)
    except QexportError as error:
        error.where = f"{where}: {error.where}" if error.where else where
        raise


def _parse(data: bytes) -> onnx.ModelProto:
    if not data:
        raise ModelInvalid("empty file", hint="the download or export was interrupted")
    refuse_other_kinds(data[:1024])
    if api_implementation.Type() == "python":
        raise EnvironmentMismatch(
            "protobuf runs its pure Python parser, which deep files can crash",
            hint="unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION",
        )
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ModelInvalid(
            f"not a readable ONNX file of {len(data)} bytes: truncated, damaged or another format",
            hint="fetch or export it again",
        ) from error
    strange = sorted({field.field_number for field in unknown_fields.UnknownFieldSet(model)})
    if strange:
        raise ModelInvalid(f"data that ONNX does not define (fields {strange[:5]})", hint="trailing bytes were added")
    return model
