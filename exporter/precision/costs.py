"""What each region costs in float and in int8, from the runtime's own profile of both graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.running.execute import open_model
from qexport.exporter.precision.regions import Region, label
from qexport.runtime.profile import Kernel, profile
from qexport.runtime.session import SessionOptions


@dataclass(frozen=True, slots=True)
class Cost:
    """Milliseconds of one region, in float and quantized."""

    before: float
    after: float

    @property
    def ratio(self) -> float:
        """How much slower the quantized region is."""
        return self.after / max(self.before, 1e-9)


def region_costs(
    plain: ir.Model,
    result: ir.Model,
    regions: Sequence[Region],
    feeds: Mapping[str, NDArray[Any]],
    options: SessionOptions,
) -> list[Cost]:
    """Profile both models on the same inputs and add up what belongs to each region."""
    sums = []
    for model in (plain, result):
        kernels = profile(lambda chosen, model=model: open_model(model, chosen), options, feeds)  # type: ignore[misc]  # mypy infers no lambda with a default
        sums.append(attribute(kernels, label(model.graph, regions), len(regions)))
    return [Cost(before, after) for before, after in zip(*sums, strict=True)]


def attribute(kernels: Sequence[Kernel], labels: Mapping[str, int], count: int) -> list[float]:
    """Milliseconds of each of ``count`` regions.

    The runtime derives the names of merged nodes from those of the file (``conv1_nchwc``, ``conv1_token_12``): the
    longest name that theirs starts with counts. What it named by itself (``ReorderOutput``, ``Transpose_token_3``)
    belongs to what ran before it.
    """
    totals = [0.0] * (count + 1)  # the last one is nobody's
    known = sorted((name for name in labels if name), key=len, reverse=True)
    last = -1
    for kernel in kernels:
        name = kernel.name if kernel.name in labels else _prefix(kernel.name, known)
        last = last if name is None else labels[name]
        totals[last] += 1e3 * kernel.seconds
    return totals[:-1]


def _prefix(name: str, known: Sequence[str]) -> str | None:
    """The longest known name that ``name`` starts with, up to a mark that the runtime puts behind it."""
    return next((start for start in known if name.startswith(start) and name[len(start)] in "_/:"), None)
