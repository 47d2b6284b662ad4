"""onnxruntime with a CUDA provider: the real one, its values "on the GPU" copies that only it may look at.

As in the real one, an array of the processor that is bound as an input is copied when it is bound, and what was
recorded under a number keeps its shapes and addresses; the fake finds both out instead of computing something else.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import onnxruntime as ort

CUDA = "CUDAExecutionProvider"


class OrtValue:
    """A value of onnxruntime; ``device`` is ``cuda`` or ``cpu``."""

    alive = 0

    def __init__(self, array, device):
        self.array, self.device = array, device
        OrtValue.alive += device == "cuda"

    def __del__(self):
        OrtValue.alive -= self.device == "cuda"

    @classmethod
    def ortvalue_from_numpy(cls, array, device="cpu", index=0):
        return cls(array.copy() if device == "cuda" else array, device)

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape, dtype, device, index):
        return cls(np.full(shape, 77, dtype), device)

    @classmethod
    def from_dlpack(cls, tensor):
        return cls(tensor.array, "cuda")

    def update_inplace(self, array):
        assert array.dtype == self.array.dtype
        assert array.shape == self.array.shape
        self.array[...] = array

    def numpy(self):
        return self.array.copy()

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return 2, 0


class Binding:
    def __init__(self):
        self.inputs, self.outputs = {}, {}

    def bind_ortvalue_input(self, name, value):
        self.inputs[name] = value if value.device == "cuda" else OrtValue(value.array.copy(), "cuda")

    def bind_ortvalue_output(self, name, value):
        self.outputs[name] = value

    def bind_output(self, name, device, index):
        assert device == "cuda"
        self.outputs[name] = None

    def get_outputs(self):
        return list(self.outputs.values())

    def clear_binding_inputs(self):
        self.inputs.clear()

    def clear_binding_outputs(self):
        self.outputs.clear()


class RunOptions:
    def add_run_config_entry(self, name, value):
        assert name == "gpu_graph_id"
        self.graph = int(value)


class InferenceSession:
    made = None

    def __init__(self, source, settings, providers, disabled_optimizers, enable_fallback):
        self.providers = providers
        self._inner = ort.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
        self.recorded, self.released, self.runs = {}, [], []
        InferenceSession.made = self

    def __getattr__(self, name):
        assert name in {"get_inputs", "get_outputs", "get_modelmeta"}, name
        return getattr(self._inner, name)

    def io_binding(self):
        return Binding()

    def release_captured_graph(self, number):
        self.released.append(number)

    def run_with_iobinding(self, binding, options):
        assert options.graph != 0, "0 is onnxruntime's own"
        self.runs.append(options.graph)
        values = {**binding.inputs, **binding.outputs}
        if options.graph > 0:
            kept = {name: (id(value), value.array.shape) for name, value in values.items()}
            assert self.recorded.setdefault(options.graph, kept) == kept
            assert options.graph not in self.released
            assert all(value.device == "cuda" for value in values.values())
        feeds = {name: value.array for name, value in binding.inputs.items()}
        found = self._inner.run(list(binding.outputs), feeds)
        for (name, value), array in zip(binding.outputs.items(), found, strict=True):
            if value is None:
                binding.outputs[name] = OrtValue(array, "cuda")
            else:
                value.array[...] = array


def module():
    """onnxruntime as the package for GPUs has it."""
    made = ModuleType("onnxruntime")
    made.SessionOptions, made.GraphOptimizationLevel = ort.SessionOptions, ort.GraphOptimizationLevel
    made.OrtValue, made.RunOptions, made.InferenceSession = OrtValue, RunOptions, InferenceSession
    made.get_available_providers = lambda: [CUDA, "CPUExecutionProvider"]
    return made
