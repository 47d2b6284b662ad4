"""The front door: an .onnx file or a Hugging Face folder becomes one ``onnx_ir.Model``; the source is never changed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from pydantic import ValidationError

from qexport.errors import ModelInvalid, UsageError
from qexport.exporter.admit import Limits
from qexport.exporter.onnx_file import load_onnx
from qexport.exporter.result import SourceInfo
from qexport.safe_io import digest_bytes, digest_file, read_bytes

FAMILIES = {"bert": "qexport.exporter.families.bert:build"}
"""``model_type`` of config.json to the function ``(config, weights path) -> Model`` that builds the graph."""

CONFIG, WEIGHTS = "config.json", "model.safetensors"
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
"""Files that travel with the model to the artefact, where the source has them."""


@dataclass(frozen=True, slots=True)
class Source:
    """A loaded model and what is known of its origin.

    Attributes:
        path: What the person named.
        model: The graph as it came.
        info: Path, digest, sizes.
        companions: Tokenizer files beside it.
    """

    path: Path
    model: ir.Model
    info: SourceInfo
    companions: tuple[Path, ...]

    @property
    def tokenizer(self) -> Path | None:
        """The ``tokenizer.json`` that came with the model."""
        return next((path for path in self.companions if path.name == COMPANIONS[0]), None)


def load_model(path: str | Path) -> ir.Model:
    """Return the model of an .onnx file or a Hugging Face folder."""
    return load_source(path).model


def load_source(path: str | Path, limits: Limits | None = None) -> Source:
    """Load a model with its companions.

    Raises:
        UsageError: Nothing there, or neither an .onnx file nor a Hugging Face folder.
        ModelInvalid: The model breaks the rules, or its family is unknown.
        UnsafeInput: It reaches outside its folder.
    """
    place = Path(path)
    if not place.exists():
        raise UsageError("no such file or folder", where=str(place), hint="give an .onnx file or a Hugging Face folder")
    folder = place if place.is_dir() else place.parent
    model, files = _load_folder(place) if place.is_dir() else (load_onnx(place, limits), _model_files(place))
    digests = [digest_file(file) for file in files]
    info = SourceInfo(
        path=str(place),
        digest=digests[0] if len(digests) == 1 else digest_bytes("\n".join(digests).encode()),
        bytes=sum(file.stat().st_size for file in files),
        nodes=sum(1 for _ in model.graph.all_nodes()),
        parameters=_parameters(model),
    )
    return Source(place, model, info, tuple(folder / name for name in COMPANIONS if (folder / name).is_file()))


def _load_folder(folder: Path) -> tuple[ir.Model, list[Path]]:
    files = [folder / CONFIG, folder / WEIGHTS]
    for file in files:
        if not file.is_file():
            raise UsageError(
                f"the folder has no {file.name}", where=str(folder), hint="a Hugging Face folder has both, unsplit"
            )
    try:
        config = json.loads(read_bytes(files[0], limit=1 << 20))
    except ValueError as error:
        raise ModelInvalid(f"not JSON: {error}", where=str(files[0])) from error
    build = _family(config, files[0])
    try:
        return build(config, files[1]), files
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "(all)"
        raise ModelInvalid(f"field {field!r}: {first['msg'].lower()}", where=str(files[0])) from error


def _family(config: Any, where: Path) -> Callable[[dict[str, object], Path], ir.Model]:
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in FAMILIES:
        raise ModelInvalid(
            f"unknown model_type {kind!r}",
            where=str(where),
            hint=f"known: {', '.join(FAMILIES)}; export other models to .onnx with their own tools",
        )
    module, _, name = FAMILIES[kind].partition(":")
    found: Callable[[dict[str, object], Path], ir.Model] = getattr(importlib.import_module(module), name)
    return found


def _model_files(path: Path) -> list[Path]:
    """The file and the external data beside it, as admission accepted them."""
    import onnx

    proto = onnx.load(path, load_external_data=False)
    places = {entry.value for t in proto.graph.initializer for entry in t.external_data if entry.key == "location"}
    return [path, *(path.parent / place for place in sorted(places))]


def _parameters(model: ir.Model) -> int:
    return sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value is not None)
