"""The door for Hugging Face folders of a family that is known here: its graph is built from config and weights."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qexport.calibration.reading.spec import keeps_cache
from qexport.errors import UsageError
from qexport.exporter.doors.origin import Origin
from qexport.exporter.doors.pickled import read_pickled
from qexport.exporter.families.folder import INDEX, WEIGHTS, Folder
from qexport.exporter.families.form import FLOATS, Form
from qexport.exporter.families.vocabulary import check_vocabulary
from qexport.exporter.families.weights import Stored, Weights
from qexport.exporter.load import ONNX_FILE, PARTS, describe, find_companions, open_folder
from qexport.exporter.options import ExportOptions
from qexport.exporter.references import find_reference

PICKLE = "pytorch_model.bin"
_KINDS = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float64): "F64",
}


def open_own_folder(source: str, asked: ExportOptions, _scratch: Path) -> Origin:
    """Build the graphs, weights unread, and the reference beside them.

    Raises:
        UsageError: It is no such folder, or the head does not exist.
        ModelInvalid: The family is unknown, or config and weights do not fit.
        UnsafeInput: It reaches outside, wants to run code, or its weights are a pickle that nobody allowed.
        DataInvalid: The tokenizer has more tokens than the model.
    """
    path = Path(source)
    config, folder, build = open_folder(path)
    if asked.allow_pickle and not (folder.has(WEIGHTS) or folder.has(INDEX)) and folder.has(PICKLE):
        folder = _Pickled(path, folder.used, allowed=asked.allow_pickle)
    dtype = FLOATS[asked.dtype or "float32"]
    form = Form(dtype, cached=asked.layout == "cached", lazy=True, task=asked.task)
    parts = {ONNX_FILE: build(config, folder, form)}
    cached = keeps_cache(parts[ONNX_FILE])
    if cached and asked.task is not None:
        raise UsageError(f"a decoder has no head {asked.task!r}", where=source, hint="leave --task out")
    if cached:
        parts |= {name: part(config, folder, form) for name, part in _further(config["model_type"])}
    vocabulary = config.get("vocab_size")
    vocabulary = vocabulary if isinstance(vocabulary, int) else None
    if vocabulary is not None:
        check_vocabulary(folder, vocabulary)
    files = list(dict.fromkeys(folder.used))
    return Origin(
        door="qexport",
        info=describe(path, files, parts[ONNX_FILE]),
        parts=parts,
        reference=find_reference(config, folder, form),
        told="the definition of the model in numpy, on the weights of the folder",
        dtype=dtype,
        family=config["model_type"],
        task=asked.task,
        vocabulary=vocabulary,
        companions=find_companions(path),
    )


def _further(family: str) -> Iterator[tuple[str, Any]]:
    for name, home in PARTS.get(family, {}).items():
        module, _, function = home.partition(":")
        yield name, getattr(importlib.import_module(module), function)


class _Pickled(Folder):
    """A folder whose weights are a pickle that a person has allowed; it is read as numbers alone."""

    def __init__(self, path: Path, used: list[Path], *, allowed: bool) -> None:
        super().__init__(path)
        self.used += used
        self._held: dict[str, Stored] | None = None
        self._allowed = allowed

    def weights(self, anchor: str) -> Weights:
        """A reader of the tensors in the pickle."""
        file = self.file(PICKLE)
        if self._held is None:
            arrays = read_pickled(file, allow_pickle=self._allowed)
            self._held = {name: _stored(array, file) for name, array in arrays.items()}
        return Weights(self._held, anchor, str(file))


def _stored(array: NDArray[Any], file: Path) -> Stored:
    kind = _KINDS.get(array.dtype, array.dtype.name)
    return Stored(array.shape, kind, partial(np.asarray, array), str(file))
