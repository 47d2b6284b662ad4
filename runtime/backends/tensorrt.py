"""Run an engine of TensorRT or TensorRT for RTX: the module is a value, and so is the CUDA runtime.

Both modules have the same Python interface where it is used here; what only one has is asked for where it is used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from qexport.errors import BuildFailed, DataInvalid, EnvironmentMismatch, UsageError
from qexport.runtime.backends.cuda import Cuda, CudaMemory, DeviceBuffer
from qexport.runtime.backends.dlpack import DeviceTensor, read_tensor
from qexport.runtime.backends.engine_binding import EngineBinding, fits, volume
from qexport.runtime.backends.host import as_array, device_of
from qexport.runtime.backends.lanes import Lane, Lanes, context_maker, records_graphs
from qexport.runtime.session import Array, Binding, Buffer, Memory, Port, Profile, SessionOptions, Shape

_KINDS = {
    "FLOAT": "tensor(float)",
    "HALF": "tensor(float16)",
    "INT64": "tensor(int64)",
    "INT32": "tensor(int32)",
    "INT8": "tensor(int8)",
    "UINT8": "tensor(uint8)",
    "BOOL": "tensor(bool)",
}
_BACKENDS = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
_TOLD = 8  # messages of the library that are kept


class EngineSession:
    """An engine; see ``runtime.session.Session``.

    Attributes:
        cuda: The CUDA runtime.
        graphs: Whether runs that come again are recorded as CUDA graphs.
        records: Whether that is left to us.
        aliases: Outputs that are written over an input, and that input.
        on_host: Inputs that the engine reads on the CPU.
        lanes: Its execution contexts.
    """

    def __init__(
        self,
        plan: bytes,
        module: ModuleType,
        cuda: Cuda,
        options: SessionOptions | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        """Load an engine, native code that must come from a place to be trusted: ``load_plan`` reads such.

        Args:
            plan: The serialized engine.
            module: ``tensorrt`` or ``tensorrt_rtx``.
            cuda: The CUDA runtime.
            options: How to run; an engine heeds ``graphs`` alone.
            metadata: What the model that it was built from says of itself.

        Raises:
            EnvironmentMismatch: The module finds that it was built for another GPU, driver or release.
            BuildFailed: The module cannot load it.
        """
        self.cuda, self._module = cuda, module
        self.backend = _BACKENDS.get(module.__name__, module.__name__)
        self._messages: deque[str] = deque(maxlen=_TOLD)
        cuda.use()
        self._logger = make_logger(module, self._messages)
        self._runtime = module.Runtime(self._logger)
        _check_validity(module, self._runtime, plan)
        engine = self._engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BuildFailed(f"{self.backend} cannot load the engine: {self.told()}", hint="build it on this machine")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        read = [name for name in names if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT]
        written = [name for name in names if engine.get_tensor_mode(name) == module.TensorIOMode.OUTPUT]
        self.inputs, self.outputs = tuple(read), tuple(written)
        self.ports, self.results = (tuple(_port(engine, name) for name in names) for names in (read, written))
        self.metadata = metadata or {}
        self.profiles: tuple[Profile, ...] = tuple(
            {name: _profile(engine, name, index) for name in read} for index in range(engine.num_optimization_profiles)
        )
        self.on_host = {name for name in read if engine.get_tensor_location(name) == module.TensorLocation.HOST}
        self.aliases = {name: over for name in written if (over := _aliased(engine, name))}
        chosen = options or SessionOptions()
        self.graphs, self.records = chosen.graphs, not records_graphs(module)
        self.lanes = Lanes(cuda, context_maker(module, engine, graphs=chosen.graphs))
        self._memory = CudaMemory(cuda)
        self.memory: Memory = self._memory

    def bind(self, inputs: Mapping[str, Array | Buffer], outputs: Mapping[str, Array | Buffer]) -> Binding:
        """Bind arrays and buffers for any number of runs; bindings of several threads run side by side."""
        self.demand_open()
        return EngineBinding(self, inputs, outputs)

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once; returns the named outputs, all of them by default."""
        given, ports = self._given(feeds), self._asked(outputs)
        shapes = self.output_shapes(*self._shapes(given))
        found = {port.name: np.empty(shapes[port.name], port.dtype) for port in ports}
        self._run_once(given, found)
        return found

    def run_dlpack(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """The same, with what is returned left on the GPU."""
        given, ports = self._given(feeds), self._asked(outputs)
        shapes = self.output_shapes(*self._shapes(given))
        found: dict[str, DeviceBuffer] = {}
        for port in ports:
            over = given.get(self.aliases.get(port.name, ""))
            if isinstance(over, np.ndarray):
                over = given[self.aliases[port.name]] = self._memory.put(over)
            if not isinstance(over, DeviceBuffer):
                over = self.cuda.buffer(shapes[port.name], port.dtype or np.dtype(np.uint8))
            found[port.name] = over
        self._run_once(given, found)
        return {name: DeviceTensor(buffer, self.cuda.device) for name, buffer in found.items()}

    def close(self) -> None:
        """Free the engine; a second time does nothing."""
        if self._engine is not None:
            self.cuda.use()
            self.lanes.close()
            self._memory.close()
        self._engine = self._runtime = None

    # ------------------------------------------------------------ for bindings

    def demand_open(self) -> None:
        """Let this thread be about the GPU; raise ``UsageError`` where the engine is freed."""
        if self._engine is None:
            raise UsageError("the session is closed")
        self.cuda.use()

    def find_profile(self, shapes: Mapping[str, Shape]) -> int:
        """Index of the profile that has these shapes with the least beyond them.

        Raises:
            DataInvalid: None has them.
        """
        found = [index for index, profile in enumerate(self.profiles) if fits(shapes, profile)]
        if not found:
            free = {port.name for port in self.ports if None in port.shape}
            asked = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items() if name in free)
            raise DataInvalid(f"the engine has no profile for {asked}", hint="build it with profiles that have them")
        return min(found, key=lambda index: volume(high for _, _, high in self.profiles[index].values()))

    def output_shapes(self, profile: int, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Shapes of all outputs for shapes of all inputs.

        Raises:
            BuildFailed: One depends on the numbers too.
        """
        lane = self.lanes.take(profile, None)
        try:
            lane.holder = None
            self.set_shapes(lane, shapes)
            found = {name: tuple(lane.context.get_tensor_shape(name)) for name in self.outputs}
        finally:
            self.lanes.give(lane)
        for name, shape in found.items():
            if min(shape, default=0) < 0:
                raise BuildFailed(f"the shape of output {name!r} depends on the numbers, which is not supported")
        return found

    def set_shapes(self, lane: Lane, shapes: Mapping[str, Shape]) -> None:
        """Give a context the shapes of all inputs."""
        for name, shape in shapes.items():
            if not lane.context.set_input_shape(name, shape):
                raise BuildFailed(f"the engine does not take {name!r} of shape {list(shape)}: {self.told()}")

    def told(self) -> str:
        """The last errors of the library."""
        return "; ".join(self._messages) or "no reason given"

    # ------------------------------------------------------------ single runs

    def _given(self, feeds: Mapping[str, Any]) -> dict[str, Array | Buffer]:
        """What is fed: arrays, and buffers over what lies on the GPU already."""
        self.demand_open()
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise DataInvalid(f"input {missing[0]!r} is missing", hint=f"the model reads {self.inputs}")
        given: dict[str, Array | Buffer] = {}
        for name in self.inputs:
            value = feeds[name]
            if not isinstance(value, np.ndarray) and hasattr(value, "__dlpack__") and device_of(value) is not None:
                stream = self._memory.stream
                given[name] = read_tensor(name, value, self.cuda.device, int(stream))
                self.cuda.wait(stream)
            else:
                given[name] = as_array(name, value)
        return given

    def _asked(self, outputs: Sequence[str] | None) -> list[Port]:
        known = {port.name: port for port in self.results}
        unknown = [name for name in outputs or () if name not in known]
        if unknown:
            raise DataInvalid(f"no output called {unknown[0]!r}", hint=f"the model gives {self.outputs}")
        return [known[name] for name in (self.outputs if outputs is None else outputs)]

    def _shapes(self, given: Mapping[str, Array | Buffer]) -> tuple[int, dict[str, Shape]]:
        shapes = {name: tuple(value.shape) for name, value in given.items()}
        return self.find_profile(shapes), shapes

    def _run_once(self, given: Mapping[str, Array | Buffer], found: Mapping[str, Array | Buffer]) -> None:
        binding = EngineBinding(self, given, found)
        try:
            binding.run()
        finally:
            binding.close()


def make_logger(module: ModuleType, messages: deque[str]) -> Any:
    """A logger of the module that keeps errors."""
    base: Any = module.ILogger

    class Logger(base):  # type: ignore[misc]  # the module is a value, its classes have no types
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, text: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                messages.append(" ".join(text.split()))

    return Logger()


def _check_validity(module: ModuleType, runtime: Any, plan: bytes) -> None:
    """Ask TensorRT-RTX what it thinks of the engine's header, before the engine is loaded."""
    if not hasattr(runtime, "get_engine_validity"):
        return
    validity, flags = runtime.get_engine_validity(plan)
    if validity == module.EngineValidity.INVALID:
        known = module.EngineInvalidityDiagnostics.__members__
        told = [name.lower().replace("_", " ") for name, value in known.items() if int(value) & int(flags)]
        what = f"{module.__name__} cannot run the engine here: {', '.join(told) or 'no GPU that it knows'}"
        raise EnvironmentMismatch(what, hint="build it with the release that is installed, for this GPU")


def _port(engine: Any, name: str) -> Port:
    kind = engine.get_tensor_dtype(name).name
    shape = tuple(None if size < 0 else int(size) for size in engine.get_tensor_shape(name))
    return Port(name, _KINDS.get(kind, f"tensor({kind.lower()})"), shape)


def _profile(engine: Any, name: str, index: int) -> tuple[Shape, Shape, Shape]:
    low, best, high = (tuple(map(int, shape)) for shape in engine.get_tensor_profile_shape(name, index))
    return low, best, high


def _aliased(engine: Any, name: str) -> str | None:
    """The input that an output is written over, as caches are; TensorRT knows of that since 10.15."""
    find = getattr(engine, "get_aliased_input_tensor", None)
    return None if find is None else find(name)
