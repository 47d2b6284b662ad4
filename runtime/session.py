"""Run an ONNX model in onnxruntime: named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.errors import BuildFailed, DataInvalid, EnvironmentMismatch

Feeds = Mapping[str, NDArray[Any]]

# Its CPU kernel is several times slower than the Add and LayerNormalization that it replaces (onnxruntime 1.31).
SLOW_FUSIONS = ("SkipLayerNormFusion",)
# They drop an activation whose quantizer saturates where it would, and take fp8's zero for the lowest number (1.31).
QUANTIZER_FUSIONS = ("ReluQuantRewrite", "ClipQuantRewrite")


def load_onnxruntime() -> ModuleType:
    """Import onnxruntime, or say what to install."""
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
        threads: Threads inside one operator; 0 lets onnxruntime choose.
        spin: Whether threads without work wait in a loop. A session alone answers sooner by it; of two that run
            in turn, each takes the processor from the other.
        providers: Execution providers in order of preference.
        optimize: Whether onnxruntime may rewrite the graph.
        disabled: Its optimizers that stay off.
        literal: Whether Q/DQ nodes run as they are written, instead of being merged into integer kernels; weights
            are dequantized once, at load.
        lean: Whether to do without copies of weights and without memory kept for the next run. Weights that are kept
            outside of the model are inputs of it then: onnxruntime copies initializers, and inputs it does not.
        profile: Where the times of all operators go, a path without its ending; ``runtime.profile`` reads them.
    """

    threads: int = 0
    spin: bool = True
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    optimize: bool = True
    disabled: tuple[str, ...] = SLOW_FUSIONS
    literal: bool = False
    lean: bool = False
    profile: str | None = None


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


_BFLOAT16 = ("bfloat16", 16)  # what numpy and ONNX call it


@dataclass(frozen=True, slots=True)
class Port:
    """An input or an output as onnxruntime tells it.

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


class Binding:
    """Arrays that every run reads and writes where they lie; their shapes are those of each run."""

    def __init__(self, session: Any, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> None:
        """Bind all inputs and outputs; an output may be what an input reads, if its operator can do that."""
        wrap = load_onnxruntime().OrtValue.ortvalue_from_numpy
        self._session, self._binding = session, session.io_binding()
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, wrap(np.ascontiguousarray(array)))
        for name, array in outputs.items():
            assert array.flags.c_contiguous, "what is written must lie in one piece"
            self._binding.bind_ortvalue_output(name, wrap(array))

    def run(self) -> None:
        """Run once.

        Raises:
            BuildFailed: An array has a shape or type that the model has not, or an operator failed.
        """
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BuildFailed(f"onnxruntime failed on bound arrays: {error}") from error


class Session:
    """A loaded model; ``run`` may be called from several threads.

    Attributes:
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        ports: The inputs with types and shapes.
        results: The outputs likewise.
        metadata: What the file says of itself.
    """

    def __init__(
        self,
        model: bytes | Path,
        options: SessionOptions | None = None,
        weights: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        """Load ``model``; ``weights`` are initializers kept outside of it, shared without a copy."""
        ort = load_onnxruntime()
        chosen = options or SessionOptions()
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
        # onnxruntime reads these arrays for as long as the session lives
        self._weights = {name: _shared(ort, array) for name, array in (weights or {}).items()}
        self._lean = chosen.lean
        if self._weights and not self._lean:
            settings.add_external_initializers(list(self._weights), list(self._weights.values()))
        source = model if isinstance(model, bytes) else str(model)
        try:
            self._session = ort.InferenceSession(
                source, settings, providers=list(chosen.providers), disabled_optimizers=disabled
            )
        except Exception as error:
            raise BuildFailed(f"onnxruntime cannot load the model: {error}") from error
        taken = [port for port in self._session.get_inputs() if port.name not in self._weights]
        self.ports, self.results = (_ports(found) for found in (taken, self._session.get_outputs()))
        self.inputs, self.outputs = (tuple(port.name for port in ports) for ports in (self.ports, self.results))
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)

    def bind(self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> Binding:
        """Bind arrays to all inputs and outputs, for any number of runs; several bindings share the session."""
        return Binding(self._session, inputs, outputs)

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Run once; returns the named outputs, all of them by default."""
        names = list(outputs) if outputs is not None else list(self.outputs)
        try:
            arrays = self._run(names, {name: feeds[name] for name in self.inputs})
        except KeyError as error:
            raise DataInvalid(f"input {error.args[0]!r} is missing", hint=f"the model reads {self.inputs}") from error
        except Exception as error:
            shapes = {name: array.shape for name, array in feeds.items()}
            raise BuildFailed(f"onnxruntime failed on inputs of shape {shapes}: {error}") from error
        return dict(zip(names, arrays, strict=True))

    def _run(self, names: list[str], feeds: Feeds) -> Sequence[NDArray[Any]]:
        if not self._lean:
            arrays: Sequence[NDArray[Any]] = self._session.run(names, feeds)
            return arrays
        wrap = load_onnxruntime().OrtValue.ortvalue_from_numpy
        given = {name: wrap(np.asarray(array, order="C")) for name, array in feeds.items()}
        return [found.numpy() for found in self._session.run_with_ort_values(names, given | self._weights)]

    def end_profile(self) -> Path:
        """Stop noting times; returns the file that holds them."""
        return Path(self._session.end_profiling())


def _shared(ort: ModuleType, array: NDArray[Any]) -> Any:
    """An array as onnxruntime's own, not copied."""
    if array.dtype.name == _BFLOAT16[0]:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16[1])
    return ort.OrtValue.ortvalue_from_numpy(array)


def _ports(found: Sequence[Any]) -> tuple[Port, ...]:
    return tuple(Port(port.name, port.type, tuple(port.shape)) for port in found)
