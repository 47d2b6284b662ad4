"""What every backend is to those who run models: a session over a loaded model, arrays bound to it, its memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.errors import EnvironmentMismatch
from qexport.runtime.demands import demand_integer, demand_names

Array: TypeAlias = NDArray[Any]
Feeds: TypeAlias = Mapping[str, Array]
Shape: TypeAlias = tuple[int, ...]
Profile: TypeAlias = Mapping[str, tuple[Shape, Shape, Shape]]
"""Of every input the smallest, the best and the largest shape that an engine was built for."""

# Its CPU kernel is several times slower than the Add and LayerNormalization that it replaces (onnxruntime 1.31).
SLOW_FUSIONS = ("SkipLayerNormFusion",)
MOST_THREADS = 1024


def load_onnxruntime() -> ModuleType:
    """Import onnxruntime, or say what to install.

    Importing it would start an uploader, a database in the cache folder and a file in the temporary folder, before
    ``disable_telemetry_events`` can be called.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentMismatch(
            "onnxruntime is not installed",
            hint="pip install 'qexport[cpu]', or 'qexport[gpu]' on a machine with an NVIDIA GPU, never both",
        ) from error
    onnxruntime.disable_telemetry_events()
    return onnxruntime  # type: ignore[no-any-return]  # it has no types


def available_providers() -> tuple[str, ...]:
    """Execution providers of the onnxruntime that is installed, CPU always among them."""
    return tuple(load_onnxruntime().get_available_providers())


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How to run.

    Attributes:
        backend: ``ort-cpu``, ``ort-cuda``, ``tensorrt-rtx`` or ``tensorrt``; where it is left open, ``open_session``
            chooses by what was built and what the machine has.
        device: Which GPU, as the driver counts them.
        graphs: Whether calls that come again in the same shape are recorded as CUDA graphs, which saves the time to
            launch their kernels one by one.
        threads: Threads inside one operator, up to 1024; 0 lets onnxruntime choose.
        spin: Whether threads without work wait in a loop. A session alone answers sooner by it; of two that run
            in turn, each takes the processor from the other.
        providers: Execution providers of onnxruntime in order of preference.
        optimize: Whether onnxruntime may rewrite the graph.
        disabled: Its optimizers that stay off.
        literal: Whether Q/DQ nodes run as they are written, instead of being merged into integer kernels; weights
            are dequantized once, at load.
        lean: Whether to do without copies of weights and without memory kept for the next run. Weights that are kept
            outside of the model are inputs of it then: onnxruntime copies initializers, and inputs it does not.
        profile: Where the times of all operators go, a path without its ending; ``runtime.profile`` reads them.
    """

    backend: str | None = None
    device: int = 0
    graphs: bool = False
    threads: int = 0
    spin: bool = True
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    optimize: bool = True
    disabled: tuple[str, ...] = SLOW_FUSIONS
    literal: bool = False
    lean: bool = False
    profile: str | None = None

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` on numbers out of their range, and on names that are none."""
        demand_integer("device", self.device, 0)
        demand_integer("threads", self.threads, 0, MOST_THREADS)
        demand_names("providers", self.providers)
        demand_names("disabled", self.disabled, empty=True)


_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(bool)": np.dtype(np.bool_),
}


@dataclass(frozen=True, slots=True)
class Port:
    """An input or an output of a model.

    Attributes:
        name: Its name.
        kind: Its type in onnxruntime's words, such as ``tensor(float)``.
        shape: Sizes; a string or ``None`` where one is free.
    """

    name: str
    kind: str
    shape: tuple[int | str | None, ...]

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """Type of its elements, if it is a tensor of one that numpy knows."""
        return _TYPES.get(self.kind)


class Buffer(Protocol):
    """Numbers in the memory of a session, which a graph reads and writes where they lie; arrays are such on a CPU."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of its numbers."""


class Memory(Protocol):
    """Where the buffers of a session lie. Buffers here are ``[rows, heads, columns, size]``."""

    def zeros(self, shape: Shape, dtype: np.dtype[Any]) -> Buffer:
        """A new buffer of zeros."""

    def put(self, array: Array) -> Buffer:
        """A buffer with the numbers of an array of any shape."""

    def host(self, shape: Shape, dtype: np.dtype[Any]) -> Array:
        """An array on the CPU that the session copies from and to at its best speed."""

    def copy(self, old: Buffer, new: Buffer, rows: Sequence[int], columns: Sequence[int]) -> None:
        """Let row ``i`` of ``new`` begin with the first ``columns[i]`` columns of row ``rows[i]``; all else is zero."""

    def clear(self, buffer: Buffer, columns: int) -> None:
        """Put zeros into the first ``columns`` columns of every row."""

    def free(self, buffer: Buffer) -> None:
        """Give its memory back."""


class Binding(Protocol):
    """Arrays and buffers that every run reads and writes; their shapes are those of each run. For one thread."""

    def run(self) -> None:
        """Run once: read what the arrays hold now, leave the results in those of the outputs.

        Raises:
            BuildFailed: An array has a shape or type that the model has not, or an operator failed.
        """

    def close(self) -> None:
        """Let go of what a run needs besides the arrays; a second time does nothing."""


class Session(Protocol):
    """A loaded model. It may be used from several threads, each with bindings of its own.

    Attributes:
        backend: ``ort-cpu``, ``ort-cuda``, ``tensorrt-rtx`` or ``tensorrt``.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        ports: The inputs with types and shapes.
        results: The outputs likewise.
        metadata: What the file says of itself.
        profiles: Shapes that it takes, one of these at a time; empty where it takes all that fit the ports.
        memory: Where buffers lie.
    """

    backend: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ports: tuple[Port, ...]
    results: tuple[Port, ...]
    metadata: dict[str, str]
    profiles: tuple[Profile, ...]
    memory: Memory

    def bind(self, inputs: Mapping[str, Array | Buffer], outputs: Mapping[str, Array | Buffer]) -> Binding:
        """Bind all inputs and outputs for any number of runs.

        Args:
            inputs: Arrays that each run copies from, and buffers of ``memory``, which it reads where they lie.
            outputs: The same for what it writes; an output may be the buffer that an input reads if its operator can
                do that.
        """

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once; returns the named outputs, all of them by default.

        Args:
            feeds: Arrays, or anything with ``__dlpack__``, such as tensors of torch, on the CPU or the session's GPU.
            outputs: Names.

        Raises:
            DataInvalid: An input is missing, or lies where the session cannot read it.
            BuildFailed: The backend failed.
        """

    def run_dlpack(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """The same, but what is returned stays where the session runs, and has ``__dlpack__``."""

    def close(self) -> None:
        """Free the model; a second time does nothing."""
