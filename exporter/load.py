"""The front door: an .onnx file or a Hugging Face folder becomes one ``onnx_ir.Model``; the source is never changed."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import onnx_ir as ir
from pydantic import ValidationError

from qexport.errors import ModelInvalid, UsageError
from qexport.exporter.admit import Limits
from qexport.exporter.families.builder import COPY
from qexport.exporter.families.folder import (
    CONFIG,
    INDEX,
    TOKENIZER,
    WEIGHTS,
    Folder,
    architecture,
    demand_no_code,
)
from qexport.exporter.families.form import SCORING, Form
from qexport.exporter.families.settings import misfit
from qexport.exporter.onnx_file import NOTES, read_onnx
from qexport.exporter.outcome.result import SourceInfo
from qexport.safe_io import check_blob, demand_inside, digest_bytes, digest_file

ONNX_FILE = "model.onnx"  # as in an artefact of ours, or in a folder that another exporter wrote
ENCODER_FILE = "encoder.onnx"  # beside it, where a decoder reads what an encoder found

FAMILIES = {
    "bert": "qexport.exporter.families.bert:build",
    "bitnet": "qexport.exporter.families.bitnet:build",
    "camembert": "qexport.exporter.families.roberta:build",
    "distilbert": "qexport.exporter.families.distilbert:build",
    "gpt2": "qexport.exporter.families.gpt2:build",
    "llama": "qexport.exporter.families.llama:build",
    "mistral": "qexport.exporter.families.mistral:build",
    "mt5": "qexport.exporter.families.t5:build",
    "qwen2": "qexport.exporter.families.qwen2:build",
    "qwen3": "qexport.exporter.families.qwen3:build",
    "roberta": "qexport.exporter.families.roberta:build",
    "t5": "qexport.exporter.families.t5:build",
    "vit": "qexport.exporter.families.vit:build",
    "xlm-roberta": "qexport.exporter.families.roberta:build",
}
"""``model_type`` of config.json to the function ``(config, folder) -> Model`` that builds the graph."""

PARTS = {kind: {ENCODER_FILE: "qexport.exporter.families.t5:build_encoder"} for kind in ("mt5", "t5")}
"""``model_type`` to further files of the portable layout and what builds them, as in ``FAMILIES``."""

COMPANIONS = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "generation_config.json",
    CONFIG,
)
"""Files that travel with the model to the artefact, where the source has them."""

Builder: TypeAlias = Callable[[dict[str, Any], Folder, Form], ir.Model]


@dataclass(frozen=True, slots=True)
class Source:
    """A loaded model and what is known of its origin.

    Attributes:
        path: What the person named.
        model: The graph as it came.
        info: Path, digest, sizes.
        companions: Files beside it, of tokenizer and preparation.
    """

    path: Path
    model: ir.Model
    info: SourceInfo
    companions: tuple[Path, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done about the file when it was read, for a report."""
        return tuple(self.model.meta.get(NOTES, ()))

    @property
    def tokenizer(self) -> Path | None:
        """The ``tokenizer.json`` that came with the model."""
        return find_tokenizer(self.companions)


def load_model(path: str | Path) -> ir.Model:
    """Return the model of an .onnx file or a Hugging Face folder."""
    return load_source(path).model


def load_source(path: str | Path, limits: Limits | None = None, *, cached: bool = False) -> Source:
    """Load a model with its companions; a folder with ``model.onnx`` and no safetensors means that file.

    ``cached`` gives decoders of a Hugging Face folder the portable layout, where one graph is all of them.

    Raises:
        UsageError: Nothing there, or neither an .onnx file nor a Hugging Face folder.
        ModelInvalid: The model breaks the rules, or its family is unknown.
        UnsafeInput: It reaches outside its folder; links of a Hugging Face cache to its own blobs are fine.
        IntegrityError: A file of such a cache is not what its name says.
    """
    place = Path(path)
    if not os.path.exists(path):
        raise UsageError("no such file or folder", where=str(place), hint="give an .onnx file or a Hugging Face folder")
    if (place / ONNX_FILE).is_file() and not any((place / name).exists() for name in (WEIGHTS, INDEX)):
        place /= ONNX_FILE
    folder = place if place.is_dir() else place.parent
    model, digests = _load_folder(place, limits, cached=cached) if place.is_dir() else _load_file(place, limits)
    return Source(place, model, describe(place, digests, model), find_companions(folder))


