"""A CUDA runtime on the memory of the processor, as asynchronous as the real one: work waits until it is waited for.

Memory on the "GPU" begins as junk, copies are checked against the blocks that were allocated, and what is freed twice
or used after that is an error. The functions are those of ``cuda.bindings.runtime`` and return tuples as they do.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from types import ModuleType

SUCCESS, NO_MEMORY, INVALID, FAILED = 0, 2, 1, 719


class Fault(Exception):
    """What a kernel or a copy does that real hardware would not survive."""


class Error(IntEnum):
    cudaSuccess = SUCCESS  # noqa: N815 the runtime's name
    cudaErrorInvalidValue = INVALID  # noqa: N815 the runtime's name
    cudaErrorMemoryAllocation = NO_MEMORY  # noqa: N815 the runtime's name
    cudaErrorLaunchFailure = FAILED  # noqa: N815 the runtime's name


class Kind(IntEnum):
    cudaMemcpyHostToDevice = 1  # noqa: N815 the runtime's name
    cudaMemcpyDeviceToHost = 2  # noqa: N815 the runtime's name
    cudaMemcpyDeviceToDevice = 3  # noqa: N815 the runtime's name


class Mode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1  # noqa: N815 the runtime's name


class Stream:
    def __init__(self, number):
        self.number, self.pending, self.recording = number, [], None

    def __int__(self):
        return self.number


class FakeCuda:
    """What tests look at: blocks that are allocated, streams, graphs, counts of calls."""

    def __init__(self, room=1 << 30):
        self.blocks, self.pinned, self.streams, self.graphs = {}, {}, {}, set()
        self.room, self.launched, self.devices, self.refuses = room, 0, [], None

    # what the fake engine needs

    def view(self, address, size):
        """Bytes on the GPU; an error where they are not all of one block that is allocated."""
        for start, block in list(self.blocks.items()):
            if start <= address and address + size <= start + len(block):
                return (ctypes.c_char * size).from_buffer(block, address - start)
        raise Fault(f"{size} bytes at {address} are not allocated")

    def put(self, stream, work):
        """Put work on a stream, or into what is recorded."""
        found = self.streams[int(stream)]
        (found.pending if found.recording is None else found.recording).append(work)

    @property
    def used(self):
        return sum(map(len, self.blocks.values()))

    # memory

    def cudaSetDevice(self, device):  # noqa: N802 the runtime's name
        self.devices.append(device)
        return (Error(SUCCESS),)

    def cudaMalloc(self, size):  # noqa: N802 the runtime's name
        if self.used + size > self.room:
            return Error(NO_MEMORY), None
        block = bytearray(b"\xab" * size)
        address = ctypes.addressof((ctypes.c_char * size).from_buffer(block))
        self.blocks[address] = block
        return Error(SUCCESS), address

    def cudaFree(self, address):  # noqa: N802 the runtime's name
        return (Error(SUCCESS if self.blocks.pop(address, None) is not None else INVALID),)

    def cudaMallocHost(self, size):  # noqa: N802 the runtime's name
        block = ctypes.create_string_buffer(b"\xab" * size, size)
        self.pinned[ctypes.addressof(block)] = block
        return Error(SUCCESS), ctypes.addressof(block)

    def cudaFreeHost(self, address):  # noqa: N802 the runtime's name
        return (Error(SUCCESS if self.pinned.pop(address, None) is not None else INVALID),)

    def cudaMemsetAsync(self, address, value, size, stream):  # noqa: N802 the runtime's name
        self.put(stream, lambda: ctypes.memset(ctypes.addressof(self.view(address, size)), value, size))
        return (Error(SUCCESS),)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):  # noqa: N802 the runtime's name
        def copy():
            for address, on_gpu in ((target, kind != 2), (source, kind != 1)):
                if on_gpu:
                    self.view(address, size)
            ctypes.memmove(target, source, size)

        self.put(stream, copy)
        return (Error(SUCCESS),)

    def cudaMemcpy2DAsync(self, target, pitch, source, step, width, height, kind, stream):  # noqa: N802 the runtime's name
        assert kind == Kind.cudaMemcpyDeviceToDevice
        assert width <= min(pitch, step)

        def copy():
            for row in range(height):
                piece = bytes(self.view(source + row * step, width))
                self.view(target + row * pitch, width)[:] = piece

        self.put(stream, copy)
        return (Error(SUCCESS),)

    # streams and graphs

    def cudaStreamCreateWithFlags(self, flags):  # noqa: N802 the runtime's name
        assert flags == 1
        made = Stream(1000 + len(self.streams))
        self.streams[made.number] = made
        return Error(SUCCESS), made

    def cudaStreamDestroy(self, stream):  # noqa: N802 the runtime's name
        return (Error(SUCCESS if self.streams.get(int(stream)) else INVALID),)

    def cudaStreamSynchronize(self, stream):  # noqa: N802 the runtime's name
        found = self.streams[int(stream)]
        assert found.recording is None, "a stream that is recorded cannot be waited for"
        work, found.pending = found.pending, []
        try:
            for step in work:
                step()
        except Fault as fault:
            self.fault = fault
            return (Error(FAILED),)
        return (Error(SUCCESS),)

    def cudaStreamBeginCapture(self, stream, mode):  # noqa: N802 the runtime's name
        assert mode == Mode.cudaStreamCaptureModeThreadLocal
        self.streams[int(stream)].recording = []
        return (Error(SUCCESS),)

    def cudaStreamEndCapture(self, stream):  # noqa: N802 the runtime's name
        found = self.streams[int(stream)]
        recorded, found.recording = found.recording, None
        if self.refuses:
            return Error(INVALID), None
        return Error(SUCCESS), tuple(recorded)

    def cudaGraphInstantiate(self, graph, flags):  # noqa: N802 the runtime's name
        assert flags == 0
        self.graphs.add(graph)
        return Error(SUCCESS), graph

    def cudaGraphDestroy(self, graph):  # noqa: N802 the runtime's name
        return (Error(SUCCESS),)

    def cudaGraphExecDestroy(self, graph):  # noqa: N802 the runtime's name
        self.graphs.remove(graph)
        return (Error(SUCCESS),)

    def cudaGraphLaunch(self, graph, stream):  # noqa: N802 the runtime's name
        assert graph in self.graphs
        self.launched += 1
        for work in graph:
            self.put(stream, work)
        return (Error(SUCCESS),)

    def cudaGetErrorString(self, error):  # noqa: N802 the runtime's name
        return Error(SUCCESS), Error(error).name.encode()

    def module(self):
        """The runtime as a module."""
        made = ModuleType("cuda.bindings.runtime")
        for name in dir(self):
            if name.startswith("cuda"):
                setattr(made, name, getattr(self, name))
        made.cudaMemcpyKind, made.cudaStreamCaptureMode, made.cudaStreamNonBlocking = Kind, Mode, 1
        return made
