"""A Hugging Face folder: which of its files make the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qexport.errors import ModelInvalid, UnsafeInput, UsageError
from qexport.exporter.families.weights import Stored, Weights, read_headers
from qexport.safe_io import demand_inside, read_bytes

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

_MOST_JSON = 8 << 20


class Folder:
    """The files of one folder.

    Attributes:
        path: The folder.
        used: The files that were asked for, in that order; together they are the model.
        finite: Whether weights with NaN or infinity are refused.
    """

    def __init__(self, path: Path, *, finite: bool = True) -> None:
        self.path = path
        self.used: list[Path] = []
        self.finite = finite

    def has(self, name: str) -> bool:
        """Whether there is something of this name; ``file`` tells whether it is a file."""
        return os.path.lexists(self.path / name)

    def file(self, name: str) -> Path:
        """A file that the model is made of.

        Raises:
            UsageError: It is missing.
            UnsafeInput: It lies outside of the folder, see ``demand_inside``; or it is a FIFO, a device or a folder.
        """
        file = self.path / name
        demand_inside(file, self.path)
        if not os.path.isfile(file):
            if os.path.exists(file):
                raise UnsafeInput("not a regular file", where=str(file), hint="FIFOs, devices and folders are not read")
            hint = f"a Hugging Face folder has {CONFIG} and {WEIGHTS}"
            raise UsageError(f"the folder has no {name}", where=str(self.path), hint=hint)
        self.used.append(file)
        return file

    def json(self, name: str) -> Any:
        """The content of a JSON file; ``ModelInvalid`` when it is none, or says something twice."""
        file = self.file(name)
        try:
            return json.loads(read_bytes(file, limit=_MOST_JSON), object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise ModelInvalid(f"not JSON: {error}", where=str(file)) from error

    def weights(self, anchor: str) -> Weights:
        """A reader of the tensors in ``model.safetensors``, or in the files that its index lists.

        Raises:
            UsageError: No weights at all.
            UnsafeInput: They are a pickle, or lie outside of the folder.
            ModelInvalid: A file is missing or broken, or does not hold what the index says.
        """
        if self.has(INDEX) and not self.has(WEIGHTS):
            return Weights(self._sharded(), anchor, str(self.path / INDEX), finite=self.finite)
        pickle = None if self.has(WEIGHTS) else next((name for name in PICKLES if self.has(name)), None)
        if pickle is not None:
            hint = "save them as safetensors: model.save_pretrained(folder)"
            raise UnsafeInput(
                f"the weights are a pickle, which is not read ({pickle})", where=str(self.path), hint=hint
            )
        return Weights(read_headers([self.file(WEIGHTS)]), anchor, str(self.path / WEIGHTS), finite=self.finite)

    def _sharded(self) -> dict[str, Stored]:
        """The tensors of all files that the index names, each in the file where it says so."""
        index, where = self.json(INDEX), str(self.path / INDEX)
        placed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
            raise ModelInvalid("there is no weight_map from tensors to files", where=where, hint="save the model again")
        names = sorted(set(placed.values()))
        for name in names:
            demand_inside(self.path / name, self.path)
        lost = [name for name in names if not os.path.exists(self.path / name)]
        if lost:
            hint = "download the folder again; every file that the index names is needed"
            raise ModelInvalid(
                f"{len(lost)} of {len(names)} weight files are missing: {', '.join(lost[:4])}", where=where, hint=hint
            )
        found = read_headers([self.file(name) for name in names])
        for tensor, name in placed.items():
            if tensor not in found or found[tensor].where != str(self.path / name):
                hint = "the files are of different downloads or saves: fetch the folder again"
                raise ModelInvalid(f"{name} has no tensor {tensor!r}, as the index says", where=where, hint=hint)
        return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary of pairs; two readers could take a setting that is there twice for either value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


_CODE = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Where transformers looks for ``auto_map``, beside config.json."""


def demand_no_code(folder: Path, config: Any) -> None:
    """Raise ``UnsafeInput`` where transformers would run Python files of the folder or of the hub."""
    names = [name for name in _CODE if os.path.lexists(folder / name)]
    for name, settings in [(CONFIG, config), *((name, Folder(folder).json(name)) for name in names)]:
        if isinstance(settings, dict) and settings.get("auto_map"):
            hint = "if the family needs none of it, take auto_map out of the file; or hand over a torch module"
            what = f"{name} asks to run code that came with the model (auto_map), which never happens"
            raise UnsafeInput(what, where=str(folder / name), hint=hint)


def architecture(config: Mapping[str, Any]) -> str:
    """The class that the model was saved as; empty where the config does not tell."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""
