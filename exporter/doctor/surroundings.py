"""Checks of what is not a package: Python, GPU, CPU, memory, folders."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from qexport.errors import EnvironmentMismatch, QexportError, UnsafeInput
from qexport.runtime.backends.gpus import find_gpus
from qexport.safe_io import Cache, read_text, write_bytes

_OLDEST_PYTHON = (3, 11)
_INT8_FLAGS = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
_GIB = 1 << 30
_LOW_MEMORY = 2 * _GIB
_LOW_DISK = 2 * _GIB
_LOW_SHARED = _GIB // 16
_SHARED = "/dev/shm"
_GROUP = "/sys/fs/cgroup/memory.max"  # of this container
CACHE_FOLDER = "cache folder"


class Check(BaseModel):
    """One thing that was looked at; ``advice`` says what to do about it, or is empty."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    status: Literal["ok", "warning", "problem"]
    found: str
    advice: str = ""


def look_around(cache: Path | None = None) -> tuple[Check, ...]:
    """Check everything there is here, with the folder of the cache where one is given; starts no process."""
    return (_python(), check_gpu(), *_proc(), *_shared_memory(), *_folders(cache))


def check_gpu() -> Check:
    """Ask the driver; without a GPU models can be built, so that is no problem."""
    try:
        gpus = find_gpus()
    except EnvironmentMismatch as error:
        advice = "engines can be built with tensorrt-rtx, but not run here"
        return Check(name="gpu", status="warning", found=error.what, advice=advice)
    found = "; ".join(f"{gpu.name} ({gpu.capability}, {gpu.memory / _GIB:.0f} GiB)" for gpu in gpus)
    return Check(name="gpu", status="ok", found=found)


def check_cpu(cpuinfo: str) -> Check:
    """Judge the CPU by the words of ``/proc/cpuinfo``: without int8 dot products int8 is hardly faster than float."""
    words = set(cpuinfo.split())
    flags = [flag for flag in _INT8_FLAGS if flag in words]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{platform.machine()}, {cores} cores, {', '.join(flags) or 'no int8 dot products known'}"
    advice = "" if flags else "int8 may not be faster than float here: measure before choosing the target ort-cpu"
    return Check(name="cpu", status="ok" if flags else "warning", found=found, advice=advice)


def check_memory(meminfo: str, group: str = "") -> Check:
    """Judge the memory by the texts of ``/proc/meminfo`` and of the control group's ``memory.max``, if there is one."""
    sizes = {line.partition(":")[0]: line.partition(":")[2].split() for line in meminfo.splitlines()}
    if not sizes.get("MemAvailable"):
        return Check(name="memory", status="warning", found="unknown", advice="the system does not tell what is free")
    available = int(sizes["MemAvailable"][0]) << 10
    advice = "large models may not fit: close other programs" if available < _LOW_MEMORY else ""
    found = f"{available / _GIB:.1f} GiB available"
    if group.strip().isdecimal() and (limit := int(group)) < available:
        found += f", {limit / _GIB:.1f} GiB of them to this control group"
        advice = "large models may not fit: give the container more" if limit < _LOW_MEMORY else ""
    return Check(name="memory", status="warning" if advice else "ok", found=found, advice=advice)


def check_folder(name: str, path: Path) -> Check:
    """Judge a folder by its free space and by writing a small file into it, or into the folder it would be made in."""
    try:
        place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        probe = place / f".qexport-{secrets.token_hex(8)}"
        write_bytes(probe, b"qexport")
        probe.unlink()
        free = shutil.disk_usage(place).free
    except (QexportError, OSError) as error:
        reason = error.what if isinstance(error, QexportError) else _said(error)
        return Check(name=name, status="problem", found=f"{path}: {reason}", advice="choose another folder")
    advice = "free some space" if free < _LOW_DISK else ""
    found = f"{path}, {free / _GIB:.1f} GiB free"
    return Check(name=name, status="warning" if advice else "ok", found=found, advice=advice)


def check_cache(path: Path) -> Check:
    """Judge the folder of the cache as a folder, and by what builds demand of it: that it is its user's alone."""
    try:
        with suppress(OSError):  # which the other check tells
            Cache(path).entries()
    except UnsafeInput as error:
        found, advice = f"{error.where}: {error.what}", f"{error.hint}; builds refuse it"
        return Check(name=CACHE_FOLDER, status="problem", found=found, advice=advice)
    return check_folder(CACHE_FOLDER, path)


def _python() -> Check:
    fine = sys.version_info >= _OLDEST_PYTHON
    found = f"{platform.python_version()} on {platform.system()}"
    advice = "" if fine else f"needs {'.'.join(map(str, _OLDEST_PYTHON))}"
    return Check(name="python", status="ok" if fine else "problem", found=found, advice=advice)


def _proc() -> Iterator[Check]:
    """Checks of what Linux tells in ``/proc``; other systems are told as unknown."""
    for name, path, check in (("cpu", "/proc/cpuinfo", check_cpu), ("memory", "/proc/meminfo", _memory)):
        try:
            yield check(read_text(path))
        except QexportError:
            yield Check(name=name, status="warning", found="unknown", advice="looked at on Linux only")


def _memory(meminfo: str) -> Check:
    """Judge the memory, with the limit of the control group where there is one."""
    try:
        return check_memory(meminfo, read_text(_GROUP))
    except QexportError:
        return check_memory(meminfo)


def check_shared_memory(free: int) -> Check:
    """Judge the bytes that are free in ``/dev/shm``: containers get little of it, and other frameworks need it."""
    advice = "give the container more, as docker run --shm-size=1g does" if free < _LOW_SHARED else ""
    found = f"{_SHARED}, {free / _GIB:.2f} GiB free"
    return Check(name="shared memory", status="warning" if advice else "ok", found=found, advice=advice)


def _shared_memory() -> Iterator[Check]:
    with suppress(OSError):  # Linux alone has it
        yield check_shared_memory(shutil.disk_usage(_SHARED).free)


def _folders(cache: Path | None) -> Iterator[Check]:
    """Checks of the folders that are used when none is named."""
    if cache is not None:
        yield check_cache(cache)
    for name, find in (("temporary folder", tempfile.gettempdir), ("current folder", os.getcwd)):
        try:
            path = Path(find())
        except OSError as error:
            yield Check(name=name, status="problem", found=_said(error), advice="choose another folder")
        else:
            yield check_folder(name, path)


def _said(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
