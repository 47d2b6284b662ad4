"""What each region costs in float and in int8, from the runtime's own profile of both graphs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.running.execute import open_model
from qexport.exporter.precision.regions import Region, label
from qexport.runtime.profile import Kernel, profile
from qexport.runtime.session import SessionOptions

_MERGED = "fused "  # what onnxruntime puts before the name of a product that it has given a bias
Kernels: TypeAlias = tuple[list[Kernel], list[Kernel]]  # of the float graph, of the result


@dataclass(frozen=True, slots=True)
class Cost:
    """Milliseconds of one region, in float and quantized."""

    before: float
    after: float

    @property
    def ratio(self) -> float:
        """How much slower the quantized region is."""
        return self.after / max(self.before, 1e-9)


def profile_both(
    plain: ir.Model, result: ir.Model, feeds: Mapping[str, NDArray[Any]], options: SessionOptions
) -> Kernels:
    """Profile both models on the same inputs."""

    def profiled(model: ir.Model) -> list[Kernel]:
        return profile(lambda chosen: open_model(model, chosen), options, feeds)

    return profiled(plain), profiled(result)


def region_costs(plain: ir.Model, result: ir.Model, regions: Sequence[Region], kernels: Kernels) -> list[Cost]:
    """Add up what belongs to each region in the profiles of both models."""
    before, after = (
        attribute(found, label(model.graph, regions), len(regions))
        for model, found in zip((plain, result), kernels, strict=True)
    )
    return [Cost(*both) for both in zip(before, after, strict=True)]


def attribute(kernels: Sequence[Kernel], labels: Mapping[str, int], count: int) -> list[float]:
    """Milliseconds of each of ``count`` regions.

    The runtime derives the names of merged nodes from those of the file (``conv1_nchwc``, ``conv1_token_12``): the
    longest name that theirs starts with counts. What it named by itself (``ReorderOutput``, ``Transpose_token_3``)
    belongs to what ran before it.
    """
    totals = [0.0] * (count + 1)  # the last one is nobody's
    for kernel, owner in zip(kernels, owners(kernels, labels), strict=True):
        totals[owner] += 1e3 * kernel.seconds
    return totals[:-1]


def owners(kernels: Sequence[Kernel], labels: Mapping[str, int]) -> list[int]:
    """The label of each kernel, -1 for none."""
    known = sorted((name for name in labels if name), key=len, reverse=True)
    found, last = [], -1
    for kernel in kernels:
        called = kernel.name.removeprefix(_MERGED)
        name = called if called in labels else _prefix(called, known)
        last = last if name is None else labels[name]
        found.append(last)
    return found


def _prefix(name: str, known: Sequence[str]) -> str | None:
    """The longest known name that ``name`` starts with, up to a mark that the runtime puts behind it."""
    return next((start for start in known if name.startswith(start) and name[len(start)] in "_/:"), None)


CONVOLUTIONS = {"Conv", "FusedConv", "NhwcFusedConv", "ConvInteger", "QLinearConv", "ConvTranspose"}
PRODUCTS = {"MatMul", "FusedMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul"}
PRODUCTS |= {"Gemm", "FusedGemm", "QGemm", "MatMulNBits", "MatMulBnb4"}


def flops(kernel: Kernel, weight: Sequence[int] = ()) -> float:
    """Multiplications and additions of a product or a convolution; 0 for everything else, and where sizes are unknown.

    One output element of a product takes K of each, one of a convolution as many as its kernel has weights.

    Args:
        kernel: With the shapes of what it read and made.
        weight: Shape of the weight, which runtimes mostly do not tell; convolutions need it.
    """
    if not kernel.inputs or not kernel.outputs:
        return 0.0
    made, read = kernel.outputs[0], kernel.inputs[0]
    if kernel.op in PRODUCTS:
        # whether the first factor is transposed is not told: M times K is its last two axes in either order
        inner = math.prod(read[-2:]) / max(made[-2], 1) if min(len(made), len(read)) > 1 else math.prod(read[-1:])
        return 2.0 * math.prod(made) * inner
    if kernel.op in CONVOLUTIONS and len(weight) == len(made):
        return 2.0 * math.prod(read if kernel.op == "ConvTranspose" else made) * math.prod(weight[1:])
    return 0.0
