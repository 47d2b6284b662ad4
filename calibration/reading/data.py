"""Samples for calibration and evaluation: streamed from files, checked against the model, the same on every pass."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.calibration.reading.arrays import open_arrays, read_members
from qexport.calibration.reading.given import Data, GivenSource, Maker, as_data, check_sidecar, name_of
from qexport.calibration.reading.images import PIXELS, open_folder, open_pixels
from qexport.calibration.reading.spec import DataSpec, ImageSpec, InputSpec, Sample, Source, input_specs, sample_digest
from qexport.calibration.reading.text import READERS, open_text
from qexport.calibration.reading.windows import open_windows
from qexport.errors import DataInvalid, IntegrityError, QexportError, ResourceExhausted
from qexport.passes.portable import MASK, TYPES

__all__ = [
    "DataSpec",
    "Dataset",
    "FileDataset",
    "ImageSpec",
    "InputSpec",
    "Sample",
    "input_specs",
    "open_dataset",
    "open_source",
    "sample_digest",
    "survey",
]

Opener: TypeAlias = Callable[[Path, tuple[InputSpec, ...], DataSpec, Path | None], Source]
Stamp: TypeAlias = tuple[tuple[int, int, int], ...]  # per file: inode, size, time of last change in ns

MAX_SAMPLES = 1_000_000
_ALL_ALIKE = {MASK, TYPES}  # inputs that are constant in sound data


class Dataset(Protocol):
    """Samples that can be read again and again, the same ones in the same order."""

    @property
    def name(self) -> str:
        """What a report calls them."""

    @property
    def digest(self) -> str:
        """Digest of the content; the order of the samples does not count."""

    @property
    def digests(self) -> tuple[bytes, ...]:
        """``sample_digest`` of every sample, in order."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is doubtful about the data."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Sample]: ...


@dataclass(frozen=True, eq=False)
class FileDataset:
    """Samples of a source that was read through once and found sound.

    Iterating reads the files again, one sample in memory at a time, and raises ``IntegrityError`` as soon as
    something differs from the first time.

    Attributes:
        source: Where the raw samples come from.
        name: Name of the file or folder.
        digests: Digest of every sample that is kept, in order.
        kept: Position in the source of every sample that is kept, ascending.
        duplicates: How many samples were dropped because an earlier one is equal.
        warnings: What is doubtful about the data.
        stamp: State of the files when they were read first.
    """

    source: Source
    name: str
    digests: tuple[bytes, ...]
    kept: tuple[int, ...]
    duplicates: int
    warnings: tuple[str, ...]
    stamp: Stamp

    @property
    def digest(self) -> str:
        """``sha256:`` over the sorted digests of the samples."""
        return f"sha256:{hashlib.sha256(b''.join(sorted(self.digests))).hexdigest()}"

    def __len__(self) -> int:
        return len(self.kept)

    def __iter__(self) -> Iterator[Sample]:
        if take_stamp(self.source.files) != self.stamp:
            raise _changed(self)
        wanted = iter(zip(self.kept, self.digests, strict=True))
        position, digest = next(wanted)
        for index, sample in enumerate(_unchanged(self)):
            if index != position:
                continue
            if sample_digest(sample) != digest:
                raise _changed(self)
            yield sample
            position, digest = next(wanted, (-1, b""))
            if position < 0:
                return
        raise _changed(self)


def open_dataset(
    path: Data, inputs: tuple[InputSpec, ...], spec: DataSpec, *, tokenizer: Path | None = None
) -> FileDataset:
    """Open calibration data; equal samples count once, and ``spec.max_samples`` distinct ones are taken.

    Args:
        path: A ``.npz``, ``.npy`` or ``.safetensors`` of arrays named like the model's inputs, an ``.npz`` with
            uint8 ``images``, a folder of pictures, or a ``.csv``, ``.jsonl`` or ``.txt`` of text; a file with a
            ``FILE.sha256`` beside it is held against that. Or a function that returns samples anew at every call.
        inputs: What the model asks for.
        spec: How samples are made.
        tokenizer: ``tokenizer.json`` to use where the spec names none.

    Raises:
        DataInvalid: The data does not fit the model, is damaged, or holds NaN or Inf.
        UnsafeInput: The data could run code.
        ResourceExhausted: The data expands beyond all measure.
        IntegrityError: It is not what ``FILE.sha256`` says.
        UsageError: There is no such file.
    """
    data = as_data(path)
    return survey(open_source(data, inputs, spec, tokenizer), name_of(data), distinct=True, limit=spec.max_samples)


