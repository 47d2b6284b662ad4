"""What every published folder says of itself: which tools made it, which files are in it."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

from qexport.exporter.outcome.result import FileInfo
from qexport.safe_io import Stage

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = "qexport.manifest/1"
TOOLS = (
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxslim",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "tensorrt",
    "tensorrt-rtx",
)


def tool_versions(*more: str) -> dict[str, str]:
    """Versions of what shapes the result, the interpreter, the platform and ``more`` packages included."""
    found = {"python": platform.python_version(), "platform": f"{sys.platform} {platform.machine()}"}
    for name in (*TOOLS, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def files_of(stage: Stage) -> dict[str, FileInfo]:
    """Size and digest of every finished file, by name."""
    return {name: FileInfo(bytes=size, digest=digest) for name, (size, digest) in sorted(stage.files.items())}
