"""What shape an operator writes, as far as constants and declared shapes tell; only small ones are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeAlias

import onnx
from numpy.typing import NDArray

Shape: TypeAlias = tuple[int | None, ...]  # None: an axis of unknown size

SMALL = 64  # elements of constants whose values are looked at


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a value.

    Attributes:
        shape: Its shape; ``None`` where not even the rank is known.
        bits: Bits of an element at least.
        read: Returns its elements, for small constants.
    """

    shape: Shape | None = None
    bits: int = 1
    read: Callable[[], NDArray[Any]] | None = None

    @property
    def array(self) -> NDArray[Any] | None:
        """Its elements, for small constants."""
        return None if self.read is None else self.read()

    @property
    def nbytes(self) -> int:
        """Bytes at least: axes of unknown size count as 1."""
        sizes = (1 if size is None else max(size, 0) for size in self.shape or ())
        return 0 if self.shape is None else math.prod(sizes) * self.bits // 8


UNKNOWN = Known()


@dataclass(frozen=True, slots=True)
class Call:
    """A node with what is known of its inputs; omitted ones are ``UNKNOWN``."""

    node: onnx.NodeProto
    inputs: tuple[Known, ...]

    def attribute(self, name: str, default: Any = None) -> Any:
        """The value of an attribute."""
        found = next((entry for entry in self.node.attribute if entry.name == name), None)
        return default if found is None else onnx.helper.get_attribute_value(found)

    def shape(self, index: int) -> Shape:
        """Shape of an input; ``LookupError`` where its rank is not known."""
        shape = self.inputs[index].shape
        if shape is None:
            raise LookupError
        return shape

    def numbers(self, index: int) -> list[Any]:
        """Elements of an input; ``LookupError`` where they are not known."""
        array = self.inputs[index].array if index < len(self.inputs) else None
        if array is None:
            raise LookupError
        return list(array.reshape(-1).tolist())


Rule: TypeAlias = Callable[[Call], Shape]


_ONE: tuple[Shape, ...] = ((), (1,))


def broadcast(*shapes: Shape | None) -> Shape:
    """Numpy's rule; where a rank is not known, what the others ask for at least."""
    first = shapes[0]
    if first and all(shape == first or shape in _ONE for shape in shapes):
        return first
    columns = zip_longest(*(reversed(shape) for shape in shapes if shape is not None), fillvalue=1)
    return tuple(_widest(sizes) for sizes in columns)[::-1]


def _widest(sizes: tuple[int | None, ...]) -> int | None:
    known = [size for size in sizes if size is not None]
    if 0 in known:
        return 0
    largest = max(known, default=1)
    return largest if largest > 1 or len(known) == len(sizes) else None


def _filled(call: Call) -> Shape:
    return tuple(int(size) for size in call.numbers(0))


def _expanded(call: Call) -> Shape:
    return broadcast(call.inputs[0].shape, tuple(int(size) for size in call.numbers(1)))


def _tiled(call: Call) -> Shape:
    pairs = zip(call.shape(0), call.numbers(1), strict=True)
    return tuple(None if size is None else size * int(count) for size, count in pairs)


def _counted(call: Call) -> Shape:
    start, limit, delta = (call.numbers(index)[0] for index in range(3))
    return (max(0, math.ceil((limit - start) / delta)),)


def _one_hot(call: Call) -> Shape:
    shape, axis = list(call.shape(0)), call.attribute("axis", -1)
    shape.insert(axis if axis >= 0 else axis + len(shape) + 1, int(call.numbers(1)[0]))
    return tuple(shape)


def _padded(call: Call) -> Shape:
    shape = call.shape(0)
    pads = [int(pad) for pad in (call.attribute("pads") or call.numbers(1))]
    axes = call.numbers(3) if len(call.inputs) > 3 and call.node.input[3] else list(range(len(shape)))
    added = dict.fromkeys(range(len(shape)), 0)
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        added[int(axis) % len(shape)] += before + after
    return tuple(None if size is None else max(0, size + added[axis]) for axis, size in enumerate(shape))


def _resized(call: Call) -> Shape:
    shape = call.shape(0)
    axes = call.attribute("axes") or list(range(len(shape)))
    place = 1 if call.node.op_type == "Upsample" or len(call.node.input) == 2 else 2
    found = list(shape)
    if len(call.inputs) > 3 and call.inputs[3].read is not None:
        sizes = call.numbers(3)
    else:
        scales = call.attribute("scales") or call.numbers(place)
        sizes = [_scaled(shape[axis], scale) for axis, scale in zip(axes, scales, strict=True)]
    for axis, size in zip(axes, sizes, strict=True):
        found[axis] = None if size is None else int(size)
    return tuple(found)


def _scaled(size: int | None, scale: float) -> int | None:
    return None if size is None else math.floor(size * scale)


def _reshaped(call: Call) -> Shape:
    shape = call.inputs[0].shape
    wanted = [int(size) for size in (call.attribute("shape") or call.numbers(1))]
    if not call.attribute("allowzero", 0):
        copied = shape or ()
        wanted = [size or (copied[axis] if axis < len(copied) else -1) or -1 for axis, size in enumerate(wanted)]
    if wanted.count(-1) == 1 and shape is not None and None not in shape:
        rest = math.prod(size for size in wanted if size != -1)
        wanted[wanted.index(-1)] = math.prod(size or 0 for size in shape) // rest
    return tuple(None if size < 0 else size for size in wanted)


