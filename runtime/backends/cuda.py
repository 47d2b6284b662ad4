"""The few calls of the CUDA runtime that sessions over engines need: memory, copies, streams, graphs.

The calls are those of ``cuda.bindings.runtime``, which is a value here. Each returns a tuple whose first member is the
error.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from qexport.errors import BuildFailed, EnvironmentMismatch, ResourceExhausted, UsageError
from qexport.runtime.session import Array, Buffer, Shape

_NO_MEMORY = 2  # cudaErrorMemoryAllocation
_NO_DEVICE = {35, 100, 101}  # driver too old, no device, no such device


def open_cuda(device: int = 0) -> Cuda:
    """The CUDA runtime for a GPU.

    Raises:
        EnvironmentMismatch: The package is not installed, or there is no such GPU.
    """
    try:
        from cuda.bindings import runtime
    except (ImportError, OSError, RuntimeError) as error:
        raise EnvironmentMismatch(
            f"the CUDA runtime cannot be imported: {error}", hint="pip install 'qexport[cuda]'"
        ) from error
    return Cuda(runtime, device)


@dataclass(eq=False)
class DeviceBuffer:
    """Memory on a GPU, which is given back by ``release`` or when nobody has it any more.

    Attributes:
        address: Where it begins.
        shape: Sizes of its axes.
        dtype: Type of its numbers.
    """

    address: int
    shape: Shape
    dtype: np.dtype[Any]
    release: Callable[[], Any] = field(repr=False, default=lambda: None)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Cuda:
    """The CUDA runtime on one GPU; usable from several threads, each of which calls ``use`` first."""

    def __init__(self, runtime: ModuleType, device: int = 0) -> None:
        """Take ``runtime`` for ``cuda.bindings.runtime``."""
        self._runtime, self.device = runtime, device
        self.use()

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the runtime; returns what it returns besides the error.

        Raises:
            ResourceExhausted: The GPU has not enough memory.
            EnvironmentMismatch: There is no such GPU, or its driver is too old.
            BuildFailed: Any other error.
        """
        error, *found = getattr(self._runtime, name)(*arguments)
        if int(error):
            raise self._failure(name, error)
        return found[0] if len(found) == 1 else tuple(found)

    def use(self) -> None:
        """Let the calls of this thread be about this GPU."""
        self.call("cudaSetDevice", self.device)

    # ------------------------------------------------------------ memory

    def buffer(self, shape: Shape, dtype: np.dtype[Any]) -> DeviceBuffer:
        """New memory on the GPU, not cleared."""
        made = DeviceBuffer(0, shape, dtype)
        made.address = int(self.call("cudaMalloc", max(made.nbytes, 1)))
        made.release = when_gone(made, self.call, "cudaFree", made.address)
        return made

    def pinned(self, shape: Shape, dtype: np.dtype[Any]) -> Array:
        """An array of zeros that the GPU copies from and to by itself."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        address = int(self.call("cudaMallocHost", max(size, 1)))
        memory = (ctypes.c_char * max(size, 1)).from_address(address)
        when_gone(memory, self.call, "cudaFreeHost", address)
        array: Array = np.frombuffer(memoryview(memory).cast("B")[:size], dtype).reshape(shape)
        array[...] = 0
        return array

    def clear(self, buffer: DeviceBuffer, stream: Any) -> None:
        """Put zeros everywhere."""
        self.call("cudaMemsetAsync", buffer.address, 0, buffer.nbytes, stream)

    def send(self, array: Array, address: int, stream: Any) -> None:
        """Copy an array, which lies in one piece, to the GPU."""
        self._copy("cudaMemcpyHostToDevice", address, array.ctypes.data, array.nbytes, stream)

    def fetch(self, address: int, array: Array, stream: Any) -> None:
        """Copy from the GPU into an array, which lies in one piece."""
        self._copy("cudaMemcpyDeviceToHost", array.ctypes.data, address, array.nbytes, stream)

    def copy_rows(self, source: tuple[int, int], target: tuple[int, int], block: tuple[int, int], stream: Any) -> None:
        """Copy pieces of memory on the GPU that lie at equal distances.

        Args:
            source: Address of the first piece, bytes from one to the next.
            target: The same of where they go.
            block: Bytes of a piece, number of pieces.
            stream: In order with what else is on it.
        """
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpy2DAsync", *target, *source, *block, kind, stream)

    def _copy(self, kind: str, target: int, source: int, size: int, stream: Any) -> None:
        self.call("cudaMemcpyAsync", target, source, size, getattr(self._runtime.cudaMemcpyKind, kind), stream)

    # ------------------------------------------------------------ streams and graphs

    def stream(self) -> Any:
        """A new stream, which does not wait for the default one."""
        return self.call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)

    def wait(self, stream: Any) -> None:
        """Until all that is on the stream is done."""
        self.call("cudaStreamSynchronize", stream)

    def end_stream(self, stream: Any) -> None:
        """Give a stream back."""
        self.call("cudaStreamDestroy", stream)

    def record(self, work: Callable[[], None], stream: Any) -> Any:
        """Record what ``work`` puts on the stream instead of doing it; returns a graph for ``launch``."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", stream, mode)
        try:
            work()
        finally:
            graph = self.call("cudaStreamEndCapture", stream)
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: Any) -> None:
        """Do what was recorded."""
        self.call("cudaGraphLaunch", graph, stream)

    def end_graph(self, graph: Any) -> None:
        """Give a graph back."""
        self.call("cudaGraphExecDestroy", graph)

    def _failure(self, name: str, error: Any) -> Exception:
        _, text = self._runtime.cudaGetErrorString(error)
        told = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
        if int(error) == _NO_MEMORY:
            hint = "free GPU memory, or take a smaller batch"
            return ResourceExhausted(f"{name}: the GPU has not enough memory", hint=hint)
        kind = EnvironmentMismatch if int(error) in _NO_DEVICE else BuildFailed
        return kind(f"{name}: {told}")


