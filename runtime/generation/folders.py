"""Folders that ``export`` and ``build`` write, opened for generation: what is in them is what their manifest says."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexport.errors import DataInvalid, IntegrityError, QexportError, UsageError
from qexport.runtime.accounting.profiles import FILE as TIMES
from qexport.runtime.tokenizing import Tokenizer
from qexport.safe_io import open_beneath, read_bytes

MODEL, MANIFEST, SCHEMA = "model.onnx", "manifest.json", "qexport.manifest/"
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


def read_folder(path: Path, *, verify: bool = True) -> Folder:
    """Read settings and tokenizer.

    Args:
        path: The folder.
        verify: Whether to hold every file against the digest in the manifest.

    Raises:
        UsageError: No such folder, or no export in it.
        IntegrityError: A file is not the one that was published.
        DataInvalid: There is no tokenizer, or settings that cannot be read.
    """
    demand_export(path)
    if verify:
        verify_files(path)
    settings = [_read_settings(path / name) for name in ("generation_config.json", "config.json")]
    tokenizer, words = Tokenizer.load(path), _read_settings(path / "tokenizer_config.json")
    ends = next((found for told in settings if (found := _ids(told.get("eos_token_id")))), frozenset())
    end = _name(words.get("eos_token"))
    if not ends and end is not None and (known := tokenizer.token(end)) is not None:
        ends = frozenset({known})
    return Folder(path, tokenizer, ends, _name(words.get("bos_token")))


def demand_export(path: Path) -> None:
    """Raise :class:`UsageError` unless there is a graph with a manifest."""
    where = str(path)
    if not os.path.isdir(path):
        raise UsageError("no such folder", where=where, hint=f"give a folder of a model; {_MAKE}")
    for name in (MODEL, MANIFEST):
        if not os.path.isfile(path / name):
            source = name == MODEL and os.path.isfile(path / "config.json")
            hint = f"qexport export {where} -o DIR makes one of it" if source else _MAKE
            raise UsageError(f"no {name} in it", where=where, hint=hint)


def verify_files(path: Path) -> None:
    """Hold every file of the manifest against its digest; times may be measured anew, and change nothing but speed.

    Raises:
        IntegrityError: One is missing, or not the one that was published.
    """
    for name, record in _published(path).items():
        if name == TIMES:
            continue
        where = str(path / name)
        try:
            expected = record["bytes"], record["digest"]
        except (TypeError, KeyError) as error:
            raise _damaged(path) from error
        try:
            found = _measure(path, name)
        except QexportError as error:
            raise IntegrityError(f"cannot be read: {error.what}", where=where, hint="publish it again") from error
        if found != expected:
            what = f"not the file that was published: {found[0]} bytes with {found[1]}, the manifest says {expected}"
            raise IntegrityError(what, where=where, hint="publish it again; nothing in the folder is to be edited")


def _published(path: Path) -> Mapping[str, Any]:
    try:
        manifest = json.loads(read_bytes(path / MANIFEST, limit=MOST_JSON))
        files = manifest["files"]
        if not str(manifest["schema"]).startswith(SCHEMA) or MODEL not in files:
            raise _damaged(path)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(path) from error
    found: Mapping[str, Any] = files
    return found


def _damaged(path: Path) -> IntegrityError:
    return IntegrityError("not a manifest of qexport's, or damaged", where=str(path / MANIFEST), hint=_MAKE)


def _measure(path: Path, name: str) -> tuple[int, str]:
    """Bytes and digest of a file, read in pieces."""
    with open_beneath(path, name) as file:
        return os.fstat(file.fileno()).st_size, f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


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
