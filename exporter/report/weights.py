"""The float weights that were quantized, by output channel: where a few of them are much larger than the others."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.layers import kernel_of
from qexport.exporter.report.values import Channel, Weights
from qexport.passes.match import array
from qexport.passes.placement import CHANNEL_AXIS

WORST = 32
QUARTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def weight_rows(model: ir.Model, names: Collection[str]) -> tuple[Weights, ...]:
    """Return one row for each node of ``model`` called one of ``names`` that has a weight, in graph order.

    The weight is the one that the node was calibrated with, else the one it has. One is in memory at a time.
    """
    return tuple(_rows(model, frozenset(names)))


def _rows(model: ir.Model, names: frozenset[str]) -> Iterator[Weights]:
    for node in model.graph:
        if node.name in names and node.op_type in CHANNEL_AXIS and len(node.inputs) > 1:
            kernel = kernel_of(node)
            kernel = array(node.inputs[1]) if kernel is None else kernel
            if kernel is not None and kernel.ndim > 1 and kernel.size:
                yield _row(node, kernel)


def _row(node: ir.Node, kernel: NDArray[np.generic]) -> Weights:
    axis = CHANNEL_AXIS[node.op_type](node)
    others = tuple(i for i in range(kernel.ndim) if i != axis)
    high, low = (np.asarray(end(kernel, axis=others), np.float64) for end in (np.max, np.min))
    reach = np.maximum(np.abs(high), np.abs(low))
    spread = np.quantile(reach, QUARTILES)
    order = np.lexsort((np.arange(reach.size), -reach))[:WORST]
    boxes = np.quantile(np.take(kernel, order, axis).astype(np.float64), QUARTILES, axis=others)
    worst = tuple(Channel(int(i), *map(float, box)) for i, box in zip(order, boxes.T, strict=True))
    outlier = float(spread[4] / spread[2]) if spread[2] > 0 else 0.0
    return Weights(node.name or "", axis, reach.size, tuple(map(float, spread)), outlier, worst)
