"""Run passes in order on a clone, and let observers watch every step."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from qexport.passes.base import Decision, Pass


@dataclass(frozen=True, slots=True)
class Step:
    """What one pass did.

    Attributes:
        name: The pass's name in the recipe.
        modified: Whether the model changed.
        seconds: Wall time of the pass alone.
        nodes: Number of nodes in the main graph afterwards.
        decisions: What was done or refused, node by node.
        parameters: Number of elements of all initializers afterwards.
    """

    name: str
    modified: bool
    seconds: float
    nodes: int
    decisions: tuple[Decision, ...]
    parameters: int = 0


class Observer(Protocol):
    """Watches steps; raising stops the pipeline."""

    def before(self, name: str, step: Pass, model: ir.Model) -> None:
        """Called with the model as the pass will see it."""

    def after(self, step: Step, model: ir.Model) -> None:
        """Called with the model as the pass left it."""


def run(
    model: ir.Model, steps: Iterable[tuple[str, Pass]], observers: Iterable[Observer] = ()
) -> tuple[ir.Model, list[Step]]:
    """Run named passes over a clone of ``model``; the model that was given is never touched.

    Returns:
        The transformed clone and one record per pass.
    """
    work = model.clone()
    return work, list(_walk(work, steps, tuple(observers)))


def _walk(model: ir.Model, steps: Iterable[tuple[str, Pass]], observers: tuple[Observer, ...]) -> Iterator[Step]:
    for name, step in steps:
        for observer in observers:
            observer.before(name, step, model)
        start = time.perf_counter()
        result = step(model)
        seconds = time.perf_counter() - start
        decisions = getattr(result, "decisions", ())
        record = Step(name, result.modified, seconds, model.graph.num_nodes(), decisions, parameters(model))
        for observer in observers:
            observer.after(record, model)
        yield record


def parameters(model: ir.Model) -> int:
    """Number of elements of all initializers."""
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    return sum(tensor.size for tensor in tensors if tensor is not None)
