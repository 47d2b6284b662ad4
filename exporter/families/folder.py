"""A Hugging Face folder: which of its files make the model, and where its links may lead."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from qexport.errors import IntegrityError, ModelInvalid, UnsafeInput, UsageError
from qexport.exporter.families.weights import Weights, read_headers
from qexport.safe_io import read_bytes

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

_MOST_JSON = 8 << 20
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

    def weights(self, anchor: str) -> Weights:
        """A reader of the tensors in ``model.safetensors``, or in the files that its index lists.

        Raises:
            UsageError: No weights at all.
            UnsafeInput: They are a pickle, or lie outside of the folder.
            ModelInvalid: A file is missing or broken, or does not hold what the index says.
        """
        if self.has(WEIGHTS):
            return Weights(read_headers([self.file(WEIGHTS)]), anchor, str(self.path / WEIGHTS))
        if self.has(INDEX):
            return Weights(read_headers(self._shards()), anchor, str(self.path / INDEX))
        pickle = next((name for name in PICKLES if self.has(name)), None)
        if pickle is not None:
            hint = "save them as safetensors: model.save_pretrained(folder)"
            raise UnsafeInput(
                f"the weights are a pickle, which is not read ({pickle})", where=str(self.path), hint=hint
            )
        return Weights(read_headers([self.file(WEIGHTS)]), anchor, str(self.path / WEIGHTS))

    def _shards(self) -> list[Path]:
        """The files that the index names, in order."""
        index, where = self.json(INDEX), str(self.path / INDEX)
        placed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
            raise ModelInvalid("there is no weight_map from tensors to files", where=where, hint="save the model again")
        names = sorted(set(placed.values()))
        for name in names:
            demand_inside(self.path / name, self.path)
        lost = [name for name in names if not self.has(name)]
        if lost:
            hint = "download the folder again; every file that the index names is needed"
            raise ModelInvalid(
                f"{len(lost)} of {len(names)} weight files are missing: {', '.join(lost[:4])}", where=where, hint=hint
            )
        return [self.file(name) for name in names]


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
