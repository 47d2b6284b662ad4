"""Arrays in npz, npy and safetensors files, read one sample at a time; nothing in them is ever unpickled."""

from __future__ import annotations

import io
import json
import math
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from qexport.calibration.reading.spec import MAX_SAMPLE_BYTES, InputSpec, Sample, describe, describe_all
from qexport.errors import DataInvalid, ResourceExhausted, UnsafeInput
from qexport.passes.portable import MASK
from qexport.safe_io import open_file

LABELS = "labels"

MAX_HEADER_BYTES = 1 << 14
MAX_TABLE_BYTES = 16 << 20
MAX_MEMBERS = 1000
BOMB_BYTES = 256 << 20  # an archive may expand to this much whatever its ratio
BOMB_RATIO = 100

_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, KeyError, RuntimeError)
_UNREADABLE = (
    *(ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError),
    *(SyntaxError, TypeError, ValueError, TokenError),
)
_NPY_HEADERS = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
_SAFETENSORS_TYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4",
    "I64": "<i8", "U64": "<u8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class Member:
    """One array of a file, first axis the sample, read from front to back.

    Attributes:
        name: Its name in the file.
        dtype: Its element type, byte order included.
        shape: Its whole shape.
        offset: Where its values start in the stream.
        open: Opens the stream.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    open: Callable[[], AbstractContextManager[IO[bytes]]]

    def __str__(self) -> str:
        return describe(self.name, self.dtype, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all values together."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self) -> Iterator[NDArray[Any]]:
        """Yield one array per index of the first axis.

        Raises:
            DataInvalid: The file ends early or its checksum is wrong.
        """
        shape = self.shape[1:]
        size = math.prod(shape) * self.dtype.itemsize
        with self.open() as stream:
            stream.seek(self.offset)
            for index in range(self.shape[0]):
                data = stream.read(size)
                if len(data) != size:
                    raise DataInvalid(f"{self} ends after {index} samples")
                yield np.frombuffer(data, self.dtype).reshape(shape)


@dataclass(frozen=True)
class ArraySource:
    """Samples from arrays that were checked against the model's inputs."""

    files: tuple[Path, ...]
    members: Mapping[str, Member]
    inputs: tuple[InputSpec, ...]
    labels: Member | None = None

    def __iter__(self) -> Iterator[Sample]:
        columns = [self.members[entry.name].rows() for entry in self.inputs]
        for index, values in enumerate(zip(*columns, strict=True)):
            sample = {entry.name: cast(row, entry.dtype) for entry, row in zip(self.inputs, values, strict=True)}
            yield trim(sample, self.inputs, f"{self.files[0]}: sample {index}")


def open_arrays(path: Path, members: Mapping[str, Member], inputs: tuple[InputSpec, ...]) -> ArraySource:
    """Match the arrays of a file, named like the model's inputs, with them; the first axis counts samples.

    A single unnamed array (``.npy``) goes to the only input. Integers are widened, floats converted.
    An array ``labels`` that the model does not ask for is left alone.

    Raises:
        DataInvalid: Names, types or shapes do not fit the model.
        ResourceExhausted: One sample is larger than any sample should be.
    """
    if set(members) == {""} and len(inputs) == 1:
        members = {inputs[0].name: replace(members[""], name=inputs[0].name)}
    problems = list(_mismatches(members, inputs))
    if problems:
        found = "; ".join(map(str, members.values())) or "no arrays"
        raise DataInvalid(
            f"{', '.join(problems)}: expected {describe_all(inputs)}, found {found}",
            where=str(path),
            hint="one array per model input, named like it, first axis the sample",
        )
    for entry in inputs:
        size = members[entry.name].nbytes // max(members[entry.name].shape[0], 1)
        if size > MAX_SAMPLE_BYTES:
            raise ResourceExhausted(
                f"one sample of {entry.name!r} takes {size} bytes, the limit is {MAX_SAMPLE_BYTES}", where=str(path)
            )
    names = {entry.name for entry in inputs}
    return ArraySource((path,), members, inputs, None if LABELS in names else members.get(LABELS))


