"""Tensors of a checkpoint, spread over any number of safetensors files: checked from their headers, read one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qexport.errors import ModelInvalid, QexportError
from qexport.exporter.admit.kinds import SAFETENSORS, find_kind
from qexport.safe_io import open_file

Array = NDArray[Any]
_SINGLE = 4  # bytes of a float32
FLOATS = ("F32", "F16", "BF16", "F64")  # numpy knows bfloat16 since onnx_ir has loaded ml_dtypes
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as its file has it.

    Attributes:
        shape: Its shape.
        kind: Its type by the name that safetensors has for it.
        read: Reads it, in its own type.
        where: The file.
    """

    shape: tuple[int, ...]
    kind: str
    read: Callable[[], Array]
    where: str


class Weights:
    """A reader of single tensors, as float32.

    Names are as ``anchor`` has them: what stands before it in the checkpoint (``bert.`` in one with a head) is left
    away, and LayerNorm's old ``gamma`` and ``beta`` are ``weight`` and ``bias``. Tensors that stand outside of that
    prefix, those of a head, keep their names.

    Attributes:
        where: The file, or the index of the files.
        prefix: What is left away.
        finite: Whether a graph may not have NaN or infinity among its weights.
    """

    def __init__(self, stored: Mapping[str, Stored], anchor: str, where: str, *, finite: bool = True) -> None:
        self.where, self.finite = where, finite
        self._kept: np.dtype[Any] | None = None
        self.prefix = _prefix(stored, anchor, where)
        self._stored: dict[str, Stored] = {}
        for name in sorted(stored, key=lambda name: name.startswith(self.prefix)):
            self._stored[_modern(name.removeprefix(self.prefix))] = stored[name]

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def add(self, scope: str, stored: Mapping[str, Stored]) -> None:
        """Take in what a module saved in a file of its own, as ``scope.name``."""
        self._stored |= {f"{scope}.{name}": tensor for name, tensor in stored.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor; ``ModelInvalid`` when it is missing."""
        return self._find(name).shape

    def check(self, name: str, shape: tuple[int, ...]) -> Stored:
        """Find a tensor and look at its header.

        Raises:
            ModelInvalid: It is missing, of another shape, or no float type.
        """
        found = self._find(name)
        if found.shape != shape:
            what = f"weight {name!r} is {list(found.shape)}, config.json asks for {list(shape)}"
            raise ModelInvalid(what, where=found.where)
        if found.kind not in FLOATS:
            hint = f"save the model as float; {', '.join(FLOATS)} are read"
            raise ModelInvalid(f"weight {name!r} is of type {found.kind}", where=found.where, hint=hint)
        return found

    def __call__(self, name: str, shape: tuple[int, ...]) -> Array:
        """Read a tensor as float32; errors as ``check``."""
        array = self.check(name, shape).read()
        if self._kept is not None:
            array = array if array.itemsize < _SINGLE else as_float32(array)  # a double is rounded twice in the graph
            with np.errstate(over="ignore"):
                array = array.astype(self._kept, copy=False)  # no more than two of its size are in memory
        return as_float32(array)

    def rounded(self, dtype: np.dtype[Any]) -> Weights:
        """A reader of the same tensors with the numbers that ``dtype`` has, still as float32."""
        other = copy(self)
        other._kept = dtype
        return other

    def _find(self, name: str) -> Stored:
        if name not in self._stored:
            such = f", such as {next(iter(sorted(self._stored)))!r}" if self._stored else ""
            hint = f"the checkpoint holds {len(self._stored)} tensors{such}"
            raise ModelInvalid(f"weight {name!r} is missing", where=self.where, hint=hint)
        return self._stored[name]


def as_float32(array: Array) -> Array:
    """The array in float32, without a copy where it is already."""
    with np.errstate(over="ignore"):  # infinities are admission's to judge
        return array.astype(np.float32, copy=False)


def demand_finite(array: Array, dtype: np.dtype[Any], name: str, where: str) -> None:
    """Raise ``ModelInvalid`` where a weight holds NaN, infinity, or numbers that ``dtype`` does not reach."""
    most = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]  # ml_dtypes does not type it
    least, greatest = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if -most <= least and greatest <= most:
        return
    if math.isfinite(least) and math.isfinite(greatest):
        what = f"weight {name!r} reaches {max(-least, greatest):.3g}, {dtype.name} ends at {most:.3g}"
        raise ModelInvalid(what, where=where, hint="export the model in bfloat16 or float32")
    raise ModelInvalid(f"NaN or infinity in weight {name!r}", where=where, hint="train or save the model again")


def read_headers(files: Sequence[Path]) -> dict[str, Stored]:
    """What the safetensors files hold, by name; no tensor is read.

    Raises:
        ModelInvalid: Not safetensors, or two files with a tensor of one name.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Stored] = {}
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118  # the file is no dictionary
                    if name in found:
                        what = f"tensor {name!r} is also in {Path(found[name].where).name}"
                        raise ModelInvalid(what, where=str(path), hint="save the model again")
                    view = file.get_slice(name)
                    shape = tuple(view.get_shape())
                    found[name] = Stored(shape, view.get_dtype(), _reader(path, name), str(path))
        except (SafetensorError, OSError) as error:
            raise _told(path, error) from error
    return found


def _told(path: Path, error: Exception) -> QexportError:
    """What is wrong with a file that is no safetensors file; what it is instead, where its first bytes tell."""
    hint = "fetch the folder again; in a clone of a repository, run: git lfs pull"
    with open_file(path) as file:
        kind = find_kind(file.read(1024))
    if kind is None or kind.name == SAFETENSORS:
        return ModelInvalid(f"not a safetensors file: {error}", where=str(path), hint=hint)
    return kind.error(f"not a safetensors file but {kind.name}", where=str(path), hint=hint)


def _reader(path: Path, name: str) -> Callable[[], Array]:
    """Open, read, close: an open file keeps every page in memory that was ever looked at."""

    def read() -> Array:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                return np.asarray(file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise ModelInvalid(f"tensor {name!r} cannot be read any more: {error}", where=str(path)) from error

    return read


def _prefix(stored: Mapping[str, Stored], anchor: str, where: str) -> str:
    found = [name.removesuffix(anchor) for name in sorted(stored) if name == anchor or name.endswith(f".{anchor}")]
    if "" in found or not found:
        return ""
    if len(found) > 1:
        shown = ", ".join(map(repr, found))
        raise ModelInvalid(f"several models in one file: {shown}", where=where, hint="save the one to export alone")
    return found[0]


def _modern(name: str) -> str:
    old = next((old for old in _OLD_NAMES if name.endswith(old)), None)
    return name if old is None else name.removesuffix(old) + _OLD_NAMES[old]
