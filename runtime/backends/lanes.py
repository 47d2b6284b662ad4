"""Execution contexts of an engine, each with a stream: lent to whoever runs, so that threads run side by side.

A context has one optimization profile for good. It remembers whose shapes and addresses it has, so that calls of the
same shape in a row set nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from types import ModuleType
from typing import Any

from qexport.errors import BuildFailed
from qexport.runtime.backends.cuda import Cuda


@dataclass(eq=False, slots=True)
class Lane:
    """A context on a stream.

    Attributes:
        context: Of the engine.
        stream: Where its work goes.
        profile: Index of its optimization profile.
        holder: Whose shapes and addresses it has.
    """

    context: Any
    stream: Any
    profile: int
    holder: object = None


class Lanes:
    """All contexts of an engine that are made, and those that are free."""

    def __init__(self, cuda: Cuda, make: Callable[[], Any]) -> None:
        """Make contexts by ``make`` when none is free."""
        self._cuda, self._make, self._lock = cuda, make, Lock()
        self._all: list[Lane] = []
        self._free: dict[int, list[Lane]] = {}

    def take(self, profile: int, holder: object) -> Lane:
        """A free lane, the one that ``holder`` had if it is free."""
        with self._lock:
            free = self._free.setdefault(profile, [])
            index = next((index for index, lane in enumerate(free) if lane.holder is holder), -1)
            if not free:
                self._all.append(self._open(profile))
                return self._all[-1]
            return free.pop(index)

    def give(self, lane: Lane) -> None:
        """A lane is free again."""
        with self._lock:
            self._free.setdefault(lane.profile, []).append(lane)

    def close(self) -> None:
        """Free all contexts and streams, none of which is used any more."""
        with self._lock:
            for lane in self._all:
                lane.context = lane.holder = None
                self._cuda.end_stream(lane.stream)
            self._all.clear()
            self._free.clear()

    def _open(self, profile: int) -> Lane:
        context, stream = self._make(), self._cuda.stream()
        if context is None:
            raise BuildFailed("the engine gives no execution context", hint="is there enough GPU memory?")
        if not context.set_optimization_profile_async(profile, int(stream)):
            raise BuildFailed(f"the engine does not take its optimization profile {profile}")
        self._cuda.wait(stream)
        return Lane(context, stream, profile)


def context_maker(module: ModuleType, engine: Any, *, graphs: bool) -> Callable[[], Any]:
    """How contexts are made: memory for their own profile alone; on TensorRT-RTX kernels are compiled once for all.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        engine: The engine.
        graphs: Whether TensorRT-RTX records CUDA graphs by itself, which it does once it has compiled the kernels for a
            shape; TensorRT leaves that to whoever runs.
    """
    strategy = module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
    if not records_graphs(module):
        return lambda: engine.create_execution_context(strategy)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    config.set_runtime_cache(config.create_runtime_cache())
    if graphs:
        config.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return lambda: engine.create_execution_context(config)


def records_graphs(module: ModuleType) -> bool:
    """Whether contexts of the module record CUDA graphs by themselves."""
    return hasattr(module, "CudaGraphStrategy")