class CudaMemory:
    """Buffers on a GPU, ``[rows, heads, columns, size]``; copies between them stay there."""

    def __init__(self, cuda: Cuda) -> None:
        """Allocate on the GPU of ``cuda``."""
        self._cuda, self.stream, self._closed = cuda, cuda.stream(), False

    def zeros(self, shape: Shape, dtype: np.dtype[Any]) -> DeviceBuffer:
        """A new buffer of zeros."""
        self._demand_open()
        made = self._cuda.buffer(shape, dtype)
        self._cuda.clear(made, self.stream)
        self._cuda.wait(self.stream)
        return made

    def put(self, array: Array) -> DeviceBuffer:
        """A buffer with the numbers of an array."""
        self._demand_open()
        made = self._cuda.buffer(array.shape, array.dtype)
        self._cuda.send(np.ascontiguousarray(array), made.address, self.stream)
        self._cuda.wait(self.stream)
        return made

    def host(self, shape: Shape, dtype: np.dtype[Any]) -> Array:
        """An array that copies need not stage."""
        self._demand_open()
        return self._cuda.pinned(shape, dtype)

    def copy(self, old: Buffer, new: Buffer, rows: Sequence[int], columns: Sequence[int]) -> None:
        """Copy the first columns of some rows, and put zeros behind them."""
        self._demand_open()
        source, made = device_buffer(old), device_buffer(new)
        self._cuda.clear(made, self.stream)
        (_, heads, wide, size), target_wide = old.shape, new.shape[2]
        piece = size * old.dtype.itemsize
        for place, (row, count) in enumerate(zip(rows, columns, strict=True)):
            if count:
                given = source.address + row * heads * wide * piece, wide * piece
                taken = made.address + place * heads * target_wide * piece, target_wide * piece
                self._cuda.copy_rows(given, taken, (count * piece, heads), self.stream)
        self._cuda.wait(self.stream)

    def clear(self, buffer: Buffer, columns: int) -> None:
        """Put zeros everywhere, of which the first ``columns`` columns are a part."""
        if columns:
            self._demand_open()
            self._cuda.clear(device_buffer(buffer), self.stream)
            self._cuda.wait(self.stream)

    def free(self, buffer: Buffer) -> None:
        """Give it back."""
        device_buffer(buffer).release()

    def close(self) -> None:
        """End the stream; buffers can still be freed."""
        self._cuda.end_stream(self.stream)
        self._closed = True

    def _demand_open(self) -> None:
        if self._closed:
            raise UsageError("the session is closed")
        self._cuda.use()


def device_buffer(buffer: Buffer) -> DeviceBuffer:
    """The same, known to lie on a GPU."""
    assert isinstance(buffer, DeviceBuffer), "a buffer of another memory"
    return buffer


def when_gone(thing: object, call: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Call once when ``thing`` is collected or when what is returned is called; not when the process ends."""
    made = weakref.finalize(thing, _quietly, call, *arguments)
    made.atexit = False
    return made


def _quietly(call: Callable[..., Any], *arguments: Any) -> None:
    """Give something back when it is collected; a GPU that is gone by then has nothing left to free."""
    try:
        call(*arguments)
    except (BuildFailed, EnvironmentMismatch):
        return