def find_companions(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that travel with its model.

    Raises:
        UnsafeInput: One leads out of the folder.
        IntegrityError: One is in a Hugging Face cache, and not what its name says.
    """
    companions = tuple(folder / name for name in COMPANIONS if (folder / name).is_file())
    for companion in companions:
        demand_inside(companion, folder)
        check_blob(companion)
    return companions


def find_tokenizer(companions: Iterable[Path]) -> Path | None:
    """The ``tokenizer.json`` among the files that travel with a model."""
    return next((path for path in companions if path.name == TOKENIZER), None)


def digests_of(files: Iterable[Path]) -> dict[Path, str]:
    """The digest of each file; ``IntegrityError`` where one of a Hugging Face cache is not what its name says."""
    digests = {file: digest_file(file) for file in files}
    for file, digest in digests.items():
        check_blob(file, digest)
    return digests


def describe(place: Path, digests: Mapping[Path, str], model: ir.Model) -> SourceInfo:
    """Path, digest and sizes of a model that was read from files of these digests."""
    first, *others = digests.values()
    return SourceInfo(
        path=str(place),
        digest=digest_bytes("\n".join((first, *others)).encode()) if others else first,
        bytes=sum(file.stat().st_size for file in digests),
        nodes=sum(1 for _ in model.graph.all_nodes()),
        parameters=count_parameters(model),
    )


def _load_file(path: Path, limits: Limits | None) -> tuple[ir.Model, dict[Path, str]]:
    model, mapped = read_onnx(path, limits)
    # of what is mapped, as the names may lead somewhere else by now
    external = {path.parent / location: digest_bytes(area) for location, area in mapped.items()}
    return model, digests_of([path]) | dict(sorted(external.items()))


def _load_folder(path: Path, limits: Limits | None, *, cached: bool) -> tuple[ir.Model, dict[Path, str]]:
    config, folder, build = open_folder(path)
    folder.finite = not (limits or Limits()).allow_nonfinite
    form = replace(SCORING, cached=cached and config["model_type"] not in PARTS)
    return build(config, folder, form), digests_of(folder.used)


def open_folder(path: Path) -> tuple[dict[str, Any], Folder, Builder]:
    """Read the settings of a Hugging Face folder and find what builds its graph; the weights are still to be read.

    Raises:
        ModelInvalid: An unknown family, a head that it does not build, or weights that are no plain floats.
        UnsafeInput: The folder comes with code of its own.
        UsageError: There is no config.json.
    """
    folder, where = Folder(path), path / CONFIG
    config = folder.json(CONFIG)
    if not isinstance(config, dict):
        raise ModelInvalid("not a dictionary of settings", where=str(where))
    demand_no_code(path, config)
    if config.get("quantization_config"):
        hint = "start from the checkpoint that the weights were quantized from; recipes quantize it anew"
        raise ModelInvalid("the weights are quantized (quantization_config)", where=str(where), hint=hint)
    return config, folder, _family(config, where)


def _family(config: dict[str, Any], where: Path) -> Builder:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        near = difflib.get_close_matches(kind, FAMILIES, n=1) if isinstance(kind, str) else []
        raise ModelInvalid(
            f"unknown model_type {kind!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            where=str(where),
            hint=f"known: {', '.join(FAMILIES)}; export other models to .onnx with their own tools",
        )
    name, _, function = FAMILIES[kind].partition(":")
    module = importlib.import_module(name)
    built, asked = getattr(module, "ARCHITECTURES", None), architecture(config)
    if built and asked and asked not in built:
        what = f"architectures: {asked!r} is not built from model_type {kind!r}"
        raise ModelInvalid(what, where=str(where), hint=f"built: {', '.join(built)}")
    return partial(_build, getattr(module, function), where)


def _build(build: Builder, where: Path, config: dict[str, Any], folder: Folder, form: Form) -> ir.Model:
    """Build, and say of settings that are refused where they stand."""
    try:
        return build(config, folder, form)
    except ValidationError as error:
        raise misfit(error, str(where)) from error


def count_parameters(model: ir.Model) -> int:
    """Elements of all initializers, copies of others left out."""
    values = (value for graph in model.graphs() for value in graph.initializers.values() if COPY not in value.meta)
    return sum(value.const_value.size for value in values if value.const_value is not None)
