"""Zeros in the weights of a model as they are stored: how many, and whether they lie 2:4 along K.

Integers count as zero where they are their zero point, behind DequantizeLinear and inside integer operators alike. 2:4
is what sparse tensor cores read: of every 4 consecutive inputs of an output at least 2 are zero; the inputs of a
convolution are its input channels, at every position of its kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from qexport.exporter.looking.inspect import dtype_name, factors_of, find_layers
from qexport.passes.match import array, constant

KEPT, GROUP = 2, 4

_ZERO_POINTS = {"MatMulInteger": 3, "ConvInteger": 3, "QLinearMatMul": 5, "QLinearConv": 5, "MatMulIntegerToFloat": 5}
"""Operators that multiply integers, and their input that says which integer of the weight is zero."""


class Zeros(BaseModel):
    """The zeros of one weight that one layer multiplies with.

    Attributes:
        tensor: What is stored.
        node: The layer.
        op: Its operator.
        stored: Element type of what is stored.
        shape: As the layer sees it.
        zeros: Share of zeros.
        groups: Share of the groups of 4 consecutive inputs that have 2 zeros or more; ``None`` where 4 does not divide
            the inputs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensor: str
    node: str
    op: str
    stored: str
    shape: tuple[int, ...]
    zeros: float
    groups: float | None

    @property
    def two_of_four(self) -> bool:
        """Whether the whole weight is 2:4."""
        return self.groups == 1


@dataclass(frozen=True, slots=True)
class _Held:
    """A constant seen through what stands before a layer: its name, its type, and where it is zero."""

    name: str
    stored: str
    zero: NDArray[np.bool_]


def zeros_of(model: ir.Model) -> list[Zeros]:
    """The zeros of every constant weight of a layer that multiplies, in the order of the graph.

    Weights packed by an operator of their own (MatMulNBits) are not looked into.
    """
    return [found for node in find_layers(model) for found in _of(node)]


def _of(node: ir.Node) -> Iterator[Zeros]:
    index = factors_of(node)[1]
    weight = node.inputs[index] if len(node.inputs) > index else None
    held = _look(weight, _zero_point(node))
    if held is None or held.zero.ndim < 2 or not held.zero.size:
        return
    zero = np.moveaxis(held.zero, _inputs_axis(node, held.zero.ndim), -1)
    groups = None
    if zero.shape[-1] % GROUP == 0:
        enough = zero.reshape(-1, GROUP).sum(axis=1) >= GROUP - KEPT
        groups = float(enough.mean())
    yield Zeros(
        tensor=held.name,
        node=node.name or "",
        op=node.op_type,
        stored=held.stored,
        shape=held.zero.shape,
        zeros=float(zero.mean()),
        groups=groups,
    )


def _zero_point(node: ir.Node) -> ir.Value | None:
    place = _ZERO_POINTS.get(node.op_type, -1)
    return node.inputs[place] if 0 <= place < len(node.inputs) else None


def _inputs_axis(node: ir.Node, rank: int) -> int:
    """The axis of a weight along which a layer sums up."""
    if "Conv" in node.op_type:
        return 0 if node.op_type == "ConvTranspose" else 1
    turned = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    return rank - 1 if turned else rank - 2


def _stored(value: ir.Value) -> str:
    tensor = constant(value)
    return dtype_name(None if tensor is None else tensor.dtype)


def _look(value: ir.Value | None, zero_point: ir.Value | None = None) -> _Held | None:
    """What is stored of a weight; ``None`` where it is computed."""
    numbers = array(value)
    if value is not None and numbers is not None:
        return _Held(value.name or "", _stored(value), _zeros(numbers, array(zero_point)))
    node = None if value is None else value.producer()
    if node is None or node.domain not in ("", "ai.onnx") or not node.inputs:
        return None
    if node.op_type == "DequantizeLinear":
        return _dequantized(node)
    held = _look(node.inputs[0], zero_point) if node.op_type in _MOVES else None
    zero = None if held is None else _MOVES[node.op_type](node, held.zero)
    return None if held is None or zero is None else _Held(held.name, held.stored, zero)


def _dequantized(node: ir.Node) -> _Held | None:
    """The integers behind a DequantizeLinear, with zero points per tensor, per axis or in blocks."""
    codes, origin = (array(value) for value in (node.inputs[0], (*node.inputs, None, None)[2]))
    if codes is None:
        return _look(node.inputs[0])
    if origin is not None and origin.size > 1:
        axis, block = node.attributes.get_int("axis", 1) % codes.ndim, node.attributes.get_int("block_size", 0)
        if block:
            origin = np.repeat(origin, block, axis)[tuple(slice(size) for size in codes.shape)]
        else:
            origin = origin.reshape([-1 if i == axis else 1 for i in range(codes.ndim)])
    value = node.inputs[0]
    assert value is not None
    return _Held(value.name or "", _stored(value), _zeros(codes, origin))


def _zeros(numbers: NDArray[Any], origin: NDArray[Any] | None) -> NDArray[np.bool_]:
    """Where ``numbers`` are zero, or their zero point; types of few bits are compared as floats."""
    exact = numbers.astype(np.float32)
    return np.asarray(exact == (0 if origin is None else origin.astype(np.float32)))


def _transposed(node: ir.Node, zero: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return zero.transpose(tuple(node.attributes.get_ints("perm", ())) or None)


def _reshaped(node: ir.Node, zero: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    wanted = array(node.inputs[1])
    if wanted is None:
        return None
    sizes = [zero.shape[i] if size == 0 and i < zero.ndim else int(size) for i, size in enumerate(wanted)]
    return zero.reshape(sizes)


def _same(_: ir.Node, zero: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return zero


_MOVES = {"Transpose": _transposed, "Reshape": _reshaped, "Cast": _same, "Identity": _same}
"""Operators between a constant and its layer that move numbers about, or leave them what they are."""
