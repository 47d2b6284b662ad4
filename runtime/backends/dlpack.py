"""Tensors on a GPU to and from other libraries without a copy, by DLPack: a capsule around a C structure.

The structures are those of ``dlpack.h`` (DLPack 0.8, the form that every library still gives where no version is
asked for).
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from qexport.errors import DataInvalid
from qexport.runtime.backends.cuda import DeviceBuffer, when_gone

_CUDA = 2
_NAME, _USED = b"dltensor", b"used_dltensor"
_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}  # DLDataTypeCode of numpy's kinds


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_DELETER = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("manager_ctx", ctypes.c_void_p), ("deleter", _DELETER))

_END = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _python(name: str, result: Any, *arguments: Any) -> Any:
    """A function of Python's C interface; capsules go in by their address, which leaves their counts alone."""
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_pointer = _python("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
_rename = _python("PyCapsule_SetName", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_valid = _python("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_new = _python("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _END)

_lent: dict[int, tuple[Any, ...]] = {}  # by address of the structure, all that must live until it is given back


class DeviceTensor:
    """A tensor in the memory of a GPU: for ``torch.from_dlpack`` and the like."""

    def __init__(self, buffer: DeviceBuffer, device: int) -> None:
        """Show a buffer, whose work is done."""
        self._buffer, self._device = buffer, device
        self.shape, self.dtype = buffer.shape, buffer.dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        """CUDA, and which GPU."""
        return _CUDA, self._device

    def __dlpack__(self, *, stream: object = None, **asked: object) -> object:
        """A capsule over the memory, which lives until the capsule's taker is done with it."""
        return _lend(self._buffer, self._device)


def read_tensor(name: str, value: Any, device: int, stream: int) -> DeviceBuffer:
    """A buffer over a tensor of another library.

    Args:
        name: Of the input, for messages.
        value: What has ``__dlpack__``.
        device: The GPU where it must lie.
        stream: The other library's work on the tensor comes before what is put on this one from now on.

    Raises:
        DataInvalid: It lies elsewhere, not in one piece, or is of a type that numpy has not.
    """
    found = value.__dlpack_device__()
    if (int(found[0]), int(found[1])) != (_CUDA, device):
        raise DataInvalid(f"input {name!r} lies on another device than the session, which runs on GPU {device}")
    capsule = value.__dlpack__(stream=stream)
    managed = ctypes.cast(_pointer(id(capsule), _NAME), ctypes.POINTER(_Managed))
    tensor = managed.contents.tensor
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    kind = {code: kind for kind, code in _KINDS.items()}.get(tensor.code)
    if kind is None or tensor.lanes != 1 or (tensor.strides and not _compact(tensor, shape)):
        what = f"input {name!r} is of a type that is not read, or does not lie in one piece"
        raise DataInvalid(what, hint="make it contiguous, of floats, integers or booleans")
    dtype = np.dtype(f"{kind}{tensor.bits // 8}")
    _rename(id(capsule), _USED)
    buffer = DeviceBuffer((tensor.data or 0) + tensor.byte_offset, shape, dtype)
    buffer.release = when_gone(buffer, _give_back, managed, value)
    return buffer


def _compact(tensor: _Tensor, shape: tuple[int, ...]) -> bool:
    step = 1
    for axis in reversed(range(len(shape))):
        if shape[axis] != 1 and tensor.strides[axis] != step:
            return False
        step *= shape[axis]
    return True


def _give_back(managed: Any, _owner: object) -> None:
    """Tell the other library that its tensor is not read any more."""
    if managed.contents.deleter:
        managed.contents.deleter(managed)


def _lend(buffer: DeviceBuffer, device: int) -> object:
    ndim = len(buffer.shape)
    shape = (ctypes.c_int64 * max(ndim, 1))(*buffer.shape)
    managed = _Managed()
    tensor = managed.tensor
    tensor.data, tensor.device_type, tensor.device_id, tensor.ndim = buffer.address, _CUDA, device, ndim
    tensor.code, tensor.bits, tensor.lanes = _KINDS[buffer.dtype.kind], 8 * buffer.dtype.itemsize, 1
    tensor.shape, tensor.byte_offset = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)), 0
    managed.deleter = _taken
    address = ctypes.addressof(managed)
    _lent[address] = managed, shape, buffer
    return _new(address, _NAME, _untaken)


def _forget(managed: Any) -> None:
    _lent.pop(ctypes.addressof(managed.contents), None)


def _end(capsule: int) -> None:
    """A capsule that nobody took."""
    if _valid(capsule, _NAME):
        _lent.pop(_pointer(capsule, _NAME), None)


_taken, _untaken = _DELETER(_forget), _END(_end)  # C calls them as long as the process lives


_FORGET, _UNUSED = _forget, _end
