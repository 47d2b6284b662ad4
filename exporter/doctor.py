"""What this machine can do: versions, runtimes, targets, and what to install for the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from qexport.passes.target import TARGETS, Target

PACKAGES = {
    "onnx": "",
    "onnx-ir": "",
    "onnxscript": "",
    "onnxslim": "",
    "numpy": "",
    "safetensors": "",
    "tokenizers": "",
    "onnxruntime": "cpu",
    "onnxruntime-gpu": "gpu",
    "tensorrt-rtx": "rtx",
    "tensorrt": "tensorrt",
    "pillow": "images",
    "torch": "export",
}
"""Distribution to the extra that brings it; without one it is always needed."""

_ENGINE_EXTRAS = {"tensorrt_rtx": "rtx", "tensorrt": "tensorrt"}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetStatus(_Record):
    """Whether results for a target can be built here, and what is missing otherwise."""

    name: str
    ready: bool
    note: str


class Diagnosis(_Record):
    """What was found.

    Attributes:
        version: Of qexport.
        python: Version of the interpreter.
        system: Operating system and machine type.
        cores: Number of CPUs this process may use.
        cpu: Instructions that matter for int8, of those the CPU has.
        gpus: Name and driver of each GPU.
        packages: Distribution to version; ``None`` is not installed.
        targets: Each target.
        problems: What stands in the way, with what to do; empty when all is well.
    """

    version: str
    python: str
    system: str
    cores: int
    cpu: tuple[str, ...]
    gpus: tuple[str, ...]
    packages: dict[str, str | None]
    targets: tuple[TargetStatus, ...]
    problems: tuple[str, ...]


def diagnose() -> Diagnosis:
    """Look at this machine; starts nothing but ``nvidia-smi``."""
    packages = {name: _version(name) for name in PACKAGES}
    return Diagnosis(
        version=_version("qexport") or "unknown",
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu=_instructions(),
        gpus=_gpus(),
        packages=packages,
        targets=tuple(_status(target, packages) for target in TARGETS.values()),
        problems=tuple(find_problems(packages)),
    )


def find_problems(packages: dict[str, str | None]) -> list[str]:
    """Return what stands in the way of a build, given the installed versions."""
    problems = [
        f"{name} is not installed: pip install --force-reinstall qexport"
        for name, extra in PACKAGES.items()
        if not extra and packages[name] is None
    ]
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "uninstall both, then install qexport[cpu] or qexport[gpu]"
        )
    if not packages["onnxruntime"] and not packages["onnxruntime-gpu"]:
        problems.append("onnxruntime is not installed: pip install 'qexport[cpu]' or 'qexport[gpu]'")
    return problems


def _status(target: Target, packages: dict[str, str | None]) -> TargetStatus:
    if target.engine is not None and find_spec(target.engine) is None:
        note = f"builds no engine: pip install 'qexport[{_ENGINE_EXTRAS[target.engine]}]'"
        return TargetStatus(name=target.name, ready=False, note=note)
    if "CUDAExecutionProvider" in target.providers and not packages["onnxruntime-gpu"]:
        return TargetStatus(name=target.name, ready=False, note="pip install 'qexport[gpu]' to run it")
    return TargetStatus(
        name=target.name, ready=True, note="builds engines" if target.engine else "the file is the result"
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _instructions() -> tuple[str, ...]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return ()
    found = set(path.read_text(errors="replace").split())
    return tuple(name for name in ("avx2", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm") if name in found)


def _gpus() -> tuple[str, ...]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(answer.stdout.split("\n")[:-1]) if answer.returncode == 0 else ()
