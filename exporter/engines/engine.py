"""Build engines with TensorRT and TensorRT for RTX through one code path: the module is a value.

Both modules have the same Python interface where it is used here (TensorRT 10.3 to 11.4, TensorRT-RTX 1.7). Networks
are strongly typed, so the precision is the model's; TensorRT-RTX builds without a GPU, TensorRT needs one.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx_ir as ir

from qexport.errors import BuildFailed, EnvironmentMismatch, ResourceExhausted, UsageError
from qexport.exporter.engines.frozen import freeze
from qexport.exporter.engines.messages import Messages, Phases, Progress, describe, listed, readable
from qexport.exporter.engines.profiles import Profile
from qexport.exporter.engines.rules import domain_of, find_faults
from qexport.exporter.engines.timing import keep_timings, open_timings
from qexport.exporter.outcome.result import EngineInfo
from qexport.runtime.backends.gpus import find_gpus
from qexport.safe_io import read_bytes

_OURS = "qexport."  # what metadata that runtimes read begins with
_TICK = 0.1  # seconds; a signal that comes just before a wait does not end it


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to build.

    Attributes:
        profiles: Needed when an input has dynamic axes; one execution context uses one of them.
        workspace: Most bytes of GPU memory for intermediate results; the builder's choice when ``None``.
        sparse: Whether 2:4 sparse kernels may be used for weights that have the pattern.
        compute_capabilities: Devices of a TensorRT-RTX engine, such as ``"8.6"``, or ``"current"``; portable over
            Ampere and later when empty.
        optimization_level: 0 (fast build) to 5; the builder's default when ``None``.
        detailed: Whether the engine carries layer details for profilers.
        progress: Called with the phase and the fraction done, from another thread; ``False`` stops the build.
        frozen: Names of dynamic sizes and what they are in the engine, such as ``("max_seq", 1024)``: caches must be
            of a fixed length. The profiles must give the same sizes.
        timeout: Most seconds for a build in a child process; a build in this process cannot be stopped so surely.
        timings: File of what the builder measured before, if it exists; has what it measured when the build is done.
    """

    profiles: tuple[Profile, ...] = ()
    workspace: int | None = None
    sparse: bool = False
    compute_capabilities: tuple[str, ...] = ()
    optimization_level: int | None = None
    detailed: bool = False
    progress: Progress | None = None
    frozen: tuple[tuple[str, int], ...] = ()
    timeout: float = 1800
    timings: Path | None = None


@dataclass(frozen=True, slots=True)
class Engine:
    """A serialized engine: native code for a GPU, never to be loaded from an untrusted place."""

    plan: bytes
    info: EngineInfo


def build_engine(model: bytes | Path, module: ModuleType, options: EngineOptions | None = None) -> Engine:
    """Build an engine.

    Args:
        model: A serialized model that holds its weights, or the path of one whose weights may lie beside it. TensorRT
            opens those files itself, so the model must have been admitted.
        module: ``tensorrt`` or ``tensorrt_rtx``.
        options: How to build.

    Raises:
        BuildFailed: The parser or the builder refuses the model, naming the nodes; or ``progress`` said stop.
        EnvironmentMismatch: The builder needs a GPU and there is none.
        ResourceExhausted: The GPU has not enough memory.
        UsageError: A profile or a compute capability that the builder does not accept.
    """
    with _no_collection():
        return _build_engine(model, module, options or EngineOptions())


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector out of callbacks.

    There it may find an earlier builder and free it, which waits for a lock that the library holds while it calls.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _build_engine(model: bytes | Path, module: ModuleType, options: EngineOptions) -> Engine:
    start = time.perf_counter()
    messages, phases = Messages(), Phases(options.progress)
    logger = _logger(module, messages)
    builder = _create_builder(module, logger, messages)
    network = builder.create_network(_flags(module))
    config = builder.create_builder_config()
    monitor = _monitor(module, phases)
    config.progress_monitor = monitor
    _configure(config, module, options)
    _add_profiles(builder, config, options.profiles, messages)
    timings = open_timings(config, options.timings)
    parser = module.OnnxParser(network, logger)
    graph = _parse(parser, model, module, dict(options.frozen))
    _let_decompose(network, module)
    plan = _build(builder, network, config, phases)
    if plan is None:
        raise _failure(module, messages, phases)
    keep_timings(config, options.timings)
    content = bytes(plan)
    info = EngineInfo(
        module=module.__name__,
        version=module.__version__,
        seconds=time.perf_counter() - start,
        bytes=len(content),
        layers=network.num_layers,
        compute_capabilities=_built_for(module, options.compute_capabilities),
        profiles=options.profiles,
        metadata={name: text for name, text in graph.metadata_props.items() if name.startswith(_OURS)},
        note=run_support(module) or "",
        timings=timings,
    )
    return Engine(content, info)


