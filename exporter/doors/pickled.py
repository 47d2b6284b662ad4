"""Pickled checkpoints (``.bin``, ``.pt``, ``.pth``): refused unless asked for, and then read as numbers alone.

A pickle is a program. Torch's restricted reader makes tensors and plain containers and refuses everything else; there
is no way here to the other reader, whatever the file holds.
"""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qexport.errors import ModelInvalid, UnsafeInput
from qexport.exporter.doors.torch_modules.tensors import import_torch, to_array
from qexport.exporter.families.folder import Folder
from qexport.exporter.families.weights import Stored, Weights
from qexport.safe_io import open_file

PICKLE = "pytorch_model.bin"
SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
_KINDS = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float64): "F64",
}
_INNER = ("state_dict", "model_state_dict", "model")  # where training scripts put the weights beside other things
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)|module '?([\w.]+)'?")


def read_pickled(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Mapping[str, NDArray[Any]]:
    """Read the tensors of a checkpoint by name, mapped from the file where its form allows it.

    Tensors that share memory in the file share it here.

    Args:
        path: A file that ``torch.save`` wrote: a dict of tensors, by itself or as its ``state_dict``.
        allow_pickle: Whether a person asked for pickles to be read.

    Raises:
        UnsafeInput: Nobody asked; or the file holds more than numbers, or is damaged.
        ModelInvalid: It holds no tensors by name, or one that arrays cannot hold.
        UsageError: There is no such file.
        EnvironmentMismatch: torch is missing.
    """
    where = os.fspath(path)
    open_file(path).close()
    if not allow_pickle:
        hint = "convert it to safetensors, or allow pickles: they are then read as numbers alone"
        raise UnsafeInput("a pickled checkpoint, which can run code when it is read", where=where, hint=hint)
    held = _tensors(_restricted(Path(path)), where)
    return MappingProxyType({name: _array(name, tensor, where) for name, tensor in held.items()})


def _restricted(path: Path) -> Any:
    """What the restricted reader makes of the file; old files are no archives and cannot be mapped."""
    torch = import_torch("pickled checkpoints")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:
        hint = "do not open it with another tool either; ask who made it for safetensors"
        raise UnsafeInput(f"not a checkpoint of numbers alone: {_cause(error)}", where=str(path), hint=hint) from error


def _cause(error: Exception) -> str:
    """Which object the pickle wanted, where that is it; else the first line."""
    text = str(error)
    if match := _GLOBAL.search(text):
        return f"it wants {match[1] or match[2]}"
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def _tensors(held: Any, where: str) -> dict[str, Any]:
    import torch

    candidates = [held, *(held.get(name) for name in _INNER)] if isinstance(held, Mapping) else []
    for inner in candidates:
        if isinstance(inner, Mapping):
            found = {str(name): each for name, each in inner.items() if isinstance(each, torch.Tensor)}
            if found:
                return found
    raise ModelInvalid("no tensors by name", where=where, hint="save the state_dict of the module")


def _array(name: str, tensor: Any, where: str) -> NDArray[Any]:
    try:
        return to_array(tensor)
    except (TypeError, RuntimeError, ValueError) as error:
        what = f"tensor {name!r} cannot be an array: it is {tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise ModelInvalid(what, where=where, hint="save it dense, in a float or integer type") from error


# ---------------------------------------------------------------- folders


class PickledFolder(Folder):
    """A folder whose weights are a pickle that a person has allowed; it is read as numbers alone."""

    def __init__(self, path: Path, used: list[Path], *, allow_pickle: bool) -> None:
        super().__init__(path)
        self.used += used
        self._held: dict[str, Stored] | None = None
        self._allow_pickle = allow_pickle

    def weights(self, anchor: str) -> Weights:
        """A reader of the tensors in the pickle."""
        file = self.file(PICKLE)
        if self._held is None:
            arrays = read_pickled(file, allow_pickle=self._allow_pickle)
            self._held = {name: _stored(array, file) for name, array in arrays.items()}
        return Weights(self._held, anchor, str(file))


def _stored(array: NDArray[Any], file: Path) -> Stored:
    kind = _KINDS.get(array.dtype, array.dtype.name)
    return Stored(array.shape, kind, partial(np.asarray, array), str(file))
