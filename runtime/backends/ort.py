"""Run an ONNX model in onnxruntime: named arrays in, named arrays out, on the processor or on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qexport.errors import DataInvalid, EnvironmentMismatch, QexportError, UsageError
from qexport.runtime.backends.host import HOST, as_array, as_arrays, failure
from qexport.runtime.backends.ort_cuda import CUDA, DeviceBinding, DeviceMemory, device_values
from qexport.runtime.session import (
    Array,
    Binding,
    Buffer,
    Feeds,
    Memory,
    Port,
    Profile,
    SessionOptions,
    load_onnxruntime,
)

# They drop an activation whose quantizer saturates where it would, and take fp8's zero for the lowest number (1.31).
QUANTIZER_FUSIONS = ("ReluQuantRewrite", "ClipQuantRewrite")
_BFLOAT16 = ("bfloat16", 16)  # what numpy and ONNX call it


class OrtSession:
    """A loaded model; ``run`` may be called from several threads. See ``runtime.session.Session``."""

    profiles: tuple[Profile, ...] = ()

    def __init__(
        self,
        model: bytes | Path,
        options: SessionOptions | None = None,
        weights: Feeds | None = None,
        module: ModuleType | None = None,
    ) -> None:
        """Load ``model``.

        Args:
            model: The file, or its bytes.
            options: How to run.
            weights: Initializers that are kept outside of the model, shared without a copy.
            module: onnxruntime.

        Raises:
            BuildFailed: onnxruntime cannot load it.
            EnvironmentMismatch: onnxruntime is missing, or was built without the provider that is asked for.
        """
        ort = self._ort = module or load_onnxruntime()
        chosen = self._options = options or SessionOptions()
        self._cuda = chosen.providers[0] == CUDA
        self.backend = "ort-cuda" if self._cuda else "ort-cpu"
        if self._cuda and CUDA not in ort.get_available_providers():
            what = f"this onnxruntime has no {CUDA}"
            raise EnvironmentMismatch(what, hint="pip uninstall onnxruntime, then pip install 'qexport[gpu]'")
        # onnxruntime reads these arrays for as long as the session lives
        self._weights = {name: _shared(ort, array) for name, array in (weights or {}).items()}
        self._session = self._open(model)
        taken = [port for port in self._session.get_inputs() if port.name not in self._weights]
        self.ports, self.results = (_ports(found) for found in (taken, self._session.get_outputs()))
        self.inputs, self.outputs = (tuple(port.name for port in ports) for ports in (self.ports, self.results))
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.memory: Memory = DeviceMemory(ort, chosen.device) if self._cuda else HOST

    def bind(self, inputs: Mapping[str, Array | Buffer], outputs: Mapping[str, Array | Buffer]) -> Binding:
        """Bind arrays to all inputs and outputs, for any number of runs; several bindings share the session."""
        session = self._opened()
        if self._cuda:
            return DeviceBinding(self._ort, session, self._options, inputs, outputs)
        return HostBinding(self._ort, session, inputs, outputs)

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once; returns the named outputs, all of them by default."""
        if outputs is not None and not outputs:
            return {}  # onnxruntime would take it for all
        names = list(outputs) if outputs is not None else list(self.outputs)
        try:
            arrays = self._run(names, {name: feeds[name] for name in self.inputs})
        except KeyError as error:
            raise DataInvalid(f"input {error.args[0]!r} is missing", hint=f"the model reads {self.inputs}") from error
        except QexportError:
            raise
        except Exception as error:
            shapes = {name: np.shape(array) for name, array in feeds.items()}
            raise failure(f"onnxruntime failed on inputs of shape {shapes}: {error}") from error
        return dict(zip(names, arrays, strict=True))

    def run_dlpack(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """The same; on a GPU what is returned stays there."""
        if not self._cuda:
            return self.run(feeds, outputs)
        names = list(outputs) if outputs is not None else list(self.outputs)
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise DataInvalid(f"input {missing[0]!r} is missing", hint=f"the model reads {self.inputs}")
        given = {name: feeds[name] for name in self.inputs}
        return device_values(self._ort, self._opened(), self._options.device, given, names)

    def end_profile(self) -> Path:
        """Stop noting times; returns the file that holds them."""
        return Path(self._opened().end_profiling())

    def close(self) -> None:
        """Free the model; a second time does nothing."""
        self._session = None

    def _open(self, model: bytes | Path) -> Any:
        chosen, ort = self._options, self._ort
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = chosen.threads
        settings.log_severity_level = 4
        settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if chosen.spin else "0")
        disabled = list(chosen.disabled)
        if chosen.literal:
            settings.add_session_config_entry("session.disable_quant_qdq", "1")
            disabled += QUANTIZER_FUSIONS
        if chosen.lean:
            settings.enable_cpu_mem_arena = settings.enable_mem_pattern = False
            settings.add_session_config_entry("session.disable_prepacking", "1")
        if chosen.profile is not None:
            settings.enable_profiling, settings.profile_file_prefix = True, chosen.profile
        if not chosen.optimize:
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if self._weights and not chosen.lean:
            settings.add_external_initializers(list(self._weights), list(self._weights.values()))
            for name, value in () if self._cuda else self._weights.items():
                settings.add_initializer(name, value)  # without this onnxruntime 1.31 keeps copies of them
        source = model if isinstance(model, bytes) else str(model)
        providers = [_provider(name, chosen) for name in chosen.providers]
        try:
            return ort.InferenceSession(
                source,
                settings,
                providers=providers,
                disabled_optimizers=disabled,
                enable_fallback=0,  # else it says on stdout that it tries again, elsewhere and with other optimizers
            )
        except Exception as error:
            raise failure(f"onnxruntime cannot load the model: {error}") from error

    def _run(self, names: list[str], given: Mapping[str, Any]) -> Sequence[Array]:
        session = self._opened()
        if self._cuda:
            found = device_values(self._ort, session, self._options.device, given, names)
            return [value.numpy() for value in found.values()]
        feeds = as_arrays(given)
        if not self._options.lean:
            arrays: Sequence[Array] = session.run(names, feeds)
            return arrays
        wrap = self._ort.OrtValue.ortvalue_from_numpy
        wrapped = {name: wrap(np.asarray(array, order="C")) for name, array in feeds.items()}
        return [value.numpy() for value in session.run_with_ort_values(names, wrapped | self._weights)]

    def _opened(self) -> Any:
        if self._session is None:
            raise UsageError("the session is closed")
        return self._session


