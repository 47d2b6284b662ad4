"""External data: the keys, the path, the file behind it, and the range inside the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onnx import TensorProto

from qexport.errors import ModelInvalid, QexportError, ResourceExhausted, UnsafeInput
from qexport.exporter.admit.subject import Subject, quoted
from qexport.exporter.admit.tensors import all_tensors, needed_bytes, type_name
from qexport.safe_io import open_companion

_KEYS = frozenset({"location", "offset", "length", "checksum"})
_MEMORY_MARKER = "_ORT_MEM_ADDR_"
_PIECE = 1 << 22


@dataclass(frozen=True, slots=True)
class Reference:
    """A range of an external file; ``length`` is ``None`` when the model leaves it to the dimensions."""

    location: str
    offset: int
    length: int | None


def reference(tensor: TensorProto, where: str) -> Reference:
    """Read the entries of an external tensor.

    Raises:
        UnsafeInput: Unknown keys, or an address in memory instead of a file.
        ModelInvalid: A key twice, no location, an offset or length that is not a number below 2^63.
    """
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key not in _KEYS:
            raise UnsafeInput(f"unknown key {quoted(entry.key)} in the external data", where=where)
        if entry.key in entries:
            raise ModelInvalid(f"key {entry.key!r} twice in the external data", where=where)
        entries[entry.key] = entry.value
    location = entries.get("location", "")
    if _MEMORY_MARKER in str(location):
        raise UnsafeInput("the external data is an address in memory, not a file", where=where)
    if not location or not isinstance(location, str):
        raise ModelInvalid("external data without the name of a file", where=where)
    length = _number(entries, "length", where)
    return Reference(location, _number(entries, "offset", where) or 0, length)


def _number(entries: dict[str, str], key: str, where: str) -> int | None:
    text = entries.get(key)
    if text is None:
        return None
    if not (isinstance(text, str) and text.isascii() and text.isdigit() and len(text) <= 19 and int(text) < 2**63):
        raise ModelInvalid(f"{key} {quoted(text)} of the external data is not a number from 0 to 2^63-1", where=where)
    return int(text)


def _external_tensors(subject: Subject) -> Iterator[tuple[str, TensorProto, Reference]]:
    for where, tensor in all_tensors(subject):
        if tensor.data_location == TensorProto.EXTERNAL:
            yield where, tensor, reference(tensor, where)


def check_files(subject: Subject) -> None:
    """Every external file exists below the model's folder and is a plain file; ``UnsafeInput`` or ``ModelInvalid``."""
    seen: set[str] = set()
    for where, _, wanted in _external_tensors(subject):
        if wanted.location not in seen:
            file_size(_root(subject, where), wanted.location, where)
            seen.add(wanted.location)


def check_ranges(subject: Subject) -> None:
    """Every range has as many bytes as the dimensions need and lies in its file; the sum is limited."""
    sizes: dict[str, int] = {}
    total = 0
    for where, tensor, wanted in _external_tensors(subject):
        need = needed_bytes(tensor)
        if wanted.length not in (None, need):
            about = f"{list(tensor.dims)} of {type_name(tensor.data_type)}"
            raise ModelInvalid(f"external length is {wanted.length}, dimensions {about} need {need} bytes", where=where)
        if wanted.location not in sizes:
            sizes[wanted.location] = file_size(_root(subject, where), wanted.location, where)
        size = sizes[wanted.location]
        if wanted.offset + need > size:
            span = f"bytes {wanted.offset} to {wanted.offset + need}"
            raise ModelInvalid(f"needs {span} of {quoted(wanted.location)}, which has {size}", where=where)
        total += need
        if total > subject.limits.max_external_bytes:
            limit = subject.limits.max_external_bytes
            raise ResourceExhausted(f"the external tensors ask for more than {limit} bytes", where=where)


def _root(subject: Subject, where: str) -> Path:
    if subject.root is None:
        raise ModelInvalid("external data, but the model has no folder", where=where, hint="load the model from a file")
    return subject.root


def file_size(root: Path, location: str, where: str) -> int:
    """Bytes of an external file; errors carry ``where``."""
    try:
        with open_companion(root, location) as file:
            return os.fstat(file.fileno()).st_size
    except QexportError as error:
        error.where = f"{where}: {error.where}" if error.where else where
        raise


def pieces(root: Path, wanted: Reference, count: int) -> Iterator[bytes]:
    """The ``count`` bytes of a range, a few MiB at a time."""
    with open_companion(root, wanted.location) as file:
        file.seek(wanted.offset)
        while count > 0:
            piece = file.read(min(count, _PIECE))
            if not piece:
                raise ModelInvalid(f"{wanted.location!r} became shorter while it was read")
            count -= len(piece)
            yield piece
