"""Arrays and buffers that an engine reads and writes: what lies where on the GPU, and a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qexport.errors import BuildFailed, DataInvalid, UsageError
from qexport.runtime.backends.cuda import DeviceBuffer
from qexport.runtime.backends.lanes import Lane
from qexport.runtime.session import Array, Buffer, Port, Shape

if TYPE_CHECKING:
    from qexport.runtime.backends.tensorrt import EngineSession

_WARM = 2  # runs before a graph is recorded: by then memory is there and kernels are chosen


class EngineBinding:
    """See ``runtime.session.Binding``. A binding that runs often gets a context of its own where graphs are asked for.

    A recorded graph is good for the context that it was recorded from only as long as that has the same shapes and
    addresses (TensorRT's documentation, "CUDA Graphs"); so that context is kept from all others.
    """

    def __init__(
        self, session: EngineSession, inputs: Mapping[str, Array | Buffer], outputs: Mapping[str, Array | Buffer]
    ) -> None:
        """Find the profile for these shapes, and room on the GPU for arrays.

        Raises:
            DataInvalid: An input is missing, of another type, or no profile has these shapes.
        """
        self._session, self._cuda = session, session.cuda
        self._closed, self._runs = False, 0
        self._lane: Lane | None = None
        self._graph: Any = None
        self._records = session.records
        self._shapes = {port.name: tuple(demand(inputs, port).shape) for port in session.ports}
        self.profile = session.find_profile(self._shapes)
        self._sent: list[tuple[Array, int]] = []
        self._fetched: list[tuple[int, Array]] = []
        self._own: list[DeviceBuffer] = []
        self._kept: list[Array] = []  # what the engine reads on the CPU
        self._addresses: dict[str, int] = {}
        for port in session.ports:
            self._addresses[port.name] = self._place_input(inputs[port.name], port)
        self._expected = session.output_shapes(self.profile, self._shapes)
        for port in session.results:
            self._addresses[port.name] = self._place_output(outputs.get(port.name), port)

    def run(self) -> None:
        """Send, run, fetch, wait."""
        if self._closed:
            raise UsageError("the binding is closed")
        self._session.demand_open()
        lane = self._lane or self._session.lanes.take(self.profile, self)
        try:
            if lane.holder is not self:
                self._set_up(lane)
            for array, address in self._sent:
                self._cuda.send(array, address, lane.stream)
            self._execute(lane)
            for address, array in self._fetched:
                self._cuda.fetch(address, array, lane.stream)
            self._cuda.wait(lane.stream)
        except BaseException:
            lane.holder = None
            raise
        finally:
            self._runs += 1
            if self._session.graphs and self._runs == _WARM and lane.holder is self:
                self._lane = lane
            elif self._lane is None:
                self._session.lanes.give(lane)

    def close(self) -> None:
        """Give back the graph, the context and the room on the GPU; a second time does nothing."""
        self._closed = True
        if self._graph is not None:
            self._cuda.end_graph(self._graph)
        if self._lane is not None:
            self._lane.holder = None
            self._session.lanes.give(self._lane)
        self._lane = self._graph = None
        for buffer in self._own:
            buffer.release()
        self._own.clear()
        self._sent.clear()
        self._fetched.clear()

    def _execute(self, lane: Lane) -> None:
        if self._lane is not None and self._records and self._graph is None:
            try:
                self._graph = self._cuda.record(lambda: self._enqueue(lane), lane.stream)
            except BuildFailed:  # not every network can be recorded
                self._records = False
        if self._graph is not None:
            self._cuda.launch(self._graph, lane.stream)
        else:
            self._enqueue(lane)

    def _enqueue(self, lane: Lane) -> None:
        if not lane.context.execute_async_v3(int(lane.stream)):
            raise BuildFailed(f"the engine failed: {self._session.told()}")

    def _set_up(self, lane: Lane) -> None:
        """Give a context the shapes and addresses of this binding."""
        self._session.set_shapes(lane, self._shapes)
        for name, address in self._addresses.items():
            if not lane.context.set_tensor_address(name, address):
                raise BuildFailed(f"the engine does not take an address for {name!r}: {self._session.told()}")
        lane.holder = self

    def _place_input(self, given: Array | Buffer, port: Port) -> int:
        if isinstance(given, DeviceBuffer):
            return given.address
        assert isinstance(given, np.ndarray), "a buffer of another memory"
        array = given if given.flags.c_contiguous else np.ascontiguousarray(given)
        if port.name in self._session.on_host:
            self._kept.append(array)
            return array.ctypes.data
        buffer = self._room(tuple(array.shape), array.dtype)
        self._sent.append((array, buffer.address))
        return buffer.address

    def _place_output(self, given: Array | Buffer | None, port: Port) -> int:
        shape = self._expected[port.name]
        aliased = self._session.aliases.get(port.name)
        if given is not None:
            _demand_fit(given, port, shape)
        if isinstance(given, DeviceBuffer):
            if aliased is not None and given.address != self._addresses[aliased]:
                what = f"output {port.name!r} is written over input {aliased!r}: both must be one buffer"
                raise DataInvalid(what)
            return given.address
        if aliased is not None:
            address = self._addresses[aliased]
        else:
            address = self._room(shape, port.dtype or np.dtype(np.uint8)).address
        if given is not None:
            assert isinstance(given, np.ndarray), "a buffer of another memory"
            self._fetched.append((address, given))
        return address

    def _room(self, shape: Shape, dtype: np.dtype[Any]) -> DeviceBuffer:
        made = self._cuda.buffer(shape, dtype)
        self._own.append(made)
        return made


def demand(inputs: Mapping[str, Array | Buffer], port: Port) -> Array | Buffer:
    """What is given for an input, which must have its type."""
    if port.name not in inputs:
        raise DataInvalid(f"input {port.name!r} is missing", hint=f"given are {', '.join(inputs) or 'none'}")
    given = inputs[port.name]
    if given.dtype != port.dtype:
        raise DataInvalid(f"input {port.name!r} is {given.dtype}, the engine reads {port.kind}")
    return given


def fits(shapes: Mapping[str, Shape], profile: Mapping[str, tuple[Shape, Shape, Shape]]) -> bool:
    """Whether a profile has these shapes."""
    return all(
        len(shape) == len(profile[name][0])
        and all(low <= size <= high for low, size, high in zip(profile[name][0], shape, profile[name][2], strict=True))
        for name, shape in shapes.items()
    )


def volume(shapes: Iterable[Shape]) -> int:
    """Numbers in all of them."""
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes)


def _demand_fit(given: Array | Buffer, port: Port, shape: Shape) -> None:
    """The engine would write beyond an array that is too small."""
    if given.dtype != port.dtype or tuple(given.shape) != shape:
        found = f"{given.dtype} {list(given.shape)}"
        raise DataInvalid(f"output {port.name!r} is {port.dtype} {list(shape)}, the array for it is {found}")
    if isinstance(given, np.ndarray) and not given.flags.c_contiguous:
        raise DataInvalid(f"the array for output {port.name!r} does not lie in one piece")
