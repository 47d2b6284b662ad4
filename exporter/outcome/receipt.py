"""What every published folder says of itself: which tools made it, which files are in it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Collection, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from qexport.errors import QexportError
from qexport.exporter.outcome.result import FileInfo
from qexport.safe_io import Stage, read_text

if TYPE_CHECKING:
    from qexport.exporter.load import Source
    from qexport.exporter.options import BuildOptions
    from qexport.exporter.product import Product
    from qexport.exporter.samples import Samples

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


class Given(BaseModel):
    """One input of a build: the path as it was typed, empty where there was none, and the digest of what it held."""

    model_config = ConfigDict(frozen=True)

    path: str
    digest: str


class ReplayInfo(BaseModel):
    """What a manifest says under ``replay``: all that it takes, beside the recipe, to build the same bytes again.

    Attributes:
        model: The source.
        calib: Calibration data, by the digest of its samples.
        eval: Evaluation data, likewise; it does not shape the bytes.
        allow_nonfinite: Whether weights might hold NaN or infinity.
        overrides: What was asked for on top of the recipe, which has it in it already.
        keep: Number of an enabled step, from 1, to the nodes that went back to float there.
        processor: What of the processor decides how sums are rounded.
    """

    model_config = ConfigDict(frozen=True)

    model: Given
    calib: Given | None = None
    eval: Given | None = None
    allow_nonfinite: bool = False
    overrides: tuple[str, ...] = ()
    keep: dict[int, tuple[str, ...]] = Field(default_factory=dict)
    processor: str = ""


def replay_section(
    asked: BuildOptions, source: Source, samples: Samples, paths: tuple[object, object], keep: Mapping[int, list[str]]
) -> dict[str, Any]:
    """Make the ``replay`` section of a manifest.

    Args:
        asked: What the caller asked for.
        source: The model.
        samples: The data as it was read.
        paths: Where calibration and evaluation data came from.
        keep: What ``kept_by_step`` says.
    """
    calib, judged = paths
    info = ReplayInfo(
        model=Given(path=source.info.path, digest=source.info.digest),
        calib=None if calib is None or samples.calibration is None else _given(calib, samples.calibration.digest),
        eval=None if judged is None or samples.judge is None else _given(judged, samples.judge.data.digest),
        allow_nonfinite=asked.allow_nonfinite,
        overrides=asked.set,
        keep={number: tuple(names) for number, names in keep.items()},
        processor=processor(),
    )
    return info.model_dump(mode="json")


def kept_by_step(product: Product, kept: Collection[str]) -> dict[int, list[str]]:
    """Which of the nodes that went back to float would have been quantized by which step, numbered from 1.

    Args:
        product: What the whole recipe made, before anything was taken back.
        kept: Names of the nodes that were.
    """
    if product.snapshot is None:
        return {}
    before, found = product.snapshot.before, dict[int, list[str]]()
    steps = zip(product.snapshot.steps, product.steps[before:], strict=True)
    for number, ((_, step), record) in enumerate(steps, before + 1):
        names = [d.node for d in record.decisions if d.action == "quantized" and d.node in kept]
        if names and step.quantizes and "keep" in step.options():
            found[number] = names
    return found


def processor() -> str:
    """The architecture, and the instructions by which libraries choose how they sum."""
    known = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "asimddp", "i8mm", "sve")
    try:
        words = set(read_text("/proc/cpuinfo").split())
    except QexportError:  # not Linux
        words = set()
    return " ".join([platform.machine(), *(flag for flag in known if flag in words)])


def _given(path: object, digest: str) -> Given:
    """Data that came from no file has no path, and must be handed over again."""
    return Given(path=os.fspath(path) if isinstance(path, str | os.PathLike) else "", digest=digest)
