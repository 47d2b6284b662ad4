"""What this machine has for building and running models, as checks with advice."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from qexport.errors import EnvironmentMismatch, QexportError
from qexport.exporter.device import find_gpus
from qexport.safe_io import read_text, write_bytes

_NEEDED = ("onnx", "onnx-ir", "onnxscript", "onnxslim", "numpy", "safetensors", "tokenizers")
_RUNTIMES = {"onnxruntime": "cpu", "onnxruntime-gpu": "gpu"}
_BUILDERS = {"tensorrt-rtx": "rtx", "tensorrt": "tensorrt"}
_INT8_FLAGS = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
_OLDEST_PYTHON = (3, 11)
_GIB = 1 << 30
_LOW_MEMORY = 2 * _GIB
_LOW_DISK = 2 * _GIB


class Check(BaseModel):
    """One thing that was looked at; ``advice`` says what to do about it, or is empty."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    status: Literal["ok", "warning", "problem"]
    found: str
    advice: str = ""


def examine(folders: Mapping[str, Path] | None = None) -> list[Check]:
    """Look at Python, packages, GPU, CPU, memory and folders; starts no process and imports no runtime.

    Args:
        folders: What a folder is for, to its path; each is tried with a small file. The temporary folder is always
            looked at.
    """
    checks = [_python(), *check_packages(installed()), _gpu(), *_proc()]
    places = {"temporary folder": Path(tempfile.gettempdir()), **(folders or {})}
    return checks + [check_folder(name, path) for name, path in places.items()]


def installed() -> dict[str, str]:
    """Return the versions of the distributions that matter, where installed."""
    found = {}
    for name in (*_NEEDED, *_RUNTIMES, *_BUILDERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_packages(found: Mapping[str, str]) -> Iterator[Check]:
    """Judge versions by distribution name; what is not in ``found`` is not installed."""
    for name in _NEEDED:
        advice = "" if name in found else "pip install --force-reinstall qexport"
        status: Literal["ok", "problem"] = "ok" if name in found else "problem"
        yield Check(name=name, status=status, found=found.get(name, "not installed"), advice=advice)
    yield _runtime([name for name in _RUNTIMES if name in found], found)
    some = any(name in found for name in _BUILDERS)
    for name, extra in _BUILDERS.items():
        advice = "" if name in found else f"pip install 'qexport[{extra}]' to build engines for it"
        fine = some or name in found
        yield Check(
            name=name, status="ok" if fine else "warning", found=found.get(name, "not installed"), advice=advice
        )


def check_cpu(cpuinfo: str) -> Check:
    """Judge the CPU by the words of ``/proc/cpuinfo``: without int8 dot products int8 is hardly faster than float."""
    words = set(cpuinfo.split())
    flags = [flag for flag in _INT8_FLAGS if flag in words]
    if flags:
        return Check(name="cpu", status="ok", found=f"{platform.machine()} with {', '.join(flags)}")
    advice = "int8 may not be faster than float here: measure before choosing the target ort-cpu"
    return Check(name="cpu", status="warning", found=f"{platform.machine()}, no int8 dot products known", advice=advice)


def check_memory(meminfo: str) -> Check:
    """Judge the memory by the text of ``/proc/meminfo``."""
    sizes = {line.partition(":")[0]: line.partition(":")[2].split() for line in meminfo.splitlines()}
    available = int(sizes["MemAvailable"][0]) << 10
    advice = "large models may not fit: close other programs" if available < _LOW_MEMORY else ""
    found = f"{available / _GIB:.1f} GiB available"
    return Check(name="memory", status="warning" if advice else "ok", found=found, advice=advice)


def check_folder(name: str, path: Path) -> Check:
    """Judge a folder by its free space and by writing a small file into it, or into the folder it would be made in."""
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    probe = place / f".qexport-{secrets.token_hex(8)}"
    try:
        write_bytes(probe, b"qexport")
        probe.unlink()
        free = shutil.disk_usage(place).free
    except (QexportError, OSError) as error:
        reason = error.what if isinstance(error, QexportError) else str(error)
        return Check(name=name, status="problem", found=f"{path}: {reason}", advice="choose another folder")
    advice = "free some space" if free < _LOW_DISK else ""
    found = f"{path}, {free / _GIB:.1f} GiB free"
    return Check(name=name, status="warning" if advice else "ok", found=found, advice=advice)


def _python() -> Check:
    fine = sys.version_info >= _OLDEST_PYTHON
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    needed = ".".join(map(str, _OLDEST_PYTHON))
    return Check(
        name="python", status="ok" if fine else "problem", found=found, advice="" if fine else f"needs {needed}"
    )


def _runtime(names: list[str], found: Mapping[str, str]) -> Check:
    versions = ", ".join(f"{name} {found[name]}" for name in names)
    if not names:
        advice = "pip install 'qexport[cpu]', or 'qexport[gpu]' with an NVIDIA GPU"
        return Check(name="onnxruntime", status="problem", found="not installed", advice=advice)
    if len(names) > 1:
        advice = "they overwrite each other: pip uninstall both, then install qexport[cpu] or qexport[gpu]"
        return Check(name="onnxruntime", status="warning", found=versions, advice=advice)
    return Check(name="onnxruntime", status="ok", found=versions)


def _gpu() -> Check:
    try:
        gpus = find_gpus()
    except EnvironmentMismatch as error:
        advice = "engines can be built with tensorrt-rtx, but not run here"
        return Check(name="gpu", status="warning", found=error.what, advice=advice)
    found = "; ".join(f"{gpu.name} ({gpu.capability}, {gpu.memory / _GIB:.0f} GiB)" for gpu in gpus)
    return Check(name="gpu", status="ok", found=found)


def _proc() -> Iterator[Check]:
    """Checks of what Linux tells in ``/proc``; other systems are told as unknown."""
    for name, path, check in (("cpu", "/proc/cpuinfo", check_cpu), ("memory", "/proc/meminfo", check_memory)):
        try:
            yield check(read_text(path))
        except QexportError:
            yield Check(name=name, status="warning", found="unknown", advice="looked at on Linux only")
