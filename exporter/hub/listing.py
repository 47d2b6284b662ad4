"""What a hub says a model consists of, which of its files are taken, and what an earlier fetch has pinned."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexport.errors import IntegrityError, ModelInvalid, UnsafeInput, UsageError
from qexport.exporter.families.folder import CONFIG, INDEX, WEIGHTS
from qexport.exporter.families.pooling import MODULES
from qexport.exporter.load import COMPANIONS
from qexport.safe_io import read_bytes

if TYPE_CHECKING:
    from hashlib import _Hash

LOCK = "qexport.lock.json"
SCHEMA = "qexport.lock/1"
_MOST_LOCK = 8 << 20

_PART = r"[A-Za-z0-9_][\w.-]{0,95}"
_REPO = re.compile(rf"{_PART}(/{_PART})?", re.ASCII)
_REVISION = re.compile(r"[\w][\w./-]{0,199}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors", re.ASCII)
_MODULE = re.compile(r"\d_[A-Za-z]{1,40}/(config\.json|model\.safetensors)", re.ASCII)
"""Of sentence-transformers, behind the encoder."""
SMALL = frozenset({*COMPANIONS, MODULES, INDEX, "sentence_bert_config.json", "config_sentence_transformers.json"})
"""What is taken beside weights, and before them."""
_PICKLE = re.compile(r".*\.(bin|pt|pth|ckpt|pkl)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Listed:
    """A file of a hub.

    Attributes:
        name: Its path in the model.
        bytes: Its size.
        digest: SHA-256 of its content, or what git calls it: 64 or 40 hexadecimal digits.
    """

    name: str
    bytes: int
    digest: str

    def hasher(self) -> _Hash:
        """What finds the digest of a content of this size."""
        if _SHA256.fullmatch(self.digest):
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.bytes, usedforsecurity=False)


@dataclass(frozen=True, slots=True)
class Pinned:
    """What ``qexport.lock.json`` says: which files were asked for as which revision, and which they were."""

    repo: str
    revision: str
    commit: str
    files: tuple[Listed, ...]

    def as_dict(self) -> dict[str, Any]:
        """The content of the file."""
        files = {file.name: {"bytes": file.bytes, "digest": file.digest} for file in self.files}
        return {"schema": SCHEMA, "repo": self.repo, "revision": self.revision, "commit": self.commit, "files": files}


def parse_name(text: str) -> tuple[str, str]:
    """Model and revision of ``REPO[@REVISION]``; ``UsageError`` where it is none."""
    repo, at, revision = text.partition("@")
    revision = revision if at else "main"
    if not _REPO.fullmatch(repo) or not _REVISION.fullmatch(revision) or ".." in text:
        raise UsageError(f"{text!r} is no name of a model", hint="write it as OWNER/NAME or OWNER/NAME@REVISION")
    return repo, revision


def read_listing(told: Any, where: str) -> tuple[str, tuple[Listed, ...]]:
    """The commit, and its files, of what a hub says of a model; ``IntegrityError`` where it makes no sense."""
    try:
        commit, files = _commit(told["sha"]), tuple(_listed(each) for each in told["siblings"])
        _demand(len({file.name for file in files}) == len(files), "a name twice")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        hint = "is HF_ENDPOINT the address of a hub?"
        raise IntegrityError(f"the hub's list of files makes no sense: {error!r}", where=where, hint=hint) from error
    return commit, files


def _listed(told: Mapping[str, Any]) -> Listed:
    large = told.get("lfs")
    size, digest = (large["size"], large["sha256"]) if large else (told["size"], told["blobId"])
    sound = isinstance(size, int) and size >= 0 and (_SHA256 if large else COMMIT).fullmatch(digest)
    _demand(sound and isinstance(told["rfilename"], str), "a file without name, size or digest")
    return Listed(told["rfilename"], size, digest)


def _commit(told: str) -> str:
    _demand(COMMIT.fullmatch(told), "no commit")
    return told


def _demand(holds: object, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def choose(files: tuple[Listed, ...], where: str) -> tuple[Listed, ...]:
    """The files that make a model, weights last; others are never asked for.

    Raises:
        UnsafeInput: The weights are pickles.
        ModelInvalid: There are none, or no config.
    """
    names = {file.name for file in files}
    if CONFIG not in names:
        raise ModelInvalid(f"the model has no {CONFIG}", where=where, hint="is it one of transformers?")
    weights = {WEIGHTS} & names or {name for name in names if _SHARD.fullmatch(name)}
    if not weights or (WEIGHTS not in names and INDEX not in names):
        pickle = next((name for name in sorted(names) if _PICKLE.fullmatch(name)), None)
        if pickle is None:
            raise ModelInvalid("there are no weights", where=where, hint="a model has *.safetensors")
        what = f"the weights are a pickle, which is not fetched ({pickle})"
        raise UnsafeInput(what, where=where, hint="ask who made it for safetensors")
    small = [file for file in files if file.name in SMALL and not (file.name == INDEX and WEIGHTS in names)]
    large = [file for file in files if file.name in weights or _MODULE.fullmatch(file.name)]
    return (*small, *large)


def read_pinned(folder: Path) -> Pinned | None:
    """What an earlier fetch into a folder has pinned, if there was one; ``IntegrityError`` where that is damaged."""
    place = folder / LOCK
    if not place.exists():
        return None
    try:
        told = json.loads(read_bytes(place, limit=_MOST_LOCK))
        files = tuple(Listed(name, each["bytes"], each["digest"]) for name, each in told["files"].items())
        _demand(told["schema"] == SCHEMA, "another version wrote it")
        return Pinned(str(told["repo"]), str(told["revision"]), _commit(told["commit"]), files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        hint = "remove it to take what the revision is now"
        raise IntegrityError(f"the lock cannot be read: {error!r}", where=str(place), hint=hint) from error
