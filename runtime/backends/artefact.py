"""What a folder of ours holds to be run, and whether it is what was written: by the digests of its manifest."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from qexport.errors import EnvironmentMismatch, IntegrityError, UnsafeInput, UsageError
from qexport.runtime.backends.gpus import find_gpus
from qexport.safe_io import digest_bytes, digest_file, open_beneath

MODEL, PLAN, MANIFEST = "model.onnx", "engine.plan", "manifest.json"
"""Names of the graph, the engine and the receipt in a folder."""

EXTRAS = {"tensorrt_rtx": "rtx", "tensorrt": "tensorrt"}
"""Modules that build and run engines, and what pip calls our extra for each."""

_LONGEST_HEADER = 1 << 20
_MANIFEST_LIMIT = 64 << 20
_OLDEST = (8, 0)  # GPUs that TensorRT-RTX builds for where no compute capability is named, and all after it


@dataclass(frozen=True, slots=True)
class Artefact:
    """A folder with a manifest.

    Attributes:
        folder: Where it is.
        manifest: What it says.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def target(self) -> str | None:
        """The backend that it was built for; exports are for any."""
        found = self.manifest.get("target")
        return found if isinstance(found, str) else None

    @property
    def engine(self) -> Mapping[str, Any] | None:
        """What is known of the engine, if there is one."""
        found = self.manifest.get("engine")
        return found if isinstance(found, dict) else None

    @property
    def files(self) -> Mapping[str, Any]:
        """What is known of each file."""
        found = self.manifest.get("files")
        return found if isinstance(found, dict) else {}


def open_artefact(folder: Path) -> Artefact:
    """Read the manifest of a folder.

    Raises:
        UnsafeInput: There is none, so nobody says where the files come from.
        IntegrityError: It cannot be read.
    """
    where = str(folder / MANIFEST)
    if not (folder / MANIFEST).exists():
        hint = "qexport build and export write one; a model without it is opened by the name of its .onnx file"
        raise UnsafeInput("there is no manifest", where=str(folder), hint=hint)
    with open_beneath(folder, MANIFEST) as file:
        text = file.read(_MANIFEST_LIMIT)
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise IntegrityError("the manifest is damaged", where=where) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise IntegrityError("the manifest is not one of qexport's", where=where)
    return Artefact(folder, manifest)


def check_files(artefact: Artefact, name: str) -> None:
    """Compare a model and the files with its weights with what the manifest says of them.

    Raises:
        IntegrityError: One is not what was written.
        UsageError: One is missing.
    """
    for known, record in artefact.files.items():
        if known == name or known.startswith(f"{name}."):
            path, digest = artefact.folder / known, record.get("digest") if isinstance(record, dict) else None
            if digest_file(path) != digest:
                what = "the file is not the one that was written"
                raise IntegrityError(what, where=str(path), hint="write the folder again, or take a good copy")


def load_plan(artefact: Artefact, device: int | None = None) -> bytes:
    """Read the engine of a folder for a runtime to load: only what its manifest vouches for and this machine runs.

    Args:
        artefact: The folder.
        device: Which GPU it is for; ``None`` leaves GPUs out of it.

    Raises:
        UnsafeInput: The manifest does not list the engine, so nobody says where it comes from.
        IntegrityError: The engine is not the one the manifest lists, or the manifest is none of ours.
        EnvironmentMismatch: It was built by a module or version other than the one installed, or for another GPU than
            the one that is here, or another tool put a header in front of it.
    """
    where = str(artefact.folder / PLAN)
    record, info = artefact.files.get(PLAN), artefact.engine
    if record is None or artefact.manifest.get("engine") is None:
        raise UnsafeInput("the manifest lists no engine", where=str(artefact.folder), hint="build it again")
    try:
        expected, digest = int(record["bytes"]), record["digest"]
        name, version = (info or {})["module"], (info or {})["version"]
        built_for = tuple((info or {}).get("compute_capabilities") or ())
    except (KeyError, TypeError, ValueError) as error:
        what = "the manifest is not one of qexport's"
        raise IntegrityError(what, where=str(artefact.folder / MANIFEST)) from error
    with open_beneath(artefact.folder, PLAN) as file:
        plan = file.read(expected + 1)
    refuse_header(plan[:5], where)
    if len(plan) != expected or digest_bytes(plan) != digest:
        raise IntegrityError("the engine is not the one that was built", where=where, hint="build it again")
    installed = load_module(name).__version__ if name in EXTRAS else None
    if installed is None or _release(installed) != _release(version):
        what = f"the engine was built by {name} {version}, installed is {installed}"
        raise EnvironmentMismatch(what, where=where, hint="build it again, or install that version")
    capability = None if device is None else gpu_capability(device)
    if capability is not None and not runs_on(name, built_for, capability):
        told = ", ".join(map(str, built_for)) or "8.0 and later"
        what = f"the engine was built for GPUs of compute capability {told}, this one has {capability}"
        raise EnvironmentMismatch(what, where=where, hint="build it for this GPU")
    return plan


def refuse_header(head: bytes, where: str) -> None:
    """``EnvironmentMismatch`` where a file begins with a length and JSON, which no engine and no graph does."""
    length = int.from_bytes(head[:4], "little")
    if head[4:5] == b"{" and 1 < length <= _LONGEST_HEADER:
        what = f"an engine with {length} bytes of JSON in front of it, as Ultralytics writes them: no runtime reads it"
        raise EnvironmentMismatch(what, where=where, hint="build the engine from its .onnx file: qexport build")


def runs_on(name: str, built_for: tuple[str, ...], capability: str) -> bool:
    """Whether an engine of the module ``name`` runs on a GPU.

    TensorRT builds for the GPU at hand alone. TensorRT-RTX builds for the GPUs that were named, else for 8.0 and later
    (its documentation, "CPU-only AOT"). Of engines that do not say, the module itself has to find out.
    """
    if built_for:
        return capability in built_for
    return name == "tensorrt" or tuple(map(int, capability.split("."))) >= _OLDEST


def load_module(name: str) -> ModuleType:
    """Import ``tensorrt`` or ``tensorrt_rtx``; raise ``EnvironmentMismatch`` with what to install."""
    if name not in EXTRAS:
        raise UsageError(f"no engine builder called {name!r}", hint=f"known: {', '.join(EXTRAS)}")
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        what = f"the package {name} is not installed" if missing else f"{name} cannot be imported: {error}"
        raise EnvironmentMismatch(what, hint=f"pip install 'qexport[{EXTRAS[name]}]'") from error


def gpu_capability(device: int) -> str:
    """Compute capability of a GPU, such as ``"8.9"``.

    Raises:
        EnvironmentMismatch: There is no such GPU.
    """
    gpus = find_gpus()
    if not 0 <= device < len(gpus):
        raise EnvironmentMismatch(f"there is no GPU {device}", hint=f"the driver offers {len(gpus)}, from 0 on")
    return gpus[device].capability


def _release(version: object) -> list[str]:
    """Return the parts that must be equal: engines load in the release that built them."""
    return str(version).split(".")[:3]