def open_source(path: Path | Maker, inputs: tuple[InputSpec, ...], spec: DataSpec, tokenizer: Path | None) -> Source:
    """Choose the reader by the name of the file.

    Raises:
        DataInvalid: No reader knows the name, or the reader refuses.
        IntegrityError: The file is not what ``FILE.sha256`` says.
    """
    if not isinstance(path, Path):
        return GivenSource(path, inputs)
    check_sidecar(path)
    if path.is_dir():
        return open_folder(path, inputs, spec)
    opener = OPENERS.get(path.suffix.lower())
    if opener is None:
        raise DataInvalid(
            f"no reader for {path.suffix!r} files", where=str(path), hint=f"known: {', '.join(OPENERS)}, a folder"
        )
    return opener(path, inputs, spec, tokenizer)


def survey(source: Source, name: str, *, distinct: bool, limit: int | None = None) -> FileDataset:
    """Read a source once: check every value, digest every sample, note what is doubtful.

    Args:
        source: The samples.
        name: What a report calls them.
        distinct: Drop a sample that is equal to an earlier one.
        limit: Keep so many at most.

    Raises:
        DataInvalid: A sample holds NaN or Inf, or there is no sample.
        ResourceExhausted: There are more than a million samples.
    """
    where = _place(source, name)
    stamp = take_stamp(source.files)
    kept: list[int] = []
    digests: list[bytes] = []
    seen: set[bytes] = set()
    extents: dict[str, tuple[float, float]] = {}
    duplicates = 0
    for index, sample in enumerate(source):
        check_finite(sample, index, where)
        digest = sample_digest(sample)
        if distinct and digest in seen:
            duplicates += 1
            continue
        if len(kept) == MAX_SAMPLES:
            raise ResourceExhausted(f"more than {MAX_SAMPLES} samples", where=where, hint="set data.max_samples")
        kept.append(index)
        digests.append(digest)
        seen.add(digest)
        _extend(extents, sample)
        if len(kept) == limit:
            break
    if not kept:
        raise DataInvalid("holds no samples", where=where)
    doubts = tuple(_doubts(extents, len(kept), duplicates))
    return FileDataset(source, name, tuple(digests), tuple(kept), duplicates, doubts, stamp)


def check_finite(sample: Mapping[str, NDArray[Any]], index: int, where: str) -> None:
    """Raise ``DataInvalid`` naming sample and input when a value is NaN or Inf."""
    for name, array in sample.items():
        if array.dtype.kind in "fV" and not np.isfinite(array).all():
            value = "NaN" if np.isnan(array).any() else "Inf"
            raise DataInvalid(f"sample {index}, input {name!r}: holds {value}", where=where)


def take_stamp(files: Iterable[Path]) -> Stamp:
    """Identify the present state of files; a missing one has the state ``(0, 0, 0)``."""
    return tuple(_file_stamp(path) for path in files)


def _file_stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns


def _place(source: Source, name: str) -> str:
    """Where the samples come from: the file, the folder of the files, or the function."""
    files = source.files
    return name if not files else str(files[0] if len(files) == 1 else files[0].parent)


def _unchanged(data: FileDataset) -> Iterator[Sample]:
    """Yield the samples of a source that was sound before; what fails now must have changed."""
    try:
        yield from data.source
    except QexportError as error:
        raise _changed(data) from error


def _changed(data: FileDataset) -> IntegrityError:
    where, files = _place(data.source, data.name), data.source.files
    hint = "start again on stable files" if files else "it must return the same samples at every call"
    return IntegrityError("the data changed since it was read first", where=where, hint=hint)


def _extend(extents: dict[str, tuple[float, float]], sample: Mapping[str, NDArray[Any]]) -> None:
    for name, array in sample.items():
        low, high = extents.get(name, (math.inf, -math.inf))
        extents[name] = min(low, float(array.min())), max(high, float(array.max()))


def _doubts(extents: Mapping[str, tuple[float, float]], count: int, duplicates: int) -> Iterator[str]:
    if count == 1:
        yield "there is only one sample"
    if duplicates:
        yield f"{duplicates} of {count + duplicates} samples are equal to an earlier one and were dropped"
    for name, (low, high) in extents.items():
        if low == high and name not in _ALL_ALIKE:
            yield f"input {name!r} is {low:g} everywhere"


def _open_arrays(path: Path, inputs: tuple[InputSpec, ...], spec: DataSpec, _tokenizer: Path | None) -> Source:
    members = read_members(path)
    pixels = members.get(PIXELS)
    named = any(entry.name == PIXELS for entry in inputs)
    if pixels is not None and pixels.dtype == np.uint8 and (spec.image is not None or not named):
        return open_pixels(path, members, inputs, spec)
    return open_arrays(path, members, inputs)


def _open_text(path: Path, inputs: tuple[InputSpec, ...], spec: DataSpec, tokenizer: Path | None) -> Source:
    return (open_windows if spec.windows else open_text)(path, inputs, spec, tokenizer)


OPENERS: dict[str, Opener] = {
    **dict.fromkeys((".npz", ".npy", ".safetensors"), _open_arrays),
    **dict.fromkeys(READERS, _open_text),
}
