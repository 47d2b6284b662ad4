"""Divide a value for some of its readers only: by a second norm with parameters of its own, or by a Mul."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.folding.activation import ACTIVATION_KEY, Activation
from qexport.passes.match import add_constant, array, maker, producer

NORMS = {"LayerNormalization": (1, 2), "RMSNormalization": (1,), "SimplifiedLayerNormalization": (1,)}
"""Norms and where their parameters are."""


def is_norm(value: ir.Value) -> bool:
    """Whether ``value`` is what a normalization with constant parameters makes."""
    node = producer(value, *NORMS)
    return (
        node is not None
        and value.index() == 0
        and all(given is None or array(given) is not None for given in node.inputs[1:])
    )


def copy_norm(value: ir.Value, readers: Sequence[ir.Node], scale: NDArray[np.float64], known: Activation) -> None:
    """Let ``readers`` read a copy of the norm that makes ``value``, its parameters divided by ``scale``."""
    norm = maker(value)
    inputs = list(norm.inputs)
    for index in NORMS[norm.op_type]:
        numbers = array(inputs[index]) if index < len(inputs) else None
        if numbers is not None:
            name = f"{inputs[index].name}/scaled"  # type: ignore[union-attr]  # it has numbers, so it is there
            inputs[index] = add_constant(norm, name, (numbers.astype(np.float64) / scale).astype(numbers.dtype))
    copy = ir.Node(norm.domain, norm.op_type, inputs, list(norm.attributes.values()), name=f"{norm.name}/smooth")
    _lead(value, copy, readers, scale, known)


def leave_mul(value: ir.Value, readers: Sequence[ir.Node], scale: NDArray[np.float64], known: Activation) -> None:
    """Let ``readers`` read ``value`` times ``1 / scale``."""
    dtype = np.float32 if value.dtype is None else value.dtype.numpy()
    factor = add_constant(readers[0], f"{value.name}/smooth", (1 / scale).astype(dtype))
    _lead(value, ir.node("Mul", [value, factor], name=f"{maker(value).name}/smooth"), readers, scale, known)


def _lead(
    value: ir.Value, node: ir.Node, readers: Sequence[ir.Node], scale: NDArray[np.float64], known: Activation
) -> None:
    """Put ``node`` behind the maker of ``value`` and let ``readers`` read it instead."""
    made = node.outputs[0]
    made.name, made.type = f"{value.name}/smooth:0", ir.TensorType(value.dtype or ir.DataType.FLOAT)
    made.shape = None if value.shape is None else value.shape.copy()
    body = maker(value).graph
    assert body is not None
    body.insert_after(maker(value), node)
    for reader in readers:
        reader.replace_input_with(0, made)
    s = scale.astype(np.float32)
    made.meta[ACTIVATION_KEY] = Activation(known.axis, known.low / s, known.high / s, known.rows / s)
