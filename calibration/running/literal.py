"""Take Q/DQ nodes literally: the numbers that a DequantizeLinear of a constant makes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.match import array, sweep

Array = NDArray[np.float32]


def dequantize_weights(model: ir.Model, keep: Collection[str] = ()) -> None:
    """Replace every dequantized constant of the main graph, in place, by the floats that it stands for.

    They keep their names, and those called ``keep`` stay dequantized. A runtime would do the same while it loads the
    model, with several copies at a time.
    """
    for node in list(model.graph):
        made = node.outputs[0]
        if node.op_type != "DequantizeLinear" or node.domain != "" or made.dtype is None:
            continue
        if made.name in keep or made.is_graph_output() or any(array(value) is None for value in node.inputs):
            continue
        tensor = ir.tensor(dequantized(node).astype(made.dtype.numpy(), copy=False), name=made.name)
        value = ir.val(str(made.name), made.dtype, tensor.numpy().shape, const_value=tensor)
        read = list(node.inputs)
        made.replace_all_uses_with(value)
        model.graph.remove(node, safe=True)
        sweep(read)
        model.graph.register_initializer(value)


def dequantized(node: ir.Node) -> Array:
    """The numbers that a DequantizeLinear of a constant makes: per tensor, per axis or in blocks along an axis."""
    codes, scale, zero = (array(value) for value in (*node.inputs, None)[:3])
    assert codes is not None
    assert scale is not None
    axis, block = node.attributes.get_int("axis", 1) % max(codes.ndim, 1), node.attributes.get_int("block_size", 0)

    def wide(numbers: NDArray[Any]) -> Array:
        exact: Array = numbers.astype(np.float32)
        if block:
            return np.repeat(exact, block, axis)[tuple(slice(size) for size in codes.shape)]
        return exact.reshape([-1 if i == axis else 1 for i in range(codes.ndim)]) if numbers.size > 1 else exact

    steps: Array = codes.astype(np.float32)
    if zero is not None and np.any(zero):
        steps -= wide(zero)
    steps *= wide(scale)
    return steps
