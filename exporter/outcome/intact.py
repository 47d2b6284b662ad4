"""The files of an artefact: are they those that were written, and those that a second build writes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from qexport.errors import IntegrityError, ModelInvalid
from qexport.exporter.load import COMPANIONS, ONNX_FILE
from qexport.exporter.outcome.receipt import MANIFEST
from qexport.runtime.backends.artefact import Artefact
from qexport.safe_io import digest_file, open_beneath

REPLAYED = (ONNX_FILE, *COMPANIONS)
"""Files whose bytes follow from the inputs, with all whose names go on after a full stop (external data). The others
hold measured times, or are made by an engine builder that measures."""


class FileCheck(BaseModel):
    """One file of an artefact.

    Attributes:
        name: In the folder.
        digest: What the manifest says; empty for a file that it does not list.
        found: What was found: in the folder, or in the replay where the file was replayed.
        verdict: ``intact`` is the file that was written; ``same`` was also built again with the same bytes,
            ``differs`` with other ones; ``missing`` and ``new`` are in one of both alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    digest: str
    found: str
    verdict: Literal["intact", "same", "differs", "missing", "new"]


def check_folder(artefact: Artefact) -> tuple[tuple[FileCheck, ...], tuple[str, ...]]:
    """Compare every file with the manifest; returns the files, and a note for each that is not listed.

    Raises:
        IntegrityError: Files are missing or not those that were written; all are named.
    """
    checks = [_check_file(artefact, name, record) for name, record in artefact.files.items()]
    bad = [f"{check.name} ({check.verdict})" for check in checks if check.verdict != "intact"]
    if bad:
        what = f"{len(bad)} of {len(checks)} files are not those that were written: {', '.join(bad)}"
        raise IntegrityError(what, where=str(artefact.folder), hint="take a good copy, or build it again")
    known = {MANIFEST, *artefact.files}
    strangers = sorted(entry.name for entry in os.scandir(artefact.folder) if entry.name not in known)
    return tuple(checks), tuple(f"the manifest does not list {name!r}" for name in strangers)


def _check_file(artefact: Artefact, name: str, record: object) -> FileCheck:
    digest = record.get("digest") if isinstance(record, dict) else None
    if not isinstance(digest, str):
        raise IntegrityError("the manifest is not one of qexport's", where=str(artefact.folder / MANIFEST))
    try:
        open_beneath(artefact.folder, name).close()
    except ModelInvalid:
        return FileCheck(name=name, digest=digest, found="", verdict="missing")
    found = digest_file(artefact.folder / name)
    return FileCheck(name=name, digest=digest, found=found, verdict="intact" if found == digest else "differs")


def is_replayed(name: str) -> bool:
    """Whether the bytes of a file follow from the inputs."""
    return name in REPLAYED or name.startswith(f"{ONNX_FILE}.")


def judge_files(intact: tuple[FileCheck, ...], built: Mapping[str, str]) -> Iterator[FileCheck]:
    """The files with what the replay says of them."""
    for file in intact:
        if not is_replayed(file.name):
            yield file
        elif file.name not in built:
            yield file.model_copy(update={"found": "", "verdict": "missing"})
        else:
            verdict = "same" if built[file.name] == file.digest else "differs"
            yield file.model_copy(update={"found": built[file.name], "verdict": verdict})
    known = {file.name for file in intact}
    for name, digest in built.items():
        if is_replayed(name) and name not in known:
            yield FileCheck(name=name, digest="", found=digest, verdict="new")
