"""The doors that lead through torch: a module of somebody's code, or a folder by way of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.calibration.reading.arrays import read_members
from qexport.calibration.reading.data import DataSpec, InputSpec, open_dataset
from qexport.errors import UsageError
from qexport.exporter.doors.inputs import AskedInput, parse_inputs
from qexport.exporter.doors.origin import Origin, type_of
from qexport.exporter.doors.safe_folder import files_of
from qexport.exporter.doors.torch_modules.module import TorchOptions, TorchSource, load_torch
from qexport.exporter.load import ONNX_FILE, count_parameters, describe, digests_of, find_companions
from qexport.exporter.options import ExportOptions
from qexport.exporter.outcome.result import SourceInfo
from qexport.safe_io import digest_bytes

_ROWS = 8


def open_module(source: str, asked: ExportOptions, _scratch: Path) -> Origin:
    """Run ``module:callable`` and export what it returns; the module itself is the truth.

    Raises:
        QexportError: As ``load_torch``; ``UsageError`` for options that a module has no use for.
    """
    _demand_plain(source, asked)
    if asked.task is not None:
        raise UsageError("a torch module has the head that it has", where=source, hint="leave --task out")
    found = load_torch(source, _options(asked))
    return _origin("torch", found, _described(source, found), ())


def open_folder_in_torch(source: str, asked: ExportOptions, _scratch: Path) -> Origin:
    """Load a Hugging Face folder in transformers and export the module.

    Raises:
        QexportError: As ``load_transformers``.
    """
    from qexport.exporter.doors.torch_modules.transformers_folder import load_transformers

    _demand_plain(source, asked)
    path = Path(source)
    found = load_transformers(path, asked.task, _options(asked))
    return _origin("torch", found, describe(path, digests_of(files_of(path)), found.model), find_companions(path))


def _origin(door: str, found: TorchSource, info: SourceInfo, companions: tuple[Path, ...]) -> Origin:
    return Origin(
        door=door,
        info=info,
        parts={ONNX_FILE: found.model},
        reference=found.reference,
        told="the torch module itself",
        dtype=type_of(found.model),
        companions=companions,
        trials=found.trials,
        notes=found.notes,
    )


def _demand_plain(source: str, asked: ExportOptions) -> None:
    if asked.dtype not in (None, "float32"):
        hint = f"export first, then qexport build --recipe {asked.dtype}"
        raise UsageError(f"torch modules are not exported in {asked.dtype}", where=source, hint=hint)
    if asked.text is not None:
        raise UsageError("torch modules are verified on arrays", where=source, hint="give them with --data")


def _options(asked: ExportOptions) -> TorchOptions:
    inputs = parse_inputs(asked.inputs)
    return TorchOptions(inputs=inputs, data={} if asked.data is None else _arrays(asked.data, inputs))


def _arrays(path: Path, inputs: tuple[AskedInput, ...]) -> Mapping[str, NDArray[Any]]:
    """A batch of the first samples."""
    if not inputs:
        return {name: np.stack(list(islice(member.rows(), _ROWS))) for name, member in read_members(path).items()}
    specs = tuple(
        InputSpec(one.name, one.dtype, tuple(dim if isinstance(dim, int) else None for dim in one.shape))
        for one in inputs
    )
    samples = list(islice(open_dataset(path, specs, DataSpec()), _ROWS))
    return {one.name: np.stack([sample[one.name] for sample in samples]) for one in inputs}


def _described(source: str, found: TorchSource) -> SourceInfo:
    """A module has no file that all of it is in; its digest is that of its weights."""
    weights = {name: value.const_value for name, value in found.model.graph.initializers.items()}
    digests = [digest_bytes(tensor.tobytes()) for _, tensor in sorted(weights.items()) if tensor is not None]
    return SourceInfo(
        path=source,
        digest=digest_bytes("\n".join(digests).encode()),
        bytes=sum(tensor.nbytes for tensor in weights.values() if tensor is not None),
        nodes=sum(1 for _ in found.model.graph.all_nodes()),
        parameters=count_parameters(found.model),
    )
