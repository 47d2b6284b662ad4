"""What can be compared: an artefact folder, a model, or the ``result.json`` of a build."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
from pydantic import ValidationError

from qexport.errors import UsageError
from qexport.exporter.admit import Limits
from qexport.exporter.load import ONNX_FILE, load_source
from qexport.exporter.outcome.receipt import MANIFEST
from qexport.exporter.outcome.result import Result
from qexport.runtime.backends.artefact import Artefact, check_files, open_artefact
from qexport.safe_io import open_beneath, read_bytes

RESULT = "result.json"
DIGEST = 19  # characters of a digest that are told
_MOST = 1 << 28  # bytes of a result
_ANY_NUMBERS = Limits(allow_nonfinite=True)  # nothing is run here


@dataclass(frozen=True)
class Side:
    """One side of a comparison; whatever it does not have is not compared.

    Attributes:
        path: What the person named.
        result: What its build found out.
        model: Its graph.
        engine: What is known of its engine.
        tools: Versions of what made it.
        data: Digests of its samples, ``calibration`` and ``evaluation``, as far as the manifest tells.
        bytes: Of the model with all its files.
    """

    path: str
    result: Result | None = None
    model: ir.Model | None = None
    engine: Mapping[str, Any] | None = None
    tools: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    bytes: int | None = None


def open_side(path: str | Path) -> Side:
    """Open an artefact folder, whose digests must hold, an .onnx file, a Hugging Face folder, or a ``result.json``.

    Raises:
        UsageError: There is nothing, or a JSON file that no build of this version wrote.
        IntegrityError: A file of an artefact is not the one that was written.
        ModelInvalid: The model breaks the rules.
    """
    place = Path(path)
    if not os.path.exists(path):
        hint = "give a folder of qexport build, an .onnx file, or a result.json"
        raise UsageError("no such file or folder", where=str(place), hint=hint)
    if place.suffix == ".json" and place.is_file():
        return side_of(read_result(read_bytes(place, limit=_MOST), str(place)), str(place))
    if (place / MANIFEST).is_file():
        return _open_artefact(open_artefact(place))
    source = load_source(place, _ANY_NUMBERS)
    return Side(str(place), model=source.model, bytes=source.info.bytes)


def side_of(result: Result, path: str = "") -> Side:
    """The side of a result without its graph."""
    engine = None if result.engine is None else result.engine.model_dump(mode="json")
    return Side(path or result.directory, result, engine=engine, bytes=result.bytes_after)


def read_result(text: bytes, where: str) -> Result:
    """Read a ``result.json``; ``UsageError`` where it is none of this version's."""
    try:
        return Result.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        what = (
            f"not a result that this version reads: {place}: {first['msg']}" if place else "not the result of a build"
        )
        raise UsageError(what, where=where, hint="give the model itself, an .onnx file") from error


def _open_artefact(artefact: Artefact) -> Side:
    folder, result, model = artefact.folder, None, None
    if RESULT in artefact.files:
        check_files(artefact, RESULT)
        with open_beneath(folder, RESULT) as file:
            result = read_result(file.read(_MOST), str(folder / RESULT))
    if ONNX_FILE in artefact.files:
        check_files(artefact, ONNX_FILE)
        model = load_source(folder / ONNX_FILE, _ANY_NUMBERS).model
    sizes = [int(record["bytes"]) for name, record in artefact.files.items() if name.startswith(ONNX_FILE)]
    tools = artefact.manifest.get("tools")
    return Side(
        str(folder),
        result,
        model,
        artefact.engine,
        tools if isinstance(tools, dict) else {},
        _samples(artefact.manifest.get("replay")),
        sum(sizes) or None,
    )


def _samples(replay: object) -> dict[str, str]:
    """Digests of the data by what it was for; a build without evaluation data is judged on its calibration data."""
    given = replay if isinstance(replay, dict) else {}
    found = {name: entry.get("digest", "") for name in ("calib", "eval") if isinstance(entry := given.get(name), dict)}
    calib = str(found.get("calib", ""))
    return {"calibration": calib, "evaluation": str(found.get("eval", "")) or calib} if found else {}
