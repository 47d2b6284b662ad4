"""Memory of sessions that run on the processor, and what those take as arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qexport.errors import BuildFailed, DataInvalid, QexportError, ResourceExhausted
from qexport.runtime.session import Array, Buffer, Shape

_SPENT = re.compile("bad_alloc|out of memory|failed to allocate|pthread_create|resource temporarily", re.IGNORECASE)
_CPU, _CUDA, _PINNED = 1, 2, 3  # DLDeviceType


class HostMemory:
    """Buffers are arrays."""

    def zeros(self, shape: Shape, dtype: np.dtype[Any]) -> Array:
        """A new array of zeros."""
        return np.zeros(shape, dtype)

    def put(self, array: Array) -> Array:
        """The array itself."""
        return array

    def host(self, shape: Shape, dtype: np.dtype[Any]) -> Array:
        """The same."""
        return np.zeros(shape, dtype)

    def copy(self, old: Buffer, new: Buffer, rows: Sequence[int], columns: Sequence[int]) -> None:
        """Copy the first columns of some rows, and put zeros behind them."""
        given, taken = _array(old), _array(new)
        for place, (row, count) in enumerate(zip(rows, columns, strict=True)):
            taken[place, :, :count] = given[row, :, :count]
            taken[place, :, count:] = 0

    def clear(self, buffer: Buffer, columns: int) -> None:
        """Put zeros into the first columns."""
        _array(buffer)[:, :, :columns] = 0

    def free(self, buffer: Buffer) -> None:
        """Nothing: arrays are freed when nobody has them."""


HOST = HostMemory()


def failure(what: str) -> QexportError:
    """What a runtime said when it failed: of memory or threads that the system did not give, or of the model."""
    if _SPENT.search(what):
        return ResourceExhausted(what, hint="give it less at once, end other programs, or take a larger machine")
    return BuildFailed(what)


def device_of(value: object) -> int | None:
    """The GPU where something with ``__dlpack__`` lies; ``None`` for the memory of the processor.

    Raises:
        DataInvalid: It lies elsewhere.
    """
    kind, index = value.__dlpack_device__()  # type: ignore[attr-defined]  # whoever has __dlpack__ has this too
    if int(kind) not in (_CPU, _CUDA, _PINNED):
        raise DataInvalid(f"a tensor lies on a device of kind {int(kind)}", hint="bring it to the CPU or a CUDA GPU")
    return int(index) if int(kind) == _CUDA else None


def as_arrays(feeds: Mapping[str, Any]) -> dict[str, Array]:
    """Arrays over what is fed, not copied.

    Raises:
        DataInvalid: Something lies on a GPU.
    """
    return {name: value if type(value) is np.ndarray else as_array(name, value) for name, value in feeds.items()}


def as_array(name: str, value: Any) -> Array:
    """An array over the numbers of ``value``."""
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack__"):
        return np.asarray(value)
    if (index := device_of(value)) is not None:
        what = f"input {name!r} lies on GPU {index}, the session runs on the CPU"
        raise DataInvalid(what, hint="bring it to the CPU, or ask for a backend that runs on the GPU")
    try:
        return np.from_dlpack(value)
    except (BufferError, RuntimeError) as error:
        raise DataInvalid(f"input {name!r} cannot be read through DLPack: {error}") from error


def _array(buffer: Buffer) -> Array:
    assert isinstance(buffer, np.ndarray), "a buffer of another memory"
    return buffer
