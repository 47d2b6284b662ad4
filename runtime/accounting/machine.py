"""What this machine can do at most: bytes it reads in a second, numbers it multiplies, measured and not looked up.

Both are the roofs of the roofline (Williams, Waterman and Patterson 2009). What is reported as MBU and MFU is relative
to them, so each is the best of many tries: the machine is never told to be slower than it once was.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qexport.errors import QexportError
from qexport.runtime.session import load_onnxruntime
from qexport.safe_io import read_text

BLOCKS = (2 << 20, 8 << 20, 32 << 20, 128 << 20)  # bytes that are read again and again; the last is the memory's
SIZE = 512  # of the matrices that are multiplied
CPU = "cpu"  # what the processor is called among devices
TRIES, SECONDS = 12, 0.2  # at most, for each number
_KNOWN = ("vendor_id", "cpu family", "model", "model name", "stepping")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What times depend on, but for the model; two runs with the same one may be compared.

    Attributes:
        processor: What it calls itself.
        cores: How many this process may use.
        runtime: What runs the models, with its version.
        device: Where they run: ``cpu``, or a GPU by its name.
    """

    processor: str
    cores: int
    runtime: str
    device: str = CPU


@dataclass(frozen=True, slots=True)
class Machine:
    """Peaks of a machine for a number of threads.

    Attributes:
        fingerprint: Which machine.
        threads: How many.
        bandwidth: Pairs of a block's bytes and the bytes per second at which it is read again and again; small blocks
            stay in caches.
        flops: Operations per second of products in single precision, additions counted.
        flops_int8: The same for products of 8-bit integers; ``None`` where that was not measured.
    """

    fingerprint: Fingerprint
    threads: int
    bandwidth: tuple[tuple[int, float], ...]
    flops: float
    flops_int8: float | None = None

    @property
    def memory(self) -> float:
        """Bytes per second out of memory, where no cache helps."""
        return self.bandwidth[-1][1]

    def peak(self, working_set: float) -> float:
        """Bytes per second for what is read again and again and has so many bytes in all.

        A larger block is never read faster than a smaller one, so the best of those that are at least as large counts.
        """
        return max((rate for block, rate in self.bandwidth if block >= working_set), default=self.memory)

    def as_json(self) -> dict[str, Any]:
        """Plain values, for files."""
        return asdict(self)


class Meter(Protocol):
    """Times the work of one device once. A backend for GPUs brings its own, with times between its events."""

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the device."""
        ...

    @property
    def threads(self) -> int:
        """Threads of the processor that it uses."""
        ...

    def read(self, block: int, times: int) -> Callable[[], object]:
        """Prepare a block of so many bytes; what is returned reads it so many times."""
        ...

    def multiply(self, size: int) -> Callable[[], object]:
        """Prepare two matrices of ``size`` by ``size``; what is returned multiplies them in single precision."""
        ...

    def multiply_int8(self, size: int) -> Callable[[], object] | None:
        """The same for 8-bit integers; ``None`` where there is nothing that does it."""
        ...


def measure_machine(threads: int = 0, meter: Meter | None = None) -> Machine:
    """Measure the peaks, in less than two seconds.

    Args:
        threads: How many may work; 0 for all that there are.
        meter: Of another device than the processor.
    """
    device = meter or HostMeter(count_threads(threads))
    operations = 2.0 * SIZE**3
    rates = tuple((block, BLOCKS[-1] / _best(device.read(block, BLOCKS[-1] // block))) for block in BLOCKS)
    integers = device.multiply_int8(SIZE)
    return Machine(
        fingerprint=device.fingerprint,
        threads=device.threads,
        bandwidth=rates,
        flops=operations / _best(device.multiply(SIZE)),
        flops_int8=None if integers is None else operations / _best(integers),
    )


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest try."""
    started, best = time.perf_counter(), np.inf
    for tries in range(TRIES):
        begin = time.perf_counter()
        work()
        end = time.perf_counter()
        best = min(best, end - begin)
        if tries and end - started > SECONDS:
            break
    return max(best, 1e-9)


class HostMeter:
    """The processor: numpy reads, onnxruntime multiplies."""

    def __init__(self, threads: int) -> None:
        """Use so many threads."""
        self.threads = threads
        self.fingerprint = fingerprint()
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def read(self, block: int, times: int) -> Callable[[], object]:
        """Every thread looks through its part for the largest number; nothing is written."""
        parts = np.array_split(np.ones(block // 4, np.float32), self.threads)

        def read_part(part: NDArray[np.float32]) -> None:
            for _ in range(times):
                part.max()

        if self._pool is None:
            return lambda: read_part(parts[0])
        pool = self._pool
        return lambda: list(pool.map(read_part, parts))

    def multiply(self, size: int) -> Callable[[], object]:
        """MatMul of onnxruntime, of float32."""
        ones = np.ones((size, size), np.float32)
        run = self._product("MatMul", "FLOAT", "FLOAT")
        return lambda: run({"a": ones, "b": ones})

    def multiply_int8(self, size: int) -> Callable[[], object] | None:
        """MatMulInteger, which products of dynamically quantized models run."""
        a, b = np.ones((size, size), np.uint8), np.ones((size, size), np.int8)
        run = self._product("MatMulInteger", "UINT8", "INT8", "INT32")
        return lambda: run({"a": a, "b": b})

    def _product(self, op: str, left: str, right: str, result: str = "FLOAT") -> Callable[[Mapping[str, Any]], object]:
        """One product in onnxruntime, both factors given at every run."""
        import onnx_ir as ir

        a, b, y = (
            ir.Value(name=name, type=ir.TensorType(ir.DataType[kind]), shape=ir.Shape(["n", "n"]))
            for name, kind in (("a", left), ("b", right), ("y", result))
        )
        node = ir.Node("", op, [a, b], outputs=[y])
        graph = ir.Graph([a, b], [y], nodes=[node], opset_imports={"": 20}, name="product")
        data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
        ort = load_onnxruntime()
        settings = ort.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = self.threads, 4
        session = ort.InferenceSession(data, settings, providers=["CPUExecutionProvider"], enable_fallback=0)
        return lambda feeds: session.run(None, feeds)


def fingerprint(device: str = CPU, runtime: str | None = None) -> Fingerprint:
    """Say what times on this machine depend on.

    Args:
        device: Where models run; for a GPU the driver's name for it.
        runtime: What runs them, with its version; onnxruntime if not given.
    """
    told = runtime or f"onnxruntime {load_onnxruntime().__version__}"
    return Fingerprint(_processor(), count_threads(0), told, device)


def count_threads(asked: int) -> int:
    """How many threads ``asked`` stands for: 0 for all cores that this process may use."""
    if asked > 0:
        return asked
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """What the first core says of itself on Linux, what Python knows elsewhere."""
    try:
        first = read_text("/proc/cpuinfo").split("\n\n")[0]
    except QexportError:
        return platform.processor() or platform.machine()
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    found = [told[key] for key in _KNOWN if key in told]
    return " ".join(found) or platform.machine()
