"""TensorRT over onnxruntime: engines are graphs with fixed caches and profiles, contexts run them on a fake GPU.

What the real library demands and would not survive is checked: shapes inside the active profile, an address for every
tensor, outputs that are written over an input at its address, caches that are not written beyond their end, a recorded
context that keeps its shapes and addresses.
"""

from __future__ import annotations

import json
import time
from enum import IntEnum
from functools import cache
from types import ModuleType

import numpy as np
import onnx
import onnxruntime as ort
from fake_cuda import Fault

from qexport.exporter.engines.frozen import freeze
from qexport.passes.portable import IDS, PAST, WRITE


class TensorIOMode(IntEnum):
    NONE, INPUT, OUTPUT = 0, 1, 2


class TensorLocation(IntEnum):
    DEVICE, HOST = 0, 1


class DataType(IntEnum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class CudaGraphStrategy(IntEnum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class EngineValidity(IntEnum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH, UNSUPPORTED_CC = 1, 2


class ILogger:
    pass


_TYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(float16)": (DataType.HALF, np.float16),
    "tensor(int64)": (DataType.INT64, np.int64),
}


def plan_of(model, columns, profiles, **header):
    """An engine: the graph with caches of ``columns``, and ``profiles`` of sizes by name of the axis."""
    proto = onnx.ModelProto()
    proto.ParseFromString(model)
    freeze(proto, {"max_seq": columns})
    found = []
    for sizes in profiles:
        profile = {}
        for value in proto.graph.input:
            dims = value.type.tensor_type.shape.dim
            profile[value.name] = [
                [sizes[dim.dim_param][end] if dim.dim_param else dim.dim_value for dim in dims] for end in range(3)
            ]
        found.append(profile)
    return json.dumps({"profiles": found, **header}).encode() + b"\n" + proto.SerializeToString()


@cache
def _loaded(model):
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 4
    return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


class ICudaEngine:
    def __init__(self, library, plan):
        header, _, model = plan.partition(b"\n")
        self._library, self._profiles = library, json.loads(header)["profiles"]
        self._session = _loaded(model)
        self._ports = {port.name: port for port in (*self._session.get_inputs(), *self._session.get_outputs())}
        self._read = {port.name for port in self._session.get_inputs()}
        self.num_io_tensors, self.num_optimization_profiles = len(self._ports), len(self._profiles)

    def get_tensor_name(self, index):
        return list(self._ports)[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self._read else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return _TYPES[self._ports[name].type][0]

    def get_tensor_location(self, name):
        return TensorLocation.DEVICE

    def get_tensor_shape(self, name):
        return [size if isinstance(size, int) else -1 for size in self._ports[name].shape]

    def get_tensor_profile_shape(self, name, profile_index):
        return self._profiles[profile_index][name]

    def get_aliased_input_tensor(self, name):
        return name.replace("present.", PAST) if name.startswith("present.") else None

    def create_runtime_config(self):
        return IRuntimeConfig()

    def create_execution_context(self, strategy):
        if isinstance(strategy, IRuntimeConfig):
            strategy = strategy.strategy
        assert strategy == ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        made = IExecutionContext(self)
        self._library.contexts.append(made)
        return made


class IRuntimeConfig:
    cuda_graph_strategy = CudaGraphStrategy.DISABLED

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return "cache"

    def set_runtime_cache(self, cache):
        assert cache == "cache"


class IExecutionContext:
    def __init__(self, engine):
        self._engine, self._shapes, self._addresses, self._profile = engine, {}, {}, None
        self.runs, self.sets = 0, 0

    def set_optimization_profile_async(self, profile_index, stream_handle):
        assert stream_handle in self._engine._library.cuda.streams
        self._profile, self._shapes = profile_index, {}
        return profile_index < self._engine.num_optimization_profiles

    def set_input_shape(self, name, shape):
        self.sets += 1
        low, _, high = self._engine._profiles[self._profile][name]
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        if name in self._shapes:
            return self._shapes[name]
        if name.startswith("present."):
            return self._shapes[name.replace("present.", PAST)]
        return (*self._shapes[IDS], self._engine._ports[name].shape[-1])

    def set_tensor_address(self, name, memory):
        self.sets += 1
        self._addresses[name] = memory
        return name in self._engine._ports

    def execute_async_v3(self, stream_handle):
        library, shapes, addresses = self._engine._library, dict(self._shapes), dict(self._addresses)
        if set(addresses) != set(self._engine._ports) or set(shapes) != self._engine._read:
            return False

        def work():
            if (self._shapes, self._addresses) != (shapes, addresses):
                raise Fault("the context was changed after it was recorded")
            self._compute(library, shapes, addresses)

        library.cuda.put(stream_handle, work)
        return True

    def _compute(self, library, shapes, addresses):
        engine = self._engine
        self.runs += 1
        for name in engine._ports:
            over = engine.get_aliased_input_tensor(name)
            if over is not None and addresses[name] != addresses[over]:
                raise Fault(f"{name} is not written over {over}")
        feeds = {name: _array(library.cuda, addresses[name], shapes[name], engine._ports[name]) for name in shapes}
        columns = next(shape[2] for name, shape in shapes.items() if name.startswith(PAST))
        if (feeds[WRITE] + shapes[IDS][1] > columns).any():
            raise Fault("a cache is written beyond its end")
        time.sleep(library.delay)
        if library.breaks:
            raise Fault("broken")
        outputs = [port.name for port in engine._session.get_outputs()]
        for name, array in zip(outputs, engine._session.run(outputs, feeds), strict=True):
            _array(library.cuda, addresses[name], array.shape, engine._ports[name])[...] = array


def _array(cuda, address, shape, port):
    dtype = np.dtype(_TYPES[port.type][1])
    return np.frombuffer(cuda.view(address, int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


class Library:
    """What tests look at and set."""

    def __init__(self, cuda, name="tensorrt_rtx"):
        self.cuda, self.name, self.contexts = cuda, name, []
        self.validity, self.delay, self.breaks = (EngineValidity.VALID, 0), 0.0, False

    def module(self):
        """TensorRT for RTX, or TensorRT, which has no graphs of its own."""
        library = self

        class Runtime:
            def __init__(self, logger):
                assert isinstance(logger, ILogger)
                self._logger = logger

            def deserialize_cuda_engine(self, plan):
                if plan == b"junk":
                    self._logger.log(DataType.FLOAT, "not an error")
                    self._logger.log(_Severity.ERROR, "magic tag\n does not match")
                    return None
                return ICudaEngine(library, plan)

        made = ModuleType(self.name)
        made.__version__, made.Runtime, made.ILogger = "1.7.1", Runtime, ILogger
        for kind in (TensorIOMode, TensorLocation, DataType, ExecutionContextAllocationStrategy):
            setattr(made, kind.__name__, kind)
        if self.name == "tensorrt_rtx":
            Runtime.get_engine_validity = lambda runtime, plan: library.validity
            made.CudaGraphStrategy, made.EngineValidity = CudaGraphStrategy, EngineValidity
            made.EngineInvalidityDiagnostics = EngineInvalidityDiagnostics
        return made


class _Severity(IntEnum):
    ERROR = 1