def run_support(module: ModuleType) -> str | None:
    """Return why engines of ``module`` cannot run on this machine, ``None`` when nothing speaks against it."""
    try:
        gpus = find_gpus()
    except EnvironmentMismatch as error:
        return error.what
    if all(float(gpu.capability) < 7.5 for gpu in gpus):
        return f"{module.__name__} needs compute capability 7.5, the GPU has {gpus[0].capability}"
    return None


def _logger(module: ModuleType, messages: Messages) -> Any:
    base: Any = module.ILogger

    class Logger(base):  # type: ignore[misc]  # the module is a value, its classes have no types
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, text: str) -> None:
            messages.add(severity.name, text)

    return Logger()


def _monitor(module: ModuleType, phases: Phases) -> Any:
    base: Any = module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return phases.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


def _create_builder(module: ModuleType, logger: Any, messages: Messages) -> Any:
    try:
        return module.Builder(logger)
    except (TypeError, RuntimeError) as error:  # the bindings' way of passing on that the library returned nothing
        reason = run_support(module) or "; ".join(messages.errors) or str(error)
        raise EnvironmentMismatch(f"{module.__name__} cannot build here: {reason}") from error


def _flags(module: ModuleType) -> int:
    """Ask for strong typing: needed in TensorRT 10, ignored in 11 and RTX, which know no other kind."""
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(parser: Any, model: bytes | Path, module: ModuleType, frozen: Mapping[str, int]) -> ir.Model:
    """Let the parser read the model; returns it without its weights."""
    parsed = _read(parser, model, frozen)
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not parsed and all(error.node() < 0 for error in errors):
        reasons = [readable(error.desc()) for error in errors] or ["no reason given"]
        raise BuildFailed(listed(f"the {module.__name__} parser refuses the model", reasons))
    graph = _open(model)
    if not parsed:
        lines = [describe(error, domain_of(graph, error.node_name(), error.node_operator())) for error in errors]
        hint = "change these nodes, or build for a target without engines, such as ort-cpu"
        raise BuildFailed(listed(f"the {module.__name__} parser refuses nodes", lines), hint=hint)
    faults = [f"{node.name} ({node.op_type}): {reason}" for node, reason in find_faults(graph, module.__name__)]
    if faults:
        raise BuildFailed(listed(f"{module.__name__} must not be given nodes", faults))
    return graph


def _read(parser: Any, model: bytes | Path, frozen: Mapping[str, int]) -> bool:
    """Hand the model to the parser, with fixed numbers in place of the sizes that are frozen."""
    if not frozen:
        return bool(parser.parse(model) if isinstance(model, bytes) else parser.parse_from_file(str(model)))
    content = freeze(_proto(model), frozen).SerializeToString()
    return bool(parser.parse(content) if isinstance(model, bytes) else parser.parse(content, str(model)))


def _open(model: bytes | Path) -> ir.Model:
    """Open a model for a look at its nodes; weights beside it are not read."""
    return ir.from_proto(_proto(model))