class HostBinding:
    """Arrays that every run reads and writes where they lie."""

    def __init__(
        self,
        ort: ModuleType,
        session: Any,
        inputs: Mapping[str, Array | Buffer],
        outputs: Mapping[str, Array | Buffer],
    ) -> None:
        """Bind all of them; an output may be what an input reads."""
        self._session, self._binding = session, session.io_binding()
        read = {name: np.ascontiguousarray(as_array(name, array)) for name, array in inputs.items()}
        written = {name: as_array(name, array) for name, array in outputs.items()}
        arrays = {id(array): array for array in (*read.values(), *written.values())}
        self._arrays = [*arrays.values()]  # onnxruntime does not keep them
        # wrapping takes most of the time, and a cache is an input and an output, or several
        values = {place: ort.OrtValue.ortvalue_from_numpy(array) for place, array in arrays.items()}
        for name, array in read.items():
            self._binding.bind_ortvalue_input(name, values[id(array)])
        for name, array in written.items():
            assert array.flags.c_contiguous, "what is written must lie in one piece"
            self._binding.bind_ortvalue_output(name, values[id(array)])

    def run(self) -> None:
        """Run once."""
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise failure(f"onnxruntime failed on bound arrays: {error}") from error

    def close(self) -> None:
        """Let go of the arrays."""
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        self._arrays.clear()


def _provider(name: str, options: SessionOptions) -> Any:
    """A provider with its settings, as onnxruntime takes them."""
    if name != CUDA:
        return name
    return name, {"device_id": str(options.device), "enable_cuda_graph": "1" if options.graphs else "0"}


def _shared(ort: ModuleType, array: Array) -> Any:
    """An array as onnxruntime's own, not copied."""
    if array.dtype.name == _BFLOAT16[0]:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16[1])
    return ort.OrtValue.ortvalue_from_numpy(array)


def _ports(found: Sequence[Any]) -> tuple[Port, ...]:
    return tuple(Port(port.name, port.type, tuple(port.shape)) for port in found)