def _product(call: Call) -> Shape:
    left, right = call.shape(0), call.shape(1)
    if len(right) == 1:
        return left[:-1]
    if len(left) == 1:
        return (*right[:-2], right[-1])
    return (*broadcast(left[:-2], right[:-2]), left[-2], right[-1])


def _affine(call: Call) -> Shape:
    left, right = call.shape(0), call.shape(1)
    return left[1 if call.attribute("transA", 0) else 0], right[0 if call.attribute("transB", 0) else 1]


def _gathered(call: Call) -> Shape:
    data, axis = call.shape(0), call.attribute("axis", 0)
    axis %= len(data)
    return (*data[:axis], *call.shape(1), *data[axis + 1 :])


def _joined(call: Call) -> Shape:
    shapes = [call.shape(index) for index in range(len(call.inputs))]
    axis = call.attribute("axis", 1) % len(shapes[0])
    sizes = [shape[axis] for shape in shapes]
    return (*shapes[0][:axis], sum(size or 0 for size in sizes), *shapes[0][axis + 1 :])


def _permuted(call: Call) -> Shape:
    shape = call.shape(0)
    return tuple(shape[axis] for axis in call.attribute("perm", range(len(shape))[::-1]))


def _axes(call: Call) -> list[int]:
    return [int(axis) for axis in (call.attribute("axes") or call.numbers(1))]


def _unsqueezed(call: Call) -> Shape:
    shape, axes = list(call.shape(0)), _axes(call)
    rank = len(shape) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        shape.insert(axis, 1)
    return tuple(shape)


def _squeezed(call: Call) -> Shape:
    shape = call.shape(0)
    if len(call.node.input) == 1 and call.attribute("axes") is None:
        return tuple(size for size in shape if size != 1)
    gone = {axis % len(shape) for axis in _axes(call)}
    return tuple(size for axis, size in enumerate(shape) if axis not in gone)


def _flat(call: Call) -> Shape:
    shape, axis = call.shape(0), call.attribute("axis", 1)
    parts = (shape[:axis], shape[axis:])
    return tuple(None if None in part else math.prod(size or 0 for size in part) for part in parts)


def _windowed(call: Call) -> Shape:
    """Convolutions and pools: the padding is what can be huge."""
    shape, rank = call.shape(0), len(call.shape(0)) - 2
    kernel = call.attribute("kernel_shape") or call.shape(1)[2:]
    pads = call.attribute("pads") or [0] * (2 * rank)
    strides, dilations = (call.attribute(name) or [1] * rank for name in ("strides", "dilations"))
    found: list[int | None] = [shape[0], call.shape(1)[0] if call.node.op_type == "Conv" else shape[1]]
    for axis in range(rank):
        size, width = shape[2 + axis], kernel[axis]
        if size is None or width is None:
            found.append(None)
            continue
        room = size + pads[axis] + pads[rank + axis] - dilations[axis] * (width - 1) - 1
        found.append(max(0, room // strides[axis] + 1))
    return tuple(found)


_SAME = (
    *("Identity", "Cast", "CastLike", "Relu", "Sigmoid", "Tanh", "Neg", "Abs", "Exp", "Log", "Sqrt", "Erf", "Gelu"),
    *("Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization", "BatchNormalization", "Dropout", "Clip"),
    *("Not", "Floor", "Ceil", "Round", "Reciprocal", "LeakyRelu", "Elu", "HardSigmoid", "HardSwish", "Sign", "Sin"),
    *("Cos", "IsNaN", "IsInf", "EyeLike", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Trilu", "CumSum"),
    *("QuantizeLinear", "DequantizeLinear", "InstanceNormalization", "ScatterND", "ScatterElements", "TensorScatter"),
)
_BROADCAST = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "PRelu", "Min", "Max", "Sum", "Mean", "Where", "And", "Or", "Xor"),
    *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "BitShift", "BitwiseAnd", "BitwiseOr"),
)

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_SAME, lambda call: call.shape(0)),
    **dict.fromkeys(_BROADCAST, lambda call: broadcast(*(known.shape for known in call.inputs))),
    **dict.fromkeys(("HannWindow", "HammingWindow", "BlackmanWindow", "ConstantOfShape"), _filled),
    **dict.fromkeys(("RandomNormal", "RandomUniform"), lambda call: tuple(call.attribute("shape"))),
    **dict.fromkeys(("Resize", "Upsample"), _resized),
    **dict.fromkeys(("Conv", "MaxPool", "AveragePool", "LpPool"), _windowed),
    "Expand": _expanded,
    "Tile": _tiled,
    "Range": _counted,
    "OneHot": _one_hot,
    "Pad": _padded,
    "Reshape": _reshaped,
    "MatMul": _product,
    "Gemm": _affine,
    "Gather": _gathered,
    "Concat": _joined,
    "Transpose": _permuted,
    "Unsqueeze": _unsqueezed,
    "Squeeze": _squeezed,
    "Flatten": _flat,
}
"""Operator to the shape of its first output; the others are not known."""
