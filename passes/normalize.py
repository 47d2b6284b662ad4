"""The part that LayerNorm and RMSNorm have in common: x / sqrt(mean(x^2) + epsilon), in every spelling."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from qexport.passes.match import array, closed, constant, consumer, dims, is_scalar, maker, operands, producer, scalar

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Norm:
    """A normalization found in a graph.

    Attributes:
        x: What is normalized.
        output: The last value of the pattern.
        epsilon: Added to the mean square.
        axis: First of the trailing axes that are normalized, counted from the end.
        dtype: Type that it is computed in; unknown where epsilon is not typed.
        nodes: The nodes of the pattern.
    """

    x: ir.Value
    output: ir.Value
    epsilon: float
    axis: int
    dtype: ir.DataType
    nodes: frozenset[ir.Node]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the normalized axes; empty where they are not all known."""
        sizes = tuple(size for size in (dims(self.x) or ())[self.axis :] if isinstance(size, int))
        return sizes if len(sizes) == -self.axis else ()

    def grow(self, node: ir.Node) -> Norm:
        """Return the pattern with one more node at its end."""
        return replace(self, output=node.outputs[0], nodes=self.nodes | {node})


def find_norm(last: ir.Node) -> Norm | None:
    """Match ``x / sqrt(mean(x * x) + epsilon)`` whose last node is ``last`` (Div, or Mul by the inverse)."""
    for x, other in operands(last):
        found = _root(other) if last.op_type == "Div" else _inverse(other)
        if found is None:
            continue
        shifted, nodes = found
        for mean, epsilon in operands(producer(shifted, "Add")):
            number, tensor = scalar(epsilon), constant(epsilon)
            reduced = mean_of(mean)
            square = producer(reduced[0], "Pow", "Mul") if reduced else None
            if number is None or tensor is None or reduced is None or square is None or not _is_square(square, x):
                continue
            region = frozenset({last, *nodes, maker(shifted), maker(mean), square})
            return Norm(x, last.outputs[0], number, reduced[1], tensor.dtype, region)
    return None


def mean_of(value: ir.Value) -> tuple[ir.Value, int] | None:
    """Return what ``value`` is the mean of and the first of the trailing axes, where it keeps its rank."""
    node = producer(value, "ReduceMean")
    if node is None or node.inputs[0] is None or not node.attributes.get_int("keepdims", 1):
        return None
    given = array(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get_ints("axes", ())
    axes = [] if given is None else [int(axis) for axis in given]
    rank = len(node.inputs[0].shape) if node.inputs[0].shape is not None else 0
    axes = sorted(axis - rank if axis >= 0 else axis for axis in axes)
    trailing = bool(axes) and axes == list(range(-len(axes), 0))
    return (node.inputs[0], axes[0]) if trailing else None


def take_casts(norm: Norm) -> Norm:
    """Take in a Cast from half precision before and a Cast back after, which the fused operators do inside."""
    before, after = producer(norm.x, "Cast"), consumer(norm.output, "Cast")
    if before is None or after is None or before.inputs[0] is None or norm.dtype != ir.DataType.FLOAT:
        return norm
    grown = replace(norm.grow(after), x=before.inputs[0], nodes=norm.nodes | {before, after})
    half = before.inputs[0].dtype
    back = after.attributes.get_int("to", 0)
    return grown if half in HALF and back == half and closed(grown.nodes, grown.output) else norm


def take_affine(norm: Norm, op: str) -> tuple[Norm, ir.Value | None]:
    """Take in a Mul or Add with a tensor that has exactly the normalized axes, when nothing else reads the output."""
    node = consumer(norm.output, op)
    for own, other in operands(node):
        # Of a known width: a wider factor would broadcast the output, a narrower one is refused by runtimes.
        if node is not None and own is norm.output and other is not own and norm.sizes and dims(other) == norm.sizes:
            return norm.grow(node), other
    return norm, None


def _root(value: ir.Value | None) -> tuple[ir.Value, list[ir.Node]] | None:
    """Match a square root; return what is under it."""
    node = producer(value, "Sqrt", "Pow")
    if node is None or node.inputs[0] is None or (node.op_type == "Pow" and not is_scalar(node.inputs[1], 0.5)):
        return None
    return node.inputs[0], [node]


def _inverse(value: ir.Value) -> tuple[ir.Value, list[ir.Node]] | None:
    """Match one over a square root; return what is under it."""
    node = producer(value, "Reciprocal", "Div", "Pow")
    if node is None or node.inputs[0] is None:
        return None
    if node.op_type == "Pow":
        return (node.inputs[0], [node]) if is_scalar(node.inputs[1], -0.5) else None
    if node.op_type == "Div" and not is_scalar(node.inputs[0], 1.0):
        return None
    found = _root(node.inputs[-1])
    return found and (found[0], [node, *found[1]])


def _is_square(node: ir.Node, x: ir.Value) -> bool:
    if node.inputs[0] is not x:
        return False
    return is_scalar(node.inputs[1], 2.0) if node.op_type == "Pow" else node.inputs[1] is x
