"""The front door: an .onnx file or a Hugging Face folder becomes one ``onnx_ir.Model``; the source is never changed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from pydantic import ValidationError

from qexport.errors import ModelInvalid, UsageError
from qexport.exporter.admit import Limits
from qexport.exporter.families.builder import COPY
from qexport.exporter.families.folder import CONFIG, INDEX, WEIGHTS, Folder, check_blob, demand_inside
from qexport.exporter.families.form import SCORING, Form
from qexport.exporter.onnx_file import read_onnx
from qexport.exporter.result import SourceInfo
from qexport.safe_io import digest_bytes, digest_file

FAMILIES = {
    "bert": "qexport.exporter.families.bert:build",
    "gpt2": "qexport.exporter.families.gpt2:build",
    "llama": "qexport.exporter.families.llama:build",
}
"""``model_type`` of config.json to the function ``(config, folder) -> Model`` that builds the graph."""

ONNX_FILE = "model.onnx"  # as in an artefact of ours, or in a folder that another exporter wrote
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "chat_template.jinja",
    "generation_config.json",
)
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
    """Load a model with its companions; a folder with ``model.onnx`` and no safetensors means that file.

    Raises:
        UsageError: Nothing there, or neither an .onnx file nor a Hugging Face folder.
        ModelInvalid: The model breaks the rules, or its family is unknown.
        UnsafeInput: It reaches outside its folder; links of a Hugging Face cache to its own blobs are fine.
        IntegrityError: A file of such a cache is not what its name says.
    """
    place = Path(path)
    if not place.exists():
        raise UsageError("no such file or folder", where=str(place), hint="give an .onnx file or a Hugging Face folder")
    if (place / ONNX_FILE).is_file() and not any((place / name).exists() for name in (WEIGHTS, INDEX)):
        place /= ONNX_FILE
    folder = place if place.is_dir() else place.parent
    model, files = _load_folder(place) if place.is_dir() else _load_file(place, limits)
    companions = tuple(folder / name for name in COMPANIONS if (folder / name).is_file())
    for companion in companions:
        demand_inside(companion, folder)
    digests = [digest_file(file) for file in files]
    if place.is_dir():
        for file, digest in zip(files, digests, strict=True):
            check_blob(file, digest)
    info = SourceInfo(
        path=str(place),
        digest=digests[0] if len(digests) == 1 else digest_bytes("\n".join(digests).encode()),
        bytes=sum(file.stat().st_size for file in files),
        nodes=sum(1 for _ in model.graph.all_nodes()),
        parameters=_parameters(model),
    )
    return Source(place, model, info, companions)


def _load_file(path: Path, limits: Limits | None) -> tuple[ir.Model, list[Path]]:
    model, external = read_onnx(path, limits)
    return model, [path, *sorted({path.parent / location for location in external})]


def _load_folder(path: Path) -> tuple[ir.Model, list[Path]]:
    folder, where = Folder(path), path / CONFIG
    config = folder.json(CONFIG)
    build = _family(config, where)
    try:
        return build(config, folder, SCORING), folder.used
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "(all)"
        raise ModelInvalid(f"field {field!r}: {first['msg'].lower()}", where=str(where)) from error


def _family(config: Any, where: Path) -> Callable[[dict[str, object], Folder, Form], ir.Model]:
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in FAMILIES:
        raise ModelInvalid(
            f"unknown model_type {kind!r}",
            where=str(where),
            hint=f"known: {', '.join(FAMILIES)}; export other models to .onnx with their own tools",
        )
    module, _, name = FAMILIES[kind].partition(":")
    found: Callable[[dict[str, object], Folder, Form], ir.Model] = getattr(importlib.import_module(module), name)
    return found


def _parameters(model: ir.Model) -> int:
    values = (value for graph in model.graphs() for value in graph.initializers.values() if COPY not in value.meta)
    return sum(value.const_value.size for value in values if value.const_value is not None)
