"""Where the nodes of gradients are written: their names and types, constants, and sums over broadcast axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from qexport.errors import UsageError
from qexport.passes.match import Dims, Names, dims, same_dims

Value: TypeAlias = ir.Value
Rule: TypeAlias = Callable[["Tape", ir.Node, ir.Value], Sequence[ir.Value | None]]
"""Tape, node and gradient of its output -> gradients of its inputs, ``None`` where there is none to be had."""

FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
INSTEAD = "place the step before the one that writes it, or choose what needs no gradients"
_INTEGERS = ("Shape", "Size", "NonZero")
_TRUTHS = ("Equal", "Greater", "GreaterOrEqual", "Less", "Not", "And", "IsNaN")


def refuse(node: ir.Node, reason: str, hint: str = INSTEAD) -> UsageError:
    """The error of a node that gradients cannot pass, to be raised."""
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return UsageError(f"no gradient through {name}: {reason}", where=f"node {node.name!r}", hint=hint)


class Tape:
    """Nodes that are appended to a graph.

    Args:
        graph: It is edited.
        opset: The one that its nodes are read by.
    """

    def __init__(self, graph: ir.Graph, opset: int) -> None:
        self.opset = opset
        self._graph = graph
        self._names = Names(graph)
        self._known: dict[tuple[str, bytes, tuple[int, ...]], Value] = {}
        self._shapes: dict[Value, Value] = {}

    def op(self, op_type: str, *inputs: Value | None, attributes: Mapping[str, Any] | None = None) -> Value:
        """Append a node of one output and return that."""
        return self.ops(op_type, inputs, attributes or {}, 1)[0]

    def ops(
        self, op_type: str, inputs: Sequence[Value | None], attributes: Mapping[str, Any], count: int
    ) -> Sequence[Value]:
        """Append a node of ``count`` outputs and return them."""
        node = ir.node(op_type, list(inputs), dict(attributes), num_outputs=count)
        node.name = self._names.fresh(f"qexport.backward/{op_type}")
        dtype = _dtype(op_type, inputs, attributes)
        for index, value in enumerate(node.outputs):
            value.name = self._names.fresh(f"{node.name}/{index}")
            if dtype is not None and (index == 0 or op_type == "Split"):
                value.type = ir.TensorType(dtype)
        self._graph.append(node)
        return node.outputs

    def constant(self, numbers: np.typing.ArrayLike, dtype: ir.DataType = ir.DataType.INT64) -> Value:
        """An initializer; equal ones are one."""
        array = np.asarray(numbers, dtype.numpy())
        key = (dtype.name, array.tobytes(), array.shape)
        if key not in self._known:
            name = self._names.fresh("qexport.backward/constant")
            value = ir.val(name, dtype, array.shape, const_value=ir.tensor(array, dtype, name=name))
            self._graph.register_initializer(value)
            self._known[key] = value
        return self._known[key]

    def number(self, number: float, like: Value) -> Value:
        """A scalar of the type of ``like``."""
        if like.dtype is None:
            what = f"the type of value {like.name!r} is not known"
            raise UsageError(what, hint="run cleanup first, which infers types and shapes")
        return self.constant(number, like.dtype)

    def add(self, a: Value, b: Value | float) -> Value:
        """``a + b``."""
        return self.op("Add", a, b if isinstance(b, Value) else self.number(b, a))

    def sub(self, a: Value, b: Value) -> Value:
        """``a - b``."""
        return self.op("Sub", a, b)

    def mul(self, a: Value, b: Value | float) -> Value:
        """``a * b``."""
        return self.op("Mul", a, b if isinstance(b, Value) else self.number(b, a))

    def div(self, a: Value, b: Value) -> Value:
        """``a / b``."""
        return self.op("Div", a, b)

    def neg(self, a: Value) -> Value:
        """``-a``."""
        return self.op("Neg", a)

    def where(self, truth: Value, a: Value, b: Value | float = 0.0) -> Value:
        """``a`` where ``truth``, elsewhere ``b``."""
        return self.op("Where", truth, a, b if isinstance(b, Value) else self.number(b, a))

    def compare(self, op_type: str, a: Value, b: Value | float = 0.0) -> Value:
        """Where ``a`` is equal to, greater or less than ``b``."""
        return self.op(op_type, a, b if isinstance(b, Value) else self.number(b, a))

    def cast(self, a: Value, like: Value) -> Value:
        """``a`` in the type of ``like``."""
        return a if a.dtype == like.dtype else self.op("Cast", a, attributes={"to": _known_dtype(like)})

    def shape(self, x: Value) -> Value:
        """The sizes of ``x``, which may be known only when the model runs."""
        if x not in self._shapes:
            self._shapes[x] = self.op("Shape", x)
        return self._shapes[x]

    def sizes(self, x: Value, start: int, stop: int) -> Value:
        """Some of the sizes of ``x``."""
        return self.op("Slice", self.shape(x), self.constant([start]), self.constant([stop]))

    def zeros(self, shape: Value, like: Value, number: float = 0.0) -> Value:
        """The same number everywhere, of the sizes in ``shape``."""
        dtype = _known_dtype(like)
        told = ir.tensor(np.full(1, number, dtype.numpy()), dtype)
        return self.op("ConstantOfShape", shape, attributes={"value": told})

    def reshape(self, a: Value, shape: Value | Sequence[int]) -> Value:
        """``a`` in other sizes."""
        return self.op("Reshape", a, shape if isinstance(shape, Value) else self.constant(list(shape)))

    def transpose(self, a: Value, perm: Sequence[int]) -> Value:
        """``a`` with its axes in another order."""
        return self.op("Transpose", a, attributes={"perm": list(perm)})

    def expand(self, a: Value, x: Value) -> Value:
        """``a`` repeated to the shape of ``x``."""
        return self.op("Expand", a, self.shape(x))

    def sum(self, a: Value, axes: Value | Sequence[int] | None, *, keep: bool = True) -> Value:
        """The sum over some axes, or all."""
        told = axes if isinstance(axes, Value) or axes is None else self.constant(list(axes))
        return self.op("ReduceSum", a, told, attributes={"keepdims": int(keep)})

    def mean(self, a: Value, axes: Sequence[int]) -> Value:
        """The mean over some axes, which stay with size 1."""
        if self.opset < 18:
            return self.op("ReduceMean", a, attributes={"axes": list(axes), "keepdims": 1})
        return self.op("ReduceMean", a, self.constant(list(axes)), attributes={"keepdims": 1})

    def sum_to(self, a: Value, shape: Dims | None, x: Value) -> Value:
        """Undo broadcasting: the sum of ``a``, which has ``shape``, over the axes along which ``x`` was repeated."""
        target = dims(x)
        if shape is not None and target is not None:
            if same_dims(shape, target):
                return a
            ahead = len(shape) - len(target)
            pairs = list(zip(shape[ahead:], target, strict=True))
            if all(isinstance(b, int) or (b is not None and a == b) for a, b in pairs):
                ones = [ahead + i for i, (size, own) in enumerate(pairs) if own == 1 and size != 1]
                summed = self.sum(a, ones) if ones else a
                return self.sum(summed, range(ahead), keep=False) if ahead else summed
        sizes, own = self.shape(a), self.shape(x)
        one = ir.tensor(np.ones(1, np.int64))
        missing = self.sub(self.op("Shape", sizes), self.op("Shape", own))
        ones_ahead = self.op("ConstantOfShape", missing, attributes={"value": one})
        padded = self.op("Concat", ones_ahead, own, attributes={"axis": 0})
        axes = self.reshape(self.op("NonZero", self.op("Not", self.op("Equal", padded, sizes))), [-1])
        summed = self.op("ReduceSum", a, axes, attributes={"keepdims": 1, "noop_with_empty_axes": 1})
        return self.reshape(summed, own)


def _dtype(op_type: str, inputs: Sequence[Value | None], attributes: Mapping[str, Any]) -> ir.DataType | None:
    """The type of the first output."""
    if op_type in _INTEGERS:
        return ir.DataType.INT64
    if op_type in _TRUTHS:
        return ir.DataType.BOOL
    if op_type == "Cast":
        return ir.DataType(attributes["to"])
    if op_type == "ConstantOfShape":
        return ir.DataType(attributes["value"].dtype)
    source = inputs[1 if op_type == "Where" else 0]
    return None if source is None else source.dtype


def _known_dtype(value: Value) -> ir.DataType:
    if value.dtype is None:
        what = f"the type of value {value.name!r} is not known"
        raise UsageError(what, hint="run cleanup first, which infers types and shapes")
    return value.dtype


def rank_of(node: ir.Node, value: Value | None) -> int:
    """The number of axes; a refusal of ``node`` where it is not known."""
    shape = dims(value)
    if shape is None:
        raise refuse(node, "the rank of what it reads is not known", "run cleanup first, which infers shapes")
    return len(shape)


def operand(node: ir.Node, index: int) -> Value:
    """An input that has to be there."""
    value = optional(node, index)
    assert value is not None
    return value


def optional(node: ir.Node, index: int) -> Value | None:
    """An input that may be left out."""
    return node.inputs[index] if index < len(node.inputs) else None
