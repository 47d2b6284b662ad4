"""What a crash leaves behind for whoever looks into it: one small JSON file in the cache folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qexport.cli.common import default_cache

SCHEMA = "qexport.crash/1"
KEPT = 10  # the newest
DIGESTED = 256 << 20  # bytes of a file, up to which it is told by its digest
PACKAGES = ("onnx", "onnx-ir", "onnxruntime", "numpy", "protobuf", "tokenizers", "tensorrt", "tensorrt-rtx", "torch")


def write_bundle(arguments: Sequence[str], stage: str, death: str, stack: str) -> Path | None:
    """Write down a crash, with the command line, versions and digests of the files that it names.

    Args:
        arguments: The command line; no environment is kept, as it may hold secrets.
        stage: What was being done.
        death: What happened, in a line.
        stack: The traceback, or the interpreter's stack when native code died.

    Returns:
        The file; ``None`` where it cannot be written, which hides nothing: the error is told all the same.
    """
    from qexport.errors import QexportError
    from qexport.safe_io import write_json

    cache = default_cache()
    if cache is None:
        return None
    folder = cache / "crashes"
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.json"
    told = {
        "schema": SCHEMA,
        "death": death,
        "stage": stage,
        "arguments": list(arguments),
        "stack": stack.splitlines(),
        "versions": {"qexport": _version("qexport"), **{name: _version(name) for name in PACKAGES}},
        "python": sys.version,
        "machine": platform.platform(),
        "inputs": _inputs(arguments),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(path, told)
        path.chmod(0o600)
        for old in sorted(folder.glob("*.json"))[:-KEPT]:
            old.unlink(missing_ok=True)
    except (OSError, QexportError):
        return None
    return path


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _inputs(arguments: Sequence[str]) -> list[dict[str, object]]:
    """Size and digest of each file that the command line names."""
    found: list[dict[str, object]] = []
    for word in arguments:
        path = Path(word.partition("=")[2] if word.startswith("--") else word)
        with suppress(OSError, ValueError):
            if path.is_file():
                size = path.stat().st_size
                digest = hashlib.sha256(path.read_bytes()).hexdigest() if size <= DIGESTED else None
                found.append({"path": word, "bytes": size, "sha256": digest})
    return found
