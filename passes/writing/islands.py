"""Operators between quantizers, and whether one integer operator could stand for all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.match import array, consumer, producer, scalar

CONTRIB = "com.microsoft"
MOVES = ("MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity")
"""What gives the same elements whether it works on numbers or on the integers that stand for them."""
CLIPS = ("Relu", "Clip")
MAX_POOL_OPSET = 12  # the first whose MaxPool takes integers
INTEGERS = (np.dtype(np.int8), np.dtype(np.uint8))
MOST = 2**31 - 1
TOLERANCE = 1e-5  # relative; how far a quantizer may saturate beyond a Clip that it stands for


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a Q or DQ node says: integers, their scale and their zero point."""

    node: ir.Node
    scale: NDArray[np.float32]
    zero: NDArray[Any]

    @property
    def integers(self) -> ir.Value:
        """What a Q node makes, or a DQ node reads."""
        value = self.node.inputs[0] if self.node.op_type == "DequantizeLinear" else self.node.outputs[0]
        assert value is not None
        return value

    @property
    def per_tensor(self) -> bool:
        """Whether one scale goes for all elements."""
        return self.scale.size == 1


@dataclass(frozen=True, slots=True)
class Island:
    """An operator between quantizers.

    Attributes:
        node: The operator.
        reads: What its inputs are dequantized from.
        bias: Its bias, ``[channels]``, or ``None``.
        behind: The nodes between it and its quantizer.
        writes: The quantizer behind it.
    """

    node: ir.Node
    reads: tuple[Numbers, Numbers]
    bias: NDArray[np.float64] | None
    behind: tuple[ir.Node, ...]
    writes: Numbers

    @property
    def bias_steps(self) -> NDArray[np.float64] | None:
        """The bias over the scale of the sums, ``[channels]``."""
        if self.bias is None:
            return None
        left, right = (read.scale.astype(np.float64) for read in self.reads)
        return np.asarray(np.rint(self.bias / (left.reshape(()) * right.reshape(-1))))


@dataclass(frozen=True, slots=True)
class Form:
    """The integer form of an operator.

    Attributes:
        op: Its name.
        domain: Where it is defined.
        weight_axis: Axis of the second input that may have a scale for each element; ``None`` where there is none.
        bias_at: Index of the bias among the inputs; ``None`` where it takes none.
        fits: Why a node cannot have this form, if it cannot.
        drops: Attributes that the form does not have.
    """

    op: str
    domain: str = ""
    weight_axis: Callable[[ir.Node], int] | None = None
    bias_at: int | None = None
    fits: Callable[[ir.Node], str | None] = lambda node: None
    drops: tuple[str, ...] = ()


def _gemm_fits(node: ir.Node) -> str | None:
    plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    return None if plain else "alpha or beta is not 1"


FORMS = {
    "Conv": Form("QLinearConv", weight_axis=lambda node: 0, bias_at=8),
    "MatMul": Form("QLinearMatMul", weight_axis=lambda node: 1),
    "Gemm": Form(
        "QGemm",
        CONTRIB,
        weight_axis=lambda node: 1 - node.attributes.get_int("transB", 0),
        bias_at=6,
        fits=_gemm_fits,
        drops=("beta",),
    ),
    "Add": Form("QLinearAdd", CONTRIB),
}


def find_island(node: ir.Node, form: Form, opset: int) -> Island | str:
    """The island around ``node`` that ``form`` can stand for, or why there is none."""
    left, right = (_numbers(producer(value, "DequantizeLinear")) for value in node.inputs[:2])
    if left is None or right is None:
        return "an input is in float, or quantized in another way"
    ending = _ending(node.outputs[0], opset)
    if isinstance(ending, str):
        return ending
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    constant = array(bias)
    if bias is not None and (constant is None or constant.ndim != 1):
        return "its bias is computed, or no vector"
    island = Island(node, (left, right), None if constant is None else constant.astype(np.float64), *ending)
    return _granularity(island, form) or form.fits(node) or _overflow(island) or island


def _numbers(node: ir.Node | None) -> Numbers | None:
    """What a Q or DQ node says, if it says 8-bit integers by constants, not in blocks."""
    if node is None or len(node.inputs) < 3 or node.attributes.get_int("block_size", 0) != 0:
        return None
    scale, zero = array(node.inputs[1]), array(node.inputs[2])
    if scale is None or zero is None or zero.dtype not in INTEGERS:
        return None
    return Numbers(node, scale.astype(np.float32), zero)


def _ending(value: ir.Value, opset: int) -> tuple[tuple[ir.Node, ...], Numbers] | str:
    """The nodes between ``value`` and its only quantizer, and that one; or why there is none."""
    behind: list[ir.Node] = []
    while (node := consumer(value, *MOVES, *CLIPS)) is not None and _passes_on(node, value):
        behind.append(node)
        value = node.outputs[0]
    quantizer = consumer(value, "QuantizeLinear")
    writes = _numbers(quantizer)
    if quantizer is None:
        return "its output is read in float"
    if writes is None or not writes.per_tensor:
        return "its output is quantized in another way"
    if opset < MAX_POOL_OPSET and any(node.op_type == "MaxPool" for node in behind):
        return f"integer MaxPool needs opset {MAX_POOL_OPSET}, model has {opset}"
    if not all(_saturates(writes, node) for node in behind if node.op_type in CLIPS):
        return "its quantizer does not stand for the activation"
    return tuple(behind), writes


def _passes_on(node: ir.Node, value: ir.Value) -> bool:
    """Whether the node reads ``value`` as its data, and makes nothing but data of it."""
    return node.inputs[0] is value and len(node.outputs) == 1


def _saturates(writes: Numbers, clip: ir.Node) -> bool:
    """Whether the quantizer's own limits lie within those of a Relu or Clip."""
    limits = np.iinfo(writes.zero.dtype)
    low, high = ((int(q) - int(writes.zero.item())) * writes.scale.item() for q in (limits.min, limits.max))
    bounds = (0.0, np.inf) if clip.op_type == "Relu" else _bounds(clip)
    slack = TOLERANCE * (high - low)
    return bounds is not None and bounds[0] <= low + slack and high - slack <= bounds[1]


def _bounds(clip: ir.Node) -> tuple[float, float] | None:
    """The limits of a Clip, if they are constant inputs."""
    given = [*clip.inputs[1:], None, None][:2]
    low, high = (scalar(value) for value in given)
    if clip.attributes or any(value is not None and scalar(value) is None for value in given):
        return None
    return -np.inf if low is None else low, np.inf if high is None else high


def _granularity(island: Island, form: Form) -> str | None:
    """Why the scales of the inputs are not what the form takes."""
    left, right = island.reads
    if not left.per_tensor:
        return "its input has a scale for each channel"
    if right.per_tensor:
        return None
    shape = right.integers.shape
    if form.weight_axis is None or shape is None:
        return "an input has a scale for each channel"
    axis = right.node.attributes.get_int("axis", 1) % len(shape)
    if axis != form.weight_axis(island.node) or (island.node.op_type == "MatMul" and len(shape) != 2):
        return "the scales of its weight are not those of output channels"
    return None if np.all(right.zero == right.zero.flat[0]) else "its weight has several zero points"


def _overflow(island: Island) -> str | None:
    steps = island.bias_steps
    return "its bias does not fit 32 bits" if steps is not None and np.abs(steps).max(initial=0.0) > MOST else None
