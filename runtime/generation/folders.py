"""Folders that ``export`` and ``build`` write, opened for generation: what is in them is what their manifest says."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexport.errors import DataInvalid, UsageError
from qexport.runtime.backends.artefact import MANIFEST, MODEL, PLAN, check_files, open_artefact
from qexport.runtime.tokenizing import FILE as TOKENIZER
from qexport.runtime.tokenizing import Tokenizer
from qexport.safe_io import read_bytes

CONFIG, GENERATION, WORDS = "config.json", "generation_config.json", "tokenizer_config.json"
MOST_JSON = 16 << 20  # bytes
_MAKE = "write it with qexport export or build"


@dataclass(frozen=True, slots=True)
class Folder:
    """What a folder says beside its graph.

    Attributes:
        path: Where it is.
        tokenizer: That of the model.
        ends: Tokens that end an output, as the model's settings name them.
        begin: The token that its texts begin with, by name, where it has one.
    """

    path: Path
    tokenizer: Tokenizer
    ends: frozenset[int]
    begin: str | None


def read_folder(path: Path) -> Folder:
    """Read settings and tokenizer, if they are what the manifest says.

    Raises:
        UsageError: No such folder, or no export in it.
        UnsafeInput: There is no manifest.
        IntegrityError: A file is not the one that was published.
        DataInvalid: There is no tokenizer, or settings that cannot be read.
    """
    demand_export(path)
    artefact = open_artefact(path)
    for name in (TOKENIZER, GENERATION, CONFIG, WORDS):
        if name in artefact.files:
            check_files(artefact, name)
    tokenizer, words = Tokenizer.load(path), _read_settings(path / WORDS)
    settings = [_read_settings(path / name) for name in (GENERATION, CONFIG)]
    ends = next((found for told in settings if (found := _ids(told.get("eos_token_id")))), frozenset())
    end = _name(words.get("eos_token"))
    if not ends and end is not None and (known := tokenizer.token(end)) is not None:
        ends = frozenset({known})
    return Folder(path, tokenizer, ends, _name(words.get("bos_token")))


def demand_export(path: Path) -> None:
    """Raise :class:`UsageError` where there is nothing to be run."""
    where = str(path)
    if not os.path.isdir(path):
        raise UsageError("no such folder", where=where, hint=f"give a folder of a model; {_MAKE}")
    if not any(os.path.isfile(path / name) for name in (MODEL, PLAN, MANIFEST)):
        hint = f"qexport export {where} -o DIR makes one of it" if os.path.isfile(path / CONFIG) else _MAKE
        raise UsageError(f"no {MODEL} in it", where=where, hint=hint)


def _read_settings(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        told = json.loads(read_bytes(path, limit=MOST_JSON))
    except (ValueError, RecursionError) as error:
        raise DataInvalid("not JSON", where=str(path)) from error
    if not isinstance(told, dict):
        raise DataInvalid(f"a JSON {type(told).__name__}, expected an object", where=str(path))
    return told


def _ids(told: object) -> frozenset[int]:
    listed = told if isinstance(told, list) else [told]
    return frozenset(one for one in listed if type(one) is int and one >= 0)


def _name(told: object) -> str | None:
    """A token by name, which some write as an object."""
    found = told.get("content") if isinstance(told, dict) else told
    return found if isinstance(found, str) else None
