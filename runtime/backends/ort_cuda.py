"""Buffers and bindings of onnxruntime on a GPU: what is bound lies there, small arrays go back and forth.

An array that is bound as an input is copied once, when it is bound; so inputs are bound where they lie on the GPU and
written anew before each run. That also lets onnxruntime record a run as a CUDA graph, which keeps its addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from types import ModuleType
from typing import Any

import numpy as np

from qexport.errors import DataInvalid
from qexport.runtime.backends.host import HOST, as_array, device_of, failure
from qexport.runtime.session import Array, Buffer, SessionOptions, Shape

CUDA = "CUDAExecutionProvider"
EAGER = -1  # no graph is recorded
_GRAPH = "gpu_graph_id"
_ids = count(1)  # 0 is onnxruntime's own; a number never stands for two shapes, which it would not notice


@dataclass(eq=False, slots=True)
class Held:
    """A buffer on the GPU; ``value`` is ``None`` once it is freed."""

    value: Any
    shape: Shape
    dtype: np.dtype[Any]


class DeviceMemory:
    """Buffers on a GPU. They grow and lose rows by way of the processor, which happens rarely."""

    def __init__(self, ort: ModuleType, device: int) -> None:
        """Allocate by ``ort`` on the GPU ``device``."""
        self._ort, self._device = ort, device

    def zeros(self, shape: Shape, dtype: np.dtype[Any]) -> Held:
        """A new buffer of zeros."""
        return self.put(np.zeros(shape, dtype))

    def put(self, array: Array) -> Held:
        """A buffer with the numbers of an array."""
        value = self._ort.OrtValue.ortvalue_from_numpy(array, "cuda", self._device)
        return Held(value, array.shape, array.dtype)

    def host(self, shape: Shape, dtype: np.dtype[Any]) -> Array:
        """An array of zeros."""
        return np.zeros(shape, dtype)

    def copy(self, old: Buffer, new: Buffer, rows: Sequence[int], columns: Sequence[int]) -> None:
        """Copy the first columns of some rows, and put zeros behind them."""
        made = np.empty(new.shape, new.dtype)
        HOST.copy(_held(old).value.numpy(), made, rows, columns)
        _held(new).value.update_inplace(made)

    def clear(self, buffer: Buffer, columns: int) -> None:
        """Put zeros everywhere, of which the first ``columns`` columns are a part."""
        if columns:
            _held(buffer).value.update_inplace(np.zeros(buffer.shape, buffer.dtype))

    def free(self, buffer: Buffer) -> None:
        """Give it back to onnxruntime."""
        _held(buffer).value = None


class DeviceBinding:
    """Arrays that go to the GPU before each run and come back after it, and buffers that stay there."""

    def __init__(
        self,
        ort: ModuleType,
        session: Any,
        options: SessionOptions,
        inputs: Mapping[str, Array | Buffer],
        outputs: Mapping[str, Array | Buffer],
    ) -> None:
        """Make room on the GPU for the arrays and bind everything."""
        self._session, self._binding = session, session.io_binding()
        self._eager, self._number, self._recorded = _run_options(ort, EAGER), 0, None
        if options.graphs:
            self._number = next(_ids)
            self._recorded = _run_options(ort, self._number)
        self._ran = False
        make = ort.OrtValue.ortvalue_from_shape_and_type
        self._sent: list[tuple[Any, Array]] = []
        self._fetched: list[tuple[Any, Array]] = []
        for given, bind, copied in (
            (inputs, self._binding.bind_ortvalue_input, self._sent),
            (outputs, self._binding.bind_ortvalue_output, self._fetched),
        ):
            for name, array in given.items():
                if isinstance(array, Held):
                    bind(name, array.value)
                    continue
                mine = as_array(name, array)
                value = make(mine.shape, mine.dtype.type, "cuda", options.device)
                bind(name, value)
                copied.append((value, mine))

    def run(self) -> None:
        """Send, run, fetch."""
        try:
            for value, array in self._sent:
                value.update_inplace(array)
            again = self._ran and self._recorded is not None  # what runs once is not worth recording
            self._session.run_with_iobinding(self._binding, self._recorded if again else self._eager)
            self._ran = True
            for value, array in self._fetched:
                array[...] = value.numpy()
        except Exception as error:
            raise failure(f"onnxruntime failed on bound arrays: {error}") from error

    def close(self) -> None:
        """Give back the graph that was recorded and the room on the GPU."""
        release = getattr(self._session, "release_captured_graph", None)  # onnxruntime has it since 1.31
        if self._recorded is not None and self._ran and release is not None:
            release(self._number)
        self._recorded = None
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        self._sent.clear()
        self._fetched.clear()


def device_values(
    ort: ModuleType, session: Any, device: int, given: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Run once with the outputs left on the GPU; tensors that lie there are read where they are.

    Raises:
        DataInvalid: A tensor lies on another GPU.
        BuildFailed: onnxruntime failed.
    """
    binding, run = session.io_binding(), _run_options(ort, EAGER)
    for name, value in given.items():
        binding.bind_ortvalue_input(name, _sent(ort, device, name, value))
    for name in names:
        binding.bind_output(name, "cuda", device)
    try:
        session.run_with_iobinding(binding, run)
    except Exception as error:
        raise failure(f"onnxruntime failed: {error}") from error
    return dict(zip(names, binding.get_outputs(), strict=True))


def _run_options(ort: ModuleType, graph: int) -> Any:
    """To record a run as this graph, or to run what was recorded as it."""
    made = ort.RunOptions()
    made.add_run_config_entry(_GRAPH, str(graph))
    return made


def _sent(ort: ModuleType, device: int, name: str, value: Any) -> Any:
    """What is fed, on the GPU."""
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack__") or device_of(value) is None:
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(as_array(name, value)), "cuda", device)
    if device_of(value) != device:
        raise DataInvalid(f"input {name!r} lies on GPU {device_of(value)}, the session runs on GPU {device}")
    return ort.OrtValue.from_dlpack(value)


def _held(buffer: Buffer) -> Held:
    assert isinstance(buffer, Held), "a buffer of another memory"
    return buffer