def _proto(model: bytes | Path) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    proto.ParseFromString(model if isinstance(model, bytes) else read_bytes(model))
    return proto


def _let_decompose(network: Any, module: ModuleType) -> None:
    """Let the builder take attention apart where it has no kernel for it, as for float32 or small heads."""
    kind = getattr(module, "IAttentionInputLayer", None)  # TensorRT 10.3 has none
    for index in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(index)
        if layer.type == module.LayerType.ATTENTION_INPUT:
            layer.__class__ = kind  # the bindings' way of telling what a layer is
            layer.attention.decomposable = True


def _configure(config: Any, module: ModuleType, options: EngineOptions) -> None:
    if options.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace)
    if options.sparse:
        config.set_flag(module.BuilderFlag.SPARSE_WEIGHTS)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.detailed:
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if options.compute_capabilities:
        wanted = _capabilities(module, options.compute_capabilities)
        config.num_compute_capabilities = len(wanted)
        for index, capability in enumerate(wanted):
            config.set_compute_capability(capability, index)


def _capabilities(module: ModuleType, wanted: Iterable[str]) -> list[Any]:
    """Return the module's values for compute capabilities such as ``"8.6"``."""
    if not hasattr(module, "ComputeCapability"):
        raise UsageError(f"{module.__name__} builds for the GPU at hand only", hint="name no compute capability")
    known = {_capability(name): value for name, value in module.ComputeCapability.__members__.items()}
    del known["none"]
    names = list(dict.fromkeys(wanted))
    for name in names:
        if name not in known:
            raise UsageError(f"unknown compute capability {name!r}", hint=f"known: {', '.join(known)}")
    if "current" in names and len(names) > 1:
        raise UsageError("the compute capability 'current' stands alone", hint="name the others, or only 'current'")
    if "current" in names and (reason := run_support(module)):
        raise EnvironmentMismatch(f"there is no current compute capability: {reason}", hint="name it, such as 8.6")
    return [known[name] for name in names]


def _built_for(module: ModuleType, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The GPUs that the engine runs on; TensorRT builds for the one at hand, which is named nowhere else."""
    if asked == ("current",) or (not asked and not hasattr(module, "ComputeCapability")):
        with suppress(EnvironmentMismatch):
            return (find_gpus()[0].capability,)
    return asked


def _capability(member: str) -> str:
    """``SM86`` is 8.6, ``CURRENT`` is current."""
    return f"{member[2:-1]}.{member[-1]}" if member.startswith("SM") else member.lower()


def _add_profiles(builder: Any, config: Any, profiles: Iterable[Profile], messages: Messages) -> None:
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for name, (low, best, high) in profile.items():
            shapes.set_shape(name, low, best, high)
        if config.add_optimization_profile(shapes) < 0:
            raise UsageError(listed("the builder does not accept the profile", messages.errors or [str(profile)]))


def _build(builder: Any, network: Any, config: Any, phases: Phases) -> Any:
    """Build in a thread of its own: native code holds back signals, so this one stays awake for them."""
    with ThreadPoolExecutor(1) as pool:
        try:
            job = pool.submit(builder.build_serialized_network, network, config)
            while not wait([job], timeout=_TICK).done:
                pass
            return job.result()
        except BaseException:
            phases.cancel()
            raise


def _failure(module: ModuleType, messages: Messages, phases: Phases) -> BaseException:
    if phases.error is not None:
        return phases.error
    if phases.cancelled:
        return BuildFailed("the engine build was cancelled")
    errors = messages.errors[-3:] or ["no reason given"]
    exhausted = any("OutOfMemory" in error for error in errors)
    kind = ResourceExhausted if exhausted else BuildFailed
    hint = "free GPU memory, or give smaller profiles" if exhausted else None
    return kind(listed(f"{module.__name__} cannot build the engine", errors), hint=hint)
