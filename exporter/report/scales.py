"""What numbers a node multiplies, and at which scales, read from the graph that runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.exporter.looking.element_types import MOVING, ElementTypes
from qexport.exporter.looking.inspect import LAYERS, dtype_name, factors_of
from qexport.passes.match import array, constant

Places = tuple[int, int | None, int | None]  # which inputs are the numbers, their scale, their zero point

_NBITS: tuple[Places, Places] = ((0, None, None), (1, 2, 3))
_QLINEAR: tuple[Places, Places] = ((0, 1, 2), (3, 4, 5))
INTEGER: dict[str, tuple[Places, Places]] = {
    "MatMulIntegerToFloat": ((0, 2, 4), (1, 3, 5)),
    "MatMulInteger": ((0, None, 2), (1, None, 3)),
    "ConvInteger": ((0, None, 2), (1, None, 3)),
    "QLinearMatMul": _QLINEAR,
    "QLinearConv": _QLINEAR,
    "QGemm": _QLINEAR,
    "QLinearAdd": _QLINEAR,
    "MatMulNBits": _NBITS,
    "MatMulBnb4": ((0, None, None), (1, None, None)),
}
"""Operators that are told scales as inputs, or multiply integers: the places of the activation and of the weight."""


@dataclass(frozen=True, slots=True)
class Scales:
    """The types of both factors, as ``inspect`` calls them, and what one step of each is worth.

    ``weight`` is the smallest and the largest of all channels or blocks. What is found out at every call is ``None``.
    """

    activation: str = ""
    weight: str = ""
    scale: float | None = None
    zero_point: int | None = None
    weight_scale: tuple[float, float] | None = None


def scale_of(node: ir.Node, types: ElementTypes) -> Scales:
    """Read the types and scales of ``node``; of what does not multiply, the type it reads or makes."""
    if node.op_type == "Gather":
        return _table(node, types)
    places = INTEGER.get(node.op_type)
    if places is None and node.op_type in LAYERS:
        first, second = factors_of(node)
        places = ((first, None, None), (second, None, None))
    if places is None:
        places = ((0, None, None), (len(node.inputs), None, None))
    (x, s, z), (w, ws, _) = places
    if not _is_stored(_at(node, w)):
        w, ws = len(node.inputs), None  # a second activation
    scale, zero = _numbers(node, x, s, z)
    weight_scale, _ = _numbers(node, w, ws, None)
    one = scale is not None and scale.size == 1
    return Scales(
        _type(_at(node, x), types) or _type(node.outputs[0], types),
        _weight_type(node, w, types),
        float(scale.reshape(-1)[0]) if one and scale is not None else None,
        int(zero.reshape(-1)[0].astype(np.float32)) if one and zero is not None and zero.size == 1 else None,
        _ends(weight_scale),
    )


def _table(node: ir.Node, types: ElementTypes) -> Scales:
    """The table of a Gather as its weight; scales of rows that are gathered by a node of their own are behind it."""
    value = _at(node, 0)
    held = None if value is None else constant(value)
    if value is None or (held is None and _dequantizer(value) is None):
        return Scales(_type(value, types))
    scale, _ = _numbers(node, 0, None, None)
    if scale is None and held is not None and held.dtype in (ir.DataType.INT8, ir.DataType.UINT8):
        scale = _gathered_scale(node)
    return Scales("", _type(value, types), None, None, _ends(scale))


def _gathered_scale(rows: ir.Node) -> NDArray[np.generic] | None:
    """The scales that ``Gather, Cast, Mul`` multiplies rows of integers with: a Gather by the same indices."""
    value = rows.outputs[0]
    for _ in range(2):
        users = set(value.consumers())
        if len(users) != 1:
            return None
        (user,) = users
        if user.op_type == "Mul":
            others = (v.producer() for v in user.inputs if v is not None and v is not value)
            return next((array(n.inputs[0]) for n in others if n is not None and n.op_type == "Gather"), None)
        value = user.outputs[0]
    return None


def _at(node: ir.Node, index: int | None) -> ir.Value | None:
    return node.inputs[index] if index is not None and index < len(node.inputs) else None


def _numbers(
    node: ir.Node, at: int, scale: int | None, zero: int | None
) -> tuple[NDArray[np.generic] | None, NDArray[np.generic] | None]:
    """Scale and zero point of an input: those of the node itself, or of the DequantizeLinear behind it."""
    if scale is None and (found := _dequantizer(_at(node, at))) is not None:
        node, scale, zero = found, 1, 2
    return array(_at(node, scale)), array(_at(node, zero))


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    while node is not None and node.op_type in MOVING and node.inputs and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _is_stored(value: ir.Value | None) -> bool:
    """Whether a value is a constant, or what one is dequantized to."""
    found = None if value is None else _dequantizer(value)
    return value is not None and constant(value if found is None else found.inputs[0]) is not None


def _type(value: ir.Value | None, types: ElementTypes) -> str:
    found = types.stored(value)
    return "" if found is None else dtype_name(found)


def _weight_type(node: ir.Node, at: int, types: ElementTypes) -> str:
    """The type of the second factor; bits that are packed into bytes go by the operator."""
    if node.op_type == "MatMulNBits":
        return f"int{node.attributes.get_int('bits', 4)}"
    return "nf4" if node.op_type == "MatMulBnb4" else _type(_at(node, at), types)


def _ends(scale: NDArray[np.generic] | None) -> tuple[float, float] | None:
    if scale is None or not scale.size:
        return None
    wide = scale.astype(np.float32)
    return float(wide.min()), float(wide.max())
