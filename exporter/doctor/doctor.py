"""What this machine can do: packages, targets, and checks with advice for what is amiss."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from qexport.errors import EnvironmentMismatch, QexportError
from qexport.exporter.doctor.compatibility import Found, verdicts
from qexport.exporter.doctor.surroundings import Check, look_around
from qexport.passes.target import TARGETS, Target
from qexport.runtime.backends.gpus import find_cuda, find_gpus
from qexport.safe_io import read_text

Packages = Mapping[str, str | None]
"""Distribution to version; ``None`` is not installed."""


@dataclass(frozen=True, slots=True)
class Package:
    """A distribution, the module it holds, and the extra that brings it for a use; one without is always needed."""

    module: str
    extra: str = ""
    use: str = ""


PACKAGES = {
    "onnx": Package("onnx"),
    "onnx-ir": Package("onnx_ir"),
    "onnxscript": Package("onnxscript"),
    "onnxslim": Package("onnxslim"),
    "numpy": Package("numpy"),
    "safetensors": Package("safetensors"),
    "tokenizers": Package("tokenizers"),
    "onnxruntime": Package("onnxruntime", "cpu", "run models"),
    "onnxruntime-gpu": Package("onnxruntime", "gpu", "run models"),
    "tensorrt-rtx": Package("tensorrt_rtx", "rtx", "build engines for it"),
    "tensorrt": Package("tensorrt", "tensorrt", "build engines for it"),
    "pillow": Package("PIL", "images", "read images"),
    "pyarrow": Package("pyarrow", "report", "write the tables of a report as Parquet, too"),
    "jinja2": Package("jinja2"),
}
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
_BUILDERS = ("tensorrt-rtx", "tensorrt")
_NEEDS_GPU = "tensorrt"  # the builder that refuses to work without one


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetStatus(_Record):
    """Whether results for a target can be built here, and judged in its own runtime if that is onnxruntime."""

    name: str
    ready: bool
    note: str


class Diagnosis(_Record):
    """What was found.

    Attributes:
        version: Of qexport.
        packages: Version of every distribution in ``PACKAGES``; ``None`` is not installed.
        targets: Each target.
        checks: Everything that was looked at; a ``problem`` stands in the way of building anything.
    """

    version: str
    packages: dict[str, str | None]
    targets: tuple[TargetStatus, ...]
    checks: tuple[Check, ...]

    @property
    def problems(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == "problem")


def diagnose(cache: Path | None = None) -> Diagnosis:
    """Look at Python, packages, GPU, CPU, memory and folders, and at what goes together.

    Starts no process and imports no runtime; ``cache`` is the folder that builds keep things in.
    """
    packages, around = installed(), look_around(cache)
    gpu = any(check.name == "gpu" and check.status == "ok" for check in around)
    return Diagnosis(
        version=_version("qexport") or "unknown",
        packages=packages,
        targets=tuple(judge_target(target, packages, gpu=gpu) for target in TARGETS.values()),
        checks=(*check_packages(packages), *around, *verdicts(find_versions(packages))),
    )


def find_versions(packages: Packages) -> Found:
    """What the verdicts are about, as far as this machine tells."""
    try:
        gpus = find_gpus()
    except EnvironmentMismatch:
        gpus = ()
    driver, tegra = (_text(path) for path in ("/proc/driver/nvidia/version", "/etc/nv_tegra_release"))
    return Found(packages, gpus, find_cuda(), driver, tegra, _builds())


def _text(path: str) -> str:
    try:
        return read_text(path)
    except QexportError:
        return ""


def _builds() -> dict[str, int]:
    """Installed builds of runtimes for one version of CUDA, such as tensorrt_rtx_cu13."""
    names = (str(found.metadata["Name"]) for found in importlib.metadata.distributions() if found.metadata["Name"])
    named = (re.fullmatch(r"(tensorrt(?:[-_]rtx)?)[-_]cu(\d+)", name) for name in names)
    return {match[0]: int(match[2]) for match in named if match}


def installed() -> dict[str, str | None]:
    """Return the version of each of ``PACKAGES``.

    A module that came under another distribution's name, as builds for one CUDA version do, counts as well.
    """
    found = {name: _version(name) for name in PACKAGES}
    known = {PACKAGES[name].module for name, version in found.items() if version is not None}
    for name, package in PACKAGES.items():
        if package.module not in known and find_spec(package.module) is not None:
            found[name] = "unknown version"
            known.add(package.module)
    return found


def check_packages(found: Packages) -> Iterator[Check]:
    """Judge versions by distribution name; what is not in ``found`` is not installed."""
    builder = any(found.get(name) for name in _BUILDERS)
    yield _runtime(found)
    for name, package in PACKAGES.items():
        version = found.get(name)
        if name in _RUNTIMES:
            continue
        if version is not None:
            yield Check(name=name, status="ok", found=version)
        elif not package.extra:
            advice = "pip install --force-reinstall qexport"
            yield Check(name=name, status="problem", found="not installed", advice=advice)
        else:
            advice = f"pip install 'qexport[{package.extra}]' to {package.use}"
            fine = name not in _BUILDERS or builder
            yield Check(name=name, status="ok" if fine else "warning", found="not installed", advice=advice)


def judge_target(target: Target, found: Packages, *, gpu: bool) -> TargetStatus:
    """Judge a target by the packages and by whether there is a GPU."""
    note = "builds engines" if target.engine else "the file is the result"
    for missing, reason in _obstacles(target, found, gpu=gpu):
        if missing:
            return TargetStatus(name=target.name, ready=False, note=reason)
    return TargetStatus(name=target.name, ready=True, note=note)


def _obstacles(target: Target, found: Packages, *, gpu: bool) -> Iterator[tuple[bool, str]]:
    """What may stand in the way: whether it does, and how to tell it."""
    yield not any(found.get(name) for name in _RUNTIMES), "onnxruntime is not installed"
    for name in _BUILDERS:
        if PACKAGES[name].module == target.engine:
            yield not found.get(name), f"builds no engine: pip install 'qexport[{PACKAGES[name].extra}]'"
            yield name == _NEEDS_GPU and not gpu, "builds no engine: that needs a GPU"
    if "CUDAExecutionProvider" in target.providers:
        yield not found.get("onnxruntime-gpu"), "builds, but runs on the CPU: pip install 'qexport[gpu]'"
        yield not gpu, "builds, but runs on the CPU: no GPU"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _runtime(found: Packages) -> Check:
    names = [name for name in _RUNTIMES if found.get(name)]
    versions = ", ".join(f"{name} {found[name]}" for name in names) or "not installed"
    advice = {
        0: "pip install 'qexport[cpu]', or 'qexport[gpu]' with an NVIDIA GPU",
        1: "",
        2: "they overwrite each other: pip uninstall both, then install qexport[cpu] or qexport[gpu]",
    }[len(names)]
    return Check(name="onnxruntime", status="problem" if advice else "ok", found=versions, advice=advice)
