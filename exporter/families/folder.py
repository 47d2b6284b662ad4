"""A Hugging Face folder: which of its files make the model, and where its links may lead."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from qexport.errors import IntegrityError, ModelInvalid, UnsafeInput, UsageError
from qexport.safe_io import read_bytes

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MISSING = {
    "model.safetensors.index.json": (
        "the weights are split over several files",
        "save them as one: model.save_pretrained(folder, max_shard_size='100GB')",
    ),
    "pytorch_model.bin": (
        "the weights are a pickle, which is not read",
        "save them as safetensors: model.save_pretrained(folder)",
    ),
}
"""What a folder without ``model.safetensors`` may hold instead, and what to do about it."""

_MOST_JSON = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Folder:
    """The files of one folder.

    Attributes:
        path: The folder.
        used: The files that were asked for, in that order; together they are the model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.used: list[Path] = []

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (self.path / name).is_file()

    def file(self, name: str) -> Path:
        """A file that the model is made of.

        Raises:
            UsageError: It is missing.
            UnsafeInput: It lies outside of the folder; see ``demand_inside``.
        """
        file = self.path / name
        demand_inside(file, self.path)
        if not file.is_file():
            hint = f"a Hugging Face folder has {CONFIG} and {WEIGHTS}"
            raise UsageError(f"the folder has no {name}", where=str(self.path), hint=hint)
        self.used.append(file)
        return file

    def json(self, name: str) -> Any:
        """The content of a JSON file; ``ModelInvalid`` when it is none."""
        file = self.file(name)
        try:
            return json.loads(read_bytes(file, limit=_MOST_JSON))
        except (ValueError, RecursionError) as error:
            raise ModelInvalid(f"not JSON: {error}", where=str(file)) from error

    def weights(self) -> Path:
        """The safetensors file; ``UsageError`` says what is there instead."""
        other = next((name for name in MISSING if self.has(name)), None)
        if other is not None and not self.has(WEIGHTS):
            what, hint = MISSING[other]
            raise UsageError(f"{what} ({other})", where=str(self.path), hint=hint)
        return self.file(WEIGHTS)


def demand_inside(file: Path, folder: Path) -> None:
    """Raise ``UnsafeInput`` when a file, its links followed, is neither in the folder nor in its cache's ``blobs``.

    A folder from elsewhere could otherwise make its companions links to private files, and they are copied to the
    artefact. The Hugging Face cache keeps ``snapshots/REVISION/FILE`` as links to ``blobs/DIGEST`` beside them.
    """
    root, real = (Path(os.path.realpath(path)) for path in (folder, file))
    allowed = [root, *(above.parent.parent / "blobs" for above in (root, *root.parents) if _is_snapshot(above))]
    if not any(place in real.parents for place in allowed):
        hint = "copy the folder with its links resolved (cp -rL) and use the copy"
        raise UnsafeInput("leads out of its folder", where=str(file), hint=hint)


def _is_snapshot(path: Path) -> bool:
    return path.parent.name == "snapshots"


def check_blob(file: Path, digest: str) -> None:
    """Raise ``IntegrityError`` when a link into a cache that names files by SHA-256 finds another content."""
    name = Path(os.path.realpath(file)).name
    if file.is_symlink() and _SHA256.fullmatch(name) and digest != f"sha256:{name}":
        hint = "the download was damaged; remove it from the cache and fetch it again"
        raise IntegrityError(
            f"the content does not have the digest {name} that the cache names it by", where=str(file), hint=hint
        )
