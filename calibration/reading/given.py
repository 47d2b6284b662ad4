"""Samples that a Python caller makes, and what ``sha256sum`` wrote beside a data file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.calibration.reading.arrays import cast, castable, fits, trim
from qexport.calibration.reading.spec import MAX_SAMPLE_BYTES, InputSpec, Sample, describe, describe_all
from qexport.errors import DataInvalid, IntegrityError, QexportError, ResourceExhausted, UsageError
from qexport.safe_io import digest_file, read_bytes

Maker: TypeAlias = Callable[[], Iterable[Mapping[str, Any]]]
"""Returns the samples from the front, the same ones at every call: input name to array, no batch axis."""

Data: TypeAlias = str | Path | Maker
"""What calibration and evaluation read: a file, a folder, or a function."""

SIDECAR = ".sha256"

_MOST_SIDECAR = 1 << 16
_LINE = re.compile(r"\\?([0-9a-fA-F]{64})(?: [ *](.+))?")


@dataclass(frozen=True)
class GivenSource:
    """Samples of a function, checked like those of a file."""

    make: Maker
    inputs: tuple[InputSpec, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """None: what the function reads is its own affair."""
        return ()

    def __iter__(self) -> Iterator[Sample]:
        for index, given in enumerate(self._made()):
            where = f"{name_of(self.make)}: sample {index}"
            yield trim(_checked(given, self.inputs, where), self.inputs, where)

    def _made(self) -> Iterator[Any]:
        """What the function yields; whatever it raises becomes ``DataInvalid`` with the number of the sample."""
        count = 0
        try:
            for given in self.make():
                yield given
                count += 1
        except (QexportError, MemoryError):
            raise
        except Exception as error:
            what = f"the function that gives the samples raised {type(error).__name__}: {error}"
            raise DataInvalid(what, where=f"{name_of(self.make)}: sample {count}") from error


def as_data(data: Data) -> Path | Maker:
    """A path, or the function.

    Raises:
        UsageError: It is neither.
    """
    if isinstance(data, str | os.PathLike):
        return Path(data)
    if not callable(data):
        hint = "wrap it into a function that returns the samples anew at every call, as they are read more than once"
        raise UsageError(f"samples are given as a path or a function, not as {type(data).__name__}", hint=hint)
    return data


def name_of(data: Path | Maker) -> str:
    """What reports and messages call it."""
    return data.name if isinstance(data, Path) else f"{getattr(data, '__name__', type(data).__name__)}()"


def suffix_of(data: Data | None) -> str:
    """Ending of the file in small letters; empty for everything else."""
    return Path(data).suffix.lower() if isinstance(data, str | os.PathLike) else ""


def _checked(given: Any, inputs: tuple[InputSpec, ...], where: str) -> Sample:
    if not isinstance(given, Mapping):
        raise DataInvalid(f"expected a dictionary of arrays, found {type(given).__name__}", where=where)
    arrays = {name: _array(value, f"{where}, input {name!r}") for name, value in given.items()}
    problems = list(_misfits(arrays, inputs))
    if problems:
        found = "; ".join(describe(str(name), array.dtype, array.shape) for name, array in arrays.items())
        hint = "one array per model input, named like it, without the batch axis"
        what = f"{', '.join(problems)}: expected {describe_all(inputs)}, found {found or 'no arrays'}"
        raise DataInvalid(what, where=where, hint=hint)
    for name, array in arrays.items():
        if array.nbytes > MAX_SAMPLE_BYTES:
            raise ResourceExhausted(
                f"{name!r} takes {array.nbytes} bytes, the limit is {MAX_SAMPLE_BYTES}", where=where
            )
    return {entry.name: cast(arrays[entry.name], entry.dtype) for entry in inputs}


def _array(value: Any, where: str) -> NDArray[Any]:
    """A copy, as a buffer may be used again."""
    try:
        return np.array(value)
    except (ValueError, TypeError) as error:
        raise DataInvalid(f"is no array: {error}", where=where) from error


def _misfits(arrays: Mapping[str, NDArray[Any]], inputs: tuple[InputSpec, ...]) -> Iterator[str]:
    names = {entry.name for entry in inputs}
    yield from (f"{name!r} is missing" for name in sorted(names - set(arrays)))
    yield from (f"{name!r} is not an input of the model" for name in arrays if name not in names)
    for entry in inputs:
        array = arrays.get(entry.name)
        if array is None:
            continue
        if not castable(array.dtype, entry.dtype):
            yield f"{entry.name!r} is {array.dtype}"
        if not entry.shape or not fits(array.shape, entry.shape[1:]):
            yield f"the shape of {entry.name!r} does not fit"
        elif not array.size:
            yield f"{entry.name!r} is empty"


def check_sidecar(path: Path) -> None:
    """Hold a file against ``FILE.sha256``, where there is one.

    Raises:
        IntegrityError: The content has another digest.
        DataInvalid: The file beside it says nothing of this one.
    """
    note = path.with_name(path.name + SIDECAR)
    if not path.is_file() or not os.path.lexists(note):
        return
    text = read_bytes(note, limit=_MOST_SIDECAR).decode("utf-8", "replace")
    found = [match for line in text.splitlines() if (match := _LINE.fullmatch(line.rstrip()))]
    told = {match[1].lower() for match in found if match[2] in (None, path.name, f"./{path.name}")}
    if len(told) != 1:
        hint = f"write it anew (sha256sum {path.name} > {note.name}), or remove it"
        raise DataInvalid(
            f"holds no digest of {path.name!r}" if not told else "holds several", where=str(note), hint=hint
        )
    digest = digest_file(path)
    if digest != f"sha256:{told.pop()}":
        hint = "the file was damaged or changed: fetch it again"
        raise IntegrityError(f"has the digest {digest}, {note.name} says another", where=str(path), hint=hint)
