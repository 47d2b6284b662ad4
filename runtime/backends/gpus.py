"""Which NVIDIA GPUs the driver offers, asked through its C interface without any other package."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

from qexport.errors import EnvironmentMismatch

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_REASONS = {
    34: "the driver library is a stub",
    100: "the driver finds no GPU",
    803: "the driver and its library are of different versions",
    804: "the GPU does not support this driver's forward compatibility",
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: its name, compute capability such as ``"8.9"``, memory in bytes."""

    name: str
    capability: str
    memory: int


def find_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs, at least one.

    Raises:
        EnvironmentMismatch: There is no driver, or it offers no GPU.
    """
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise EnvironmentMismatch(f"no NVIDIA driver: {_LIBRARY} cannot be loaded") from error
    return read_gpus(library)


def read_gpus(library: Any) -> tuple[Gpu, ...]:
    """Ask the driver behind ``library``, an object with the functions of the CUDA driver interface."""
    _check(library.cuInit(0))
    count = ctypes.c_int()
    _check(library.cuDeviceGetCount(ctypes.byref(count)))
    if not count.value:
        raise EnvironmentMismatch(_REASONS[100])
    return tuple(_read_gpu(library, index) for index in range(count.value))


def find_cuda(library: Any = None) -> tuple[int, int] | None:
    """The newest CUDA that the driver speaks, as major and minor; ``None`` without a driver."""
    version = ctypes.c_int()
    try:
        status = (library or ctypes.CDLL(_LIBRARY)).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if status or not version.value else divmod(version.value // 10, 100)


def _read_gpu(library: Any, index: int) -> Gpu:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    major, minor = ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    _check(library.cuDeviceGet(ctypes.byref(device), index))
    _check(library.cuDeviceGetName(name, len(name), device))
    _check(library.cuDeviceTotalMem_v2(ctypes.byref(memory), device))
    _check(library.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device))
    _check(library.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device))
    return Gpu(name.value.decode("utf-8", "replace"), f"{major.value}.{minor.value}", memory.value)


def _check(status: int) -> None:
    if status:
        reason = _REASONS.get(status, f"the CUDA driver answers with error {status}")
        raise EnvironmentMismatch(reason)