def _mismatches(members: Mapping[str, Member], inputs: tuple[InputSpec, ...]) -> Iterator[str]:
    names = {entry.name for entry in inputs}
    yield from (f"{name!r} is missing" for name in sorted(names - set(members)))
    yield from (f"{name!r} is not an input of the model" for name in sorted(set(members) - names - {LABELS}))
    present = [(entry, members[entry.name]) for entry in inputs if entry.name in members]
    for entry, member in present:
        if not castable(member.dtype, entry.dtype):
            yield f"{entry.name!r} is {member.dtype}"
        if not entry.shape or not fits(member.shape[1:], entry.shape[1:]) or not member.shape:
            yield f"the shape of {entry.name!r} does not fit"
        elif math.prod(member.shape) == 0:
            yield f"{entry.name!r} is empty"
    if len({member.shape[:1] for _, member in present}) > 1:
        yield "the numbers of samples differ"


def fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    """Tell whether an array of ``shape`` may go where ``wanted`` is asked for; ``None`` takes any size."""
    return len(shape) == len(wanted) and all(w in (None, s) for s, w in zip(shape, wanted, strict=True))


def castable(found: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    """Tell whether values may be converted: integers to wider integers, floats to floats."""
    if found.kind in "biu":
        return wanted.kind in "biu" and np.can_cast(found, wanted, "safe")
    return found.kind == "f" and wanted.kind in "fV"  # V: the small floats of ml_dtypes


def cast(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Convert without a warning; a float that overflows becomes Inf, which the finite check reports."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype, copy=False)


def trim(sample: Sample, inputs: tuple[InputSpec, ...], where: str) -> Sample:
    """Cut the padding behind the last 1 of the attention mask off every free axis as long as the mask.

    Raises:
        DataInvalid: The mask is all zero.
    """
    if MASK not in sample or sample[MASK].ndim == 0:
        return sample
    mask = sample[MASK]
    length = mask.shape[-1]
    used = np.flatnonzero(mask.reshape(-1, length).any(axis=0))
    if not used.size:
        raise DataInvalid(f"{MASK!r} is all zero", where=where)
    if not np.isin(mask, (0, 1)).all():  # an additive mask: what is hidden cannot be told from its values
        return sample
    end = int(used[-1]) + 1
    return {
        entry.name: sample[entry.name][
            tuple(
                slice(end if size == length and axis is None else None)
                for size, axis in zip(sample[entry.name].shape, entry.shape[1:], strict=True)
            )
        ]
        for entry in inputs
    }


def read_labels(member: Member, count: int, where: str) -> NDArray[np.int64]:
    """Return the class index of every sample.

    Raises:
        DataInvalid: The array is not one whole number >= 0 for each of ``count`` samples.
    """
    if member.dtype.kind not in "iu" or member.shape != (count,):
        raise DataInvalid(f"expected {count} whole numbers, one per sample, found {member}", where=where)
    labels = np.fromiter((row[()] for row in member.rows()), np.int64, count)
    if labels.min() < 0:
        raise DataInvalid(f"the label {labels.min()} is negative", where=where)
    return labels


def read_members(path: Path) -> dict[str, Member]:
    """List the arrays of a file without reading their values; the name is empty in a ``.npy``.

    Raises:
        DataInvalid: The file is damaged, truncated, or of another kind.
        UnsafeInput: It holds pickled objects.
        ResourceExhausted: A small archive expands to very much.
    """
    with open_file(path) as stream:
        head = stream.read(1 << 20)
    if path.suffix == ".safetensors":
        return _safetensors_members(path)
    if head.startswith(b"PK"):
        return _npz_members(path)
    if head.startswith(npy_format.MAGIC_PREFIX):
        return {"": _npy_member(path, "", lambda: open_file(path), _size(path))}
    if _is_pickle(head):
        raise UnsafeInput("is a pickle, which can run code when it is read", where=str(path), hint="use numpy.savez")
    raise DataInvalid("is neither an npz nor an npy file", where=str(path), hint="use numpy.savez")


def _size(path: Path) -> int:
    with open_file(path) as stream:
        return stream.seek(0, io.SEEK_END)


def _is_pickle(head: bytes) -> bool:
    """Tell whether ``head`` names a pickle protocol, or is pickle opcodes up to its end; decodes, never executes."""
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in what may not be a pickle at all
            last = max((position or 0 for _, _, position in islice(pickletools.genops(head), 1 << 16)), default=-1)
    except (ValueError, OverflowError, UnicodeError):
        return False
    return last == len(head) - 1


@contextmanager
def _broken_is_invalid(path: Path) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise DataInvalid(f"is damaged: {error}", where=str(path)) from error


def _npz_members(path: Path) -> dict[str, Member]:
    with _broken_is_invalid(path), open_file(path) as raw, zipfile.ZipFile(raw) as archive:
        entries = archive.infolist()
        _check_archive(entries, path)
        members = {
            (name := entry.filename.removesuffix(".npy")): _npy_member(
                path, name, _zip_opener(path, entry.filename), entry.file_size
            )
            for entry in entries
        }
        damaged = archive.testzip()
    if damaged is not None:
        raise DataInvalid(f"the checksum of {damaged!r} is wrong", where=str(path))
    return members


def _check_archive(entries: list[zipfile.ZipInfo], path: Path) -> None:
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names) or len(names) > MAX_MEMBERS:
        raise DataInvalid(f"has {len(names)} members, of which {len(set(names))} differ in name", where=str(path))
    for entry in entries:
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataInvalid(f"{entry.filename!r} is encrypted or of an unknown compression", where=str(path))
    expanded = sum(entry.file_size for entry in entries)
    packed = sum(entry.compress_size for entry in entries)
    if expanded > BOMB_BYTES and expanded > BOMB_RATIO * packed:
        raise ResourceExhausted(
            f"expands from {packed} to {expanded} bytes, more than {BOMB_RATIO} times",
            where=str(path),
            hint="save with numpy.savez instead of savez_compressed if this is meant",
        )


def _zip_opener(path: Path, name: str) -> Callable[[], AbstractContextManager[IO[bytes]]]:
    @contextmanager
    def opener() -> Iterator[IO[bytes]]:
        with (
            _broken_is_invalid(path),
            open_file(path) as raw,
            zipfile.ZipFile(raw) as archive,
            archive.open(name) as stream,
        ):
            yield stream

    return opener


def _npy_member(path: Path, name: str, opener: Callable[[], AbstractContextManager[IO[bytes]]], size: int) -> Member:
    with opener() as stream:
        head = stream.read(MAX_HEADER_BYTES)
    where = f"{path}: {name!r}" if name else str(path)
    if not head.startswith(npy_format.MAGIC_PREFIX) and _is_pickle(head):
        raise UnsafeInput("is a pickle, which can run code when it is read", where=where)
    reader = io.BytesIO(head)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files of Python 2, which numpy then reads all the same
            shape, fortran, dtype = _NPY_HEADERS[npy_format.read_magic(reader)](reader)
    except _UNREADABLE as error:
        raise DataInvalid("has no npy header that can be read", where=where) from error
    if dtype.hasobject:
        raise UnsafeInput("holds Python objects, which can run code when they are read", where=where)
    member = Member(name, dtype, shape, reader.tell(), opener)
    if dtype.kind not in "biuf":
        raise DataInvalid(f"{member} is not an array of numbers", where=where)
    if fortran and len(shape) > 1:
        raise DataInvalid(
            f"{member} is stored in Fortran order", where=where, hint="save numpy.ascontiguousarray of it"
        )
    if min(shape, default=0) < 0 or member.offset + member.nbytes != size:
        raise DataInvalid(f"{member} needs {member.offset + member.nbytes} bytes, the file has {size}", where=where)
    return member


def _safetensors_members(path: Path) -> dict[str, Member]:
    with open_file(path) as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_TABLE_BYTES:
            raise DataInvalid(f"the header of {length} bytes is too long", where=str(path))
        header = stream.read(length)
    start, size = 8 + length, _size(path)
    try:
        table = json.loads(header)
        return {
            name: _safetensors_member(path, name, entry, (start, size))
            for name, entry in table.items()
            if name != "__metadata__"
        }
    except _UNREADABLE as error:
        raise DataInvalid("is damaged: the header of the safetensors file cannot be read", where=str(path)) from error


def _safetensors_member(path: Path, name: str, entry: Mapping[str, Any], bounds: tuple[int, int]) -> Member:
    begin, end = (bounds[0] + int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    if entry["dtype"] not in _SAFETENSORS_TYPES:
        raise DataInvalid(f"{name!r} is {entry['dtype']}, expected {', '.join(_SAFETENSORS_TYPES)}", where=str(path))
    member = Member(name, np.dtype(_SAFETENSORS_TYPES[entry["dtype"]]), shape, begin, lambda: open_file(path))
    if min(shape, default=0) < 0 or begin < bounds[0] or end > bounds[1] or end - begin != member.nbytes:
        raise DataInvalid(
            f"{member} needs {member.nbytes} bytes, has {end - begin} of {bounds[1]} in the file", where=str(path)
        )
    return member
