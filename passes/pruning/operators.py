"""The axes of all other operators: what works element by element, normalizes, reduces, pools or looks up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qexport.passes.match import array
from qexport.passes.pruning import products
from qexport.passes.pruning.labels import Axis, Blocked, Port, Spec
from qexport.passes.pruning.products import broadcast, given, shape_of

UNARY = (
    "Abs",
    "Acos",
    "Acosh",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "BitwiseNot",
    "Cast",
    "Ceil",
    "Celu",
    "Clip",
    "Cos",
    "Cosh",
    "Dropout",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Log",
    "Mish",
    "Neg",
    "Not",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
)
BINARY = (
    "Add",
    "And",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "Div",
    "Equal",
    "Expand",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Or",
    "PRelu",
    "Pow",
    "Sub",
    "Sum",
    "Where",
    "Xor",
)
REDUCTIONS = (
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
)
POOLS = ("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool")
Row = Callable[[ir.Node], Spec]


def _labels(rank: int) -> tuple[str, ...]:
    return tuple(f"a{axis}" for axis in range(rank))


def _axes(labels: tuple[str, ...]) -> tuple[Axis, ...]:
    return tuple((label,) for label in labels)


def _why(node: ir.Node) -> str:
    return f"{node.op_type} runs along its axis"


def elementwise(node: ir.Node) -> Spec:
    """All inputs are broadcast to the outputs; a second input of Expand is a shape."""
    target = shape_of(node.outputs[0])
    labels = _labels(len(target))
    inputs = node.inputs[:1] if node.op_type == "Expand" else node.inputs
    ports: dict[Port, tuple[Axis, ...]] = {
        ("in", i): broadcast(shape_of(value), labels, target) for i, value in enumerate(inputs) if value is not None
    }
    return Spec(ports | {("out", i): _axes(labels) for i in range(len(node.outputs))})


def _norm(node: ir.Node) -> Spec:
    """A norm over the last axes, from the one of its attribute on, with parameters that are broadcast."""
    target = shape_of(node.inputs[0])
    labels, first = _labels(len(target)), node.attributes.get_int("axis", -1) % len(target)
    ports: dict[Port, tuple[Axis, ...]] = {("in", 0): _axes(labels), ("out", 0): _axes(labels)}
    for i, value in enumerate(node.inputs[1:], 1):
        if value is not None:
            ports["in", i] = broadcast(shape_of(value), labels, target)
    for i in range(1, len(node.outputs)):
        ports["out", i] = (*_axes(labels[:first]), *((),) * (len(labels) - first))
    return Spec(ports, dict.fromkeys(labels[first:], _why(node)))


def _channels(node: ir.Node) -> Spec:
    """Parameters for each channel of an image, whose pixels may be normalized."""
    labels = ("batch", "c", *_labels(len(shape_of(node.inputs[0])) - 2))
    ports: dict[Port, tuple[Axis, ...]] = {("in", 0): _axes(labels), ("out", 0): _axes(labels)}
    ports |= {("in", i): (("c",),) for i, value in enumerate(node.inputs) if i and value is not None}
    return Spec(ports, dict.fromkeys(labels[2:], _why(node)) if node.op_type == "InstanceNormalization" else {})


def _pool(node: ir.Node) -> Spec:
    """The pixels are others behind it, the channels are not."""
    rank = len(shape_of(node.inputs[0])) - 2
    ends = {side: ("batch", "c", *(f"{side}{i}" for i in range(rank))) for side in "xy"}
    ports: dict[Port, tuple[Axis, ...]] = {("in", 0): _axes(ends["x"])}
    ports |= {("out", i): _axes(ends["y"]) for i in range(len(node.outputs))}
    return Spec(ports, dict.fromkeys((*ends["x"][2:], *ends["y"][2:]), _why(node)))


def _resize(node: ir.Node) -> Spec:
    image, result = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if given(node, 3) is not None or not isinstance(image[1], int) or image[1] != result[1]:
        raise Blocked("a Resize is told its channels, or changes them")
    return _pool(node)


def _along(default: int, *, all_behind: int = 0) -> Row:
    """What runs along one axis; before opset ``all_behind``, along all that follow, too."""

    def row(node: ir.Node) -> Spec:
        rank = len(shape_of(node.inputs[0]))
        labels, old = _labels(rank), _opset(node) < all_behind
        axis = node.attributes.get_int("axis", 1 if old else default) % rank
        closed = labels[axis:] if old else labels[axis : axis + 1]
        return Spec(
            {("in", 0): _axes(labels), ("out", 0): _axes(labels)},
            dict.fromkeys(closed, _why(node)),
        )

    return row


def _opset(node: ir.Node) -> int:
    return 0 if node.graph is None else node.graph.opset_imports.get("", 1)


def _cumsum(node: ir.Node) -> Spec:
    told, labels = array(node.inputs[1]), _labels(len(shape_of(node.inputs[0])))
    closed = labels if told is None else (labels[int(told.item())],)
    return Spec({("in", 0): _axes(labels), ("out", 0): _axes(labels)}, dict.fromkeys(closed, _why(node)))


def _last_two(node: ir.Node) -> Spec:
    labels = _labels(len(shape_of(node.inputs[0])))
    return Spec({("in", 0): _axes(labels), ("out", 0): _axes(labels)}, dict.fromkeys(labels[-2:], _why(node)))


def _reduce(node: ir.Node) -> Spec:
    """The axes that are reduced are gone, or have one element left."""
    labels = _labels(len(shape_of(node.inputs[0])))
    gone = {labels[axis] for axis in _reduced(node, len(labels))}
    left: list[Axis] = [() if label in gone else (label,) for label in labels]
    if not node.attributes.get_int("keepdims", 1):
        left = [axis for axis in left if axis]
    return Spec({("in", 0): _axes(labels), ("out", 0): tuple(left)}, dict.fromkeys(gone, _why(node)))


def _reduced(node: ir.Node, rank: int) -> list[int]:
    if node.op_type.startswith("Arg"):
        return [node.attributes.get_int("axis", 0) % rank]
    told = node.attributes.get_ints("axes", None)
    if given(node, 1) is not None:
        numbers = array(node.inputs[1])
        if numbers is None:
            raise Blocked(f"the axes of {node.op_type} are computed")
        told = [int(axis) for axis in np.asarray(numbers).reshape(-1)]
    if told:
        return [axis % rank for axis in told]
    return [] if node.attributes.get_int("noop_with_empty_axes", 0) else list(range(rank))


def _gather(node: ir.Node) -> Spec:
    """Rows of a table are looked up; the other axes of the table are those of the result."""
    table, rows = (shape_of(value) for value in node.inputs[:2])
    axis = node.attributes.get_int("axis", 0) % len(table)
    labels, places = _labels(len(table)), tuple(f"i{i}" for i in range(len(rows)))
    ports = {
        ("in", 0): _axes(labels),
        ("in", 1): _axes(places),
        ("out", 0): _axes((*labels[:axis], *places, *labels[axis + 1 :])),
    }
    return Spec(ports, dict.fromkeys((labels[axis], *places), _why(node)))


def _rotary(node: ir.Node) -> Spec:
    """Rotary positions, of four axes or of three with the heads side by side; pairs lie within a head."""
    shape, heads = shape_of(node.inputs[0]), node.attributes.get_int("num_heads", 0)
    own: tuple[Axis, ...] = (("batch",), ("h",), ("s",), ("d",))
    sizes: dict[str, int] = {}
    if len(shape) == 3:
        width = shape[2]
        if not isinstance(width, int) or heads <= 0 or width % heads:
            raise Blocked(products.HEADS)
        sizes, own = {"h": heads, "d": width // heads}, (("batch",), ("s",), ("h", "d"))
    closed = {"d": products.WHOLE, "s": products.POSITIONS}
    return Spec({("in", 0): own, ("out", 0): own}, closed, sizes, {"num_heads": ("h",)} if heads else {})


ROWS: dict[tuple[str, str], Row] = {
    **{("", op): elementwise for op in (*UNARY, *BINARY)},
    **{("", op): _reduce for op in (*REDUCTIONS, "ArgMax", "ArgMin")},
    **{("", op): _pool for op in POOLS},
    **{("", op): _channels for op in ("BatchNormalization", "InstanceNormalization")},
    **{("", op): _norm for op in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")},
    **{("", op): _along(-1, all_behind=13) for op in ("Softmax", "LogSoftmax", "Hardmax")},
    ("", "LpNormalization"): _along(-1),
    ("", "CumSum"): _cumsum,
    ("", "Trilu"): _last_two,
    ("", "Resize"): _resize,
    ("", "Gather"): _gather,
    ("", "RotaryEmbedding"): _rotary,
    ("", "MatMul"): products.matmul,
    ("", "Gemm"): products.gemm,
    ("", "Einsum"): products.einsum,
    ("", "Conv"): products.conv,
    ("", "ConvTranspose"): products.conv,
    ("", "Attention"): products.attention,
    ("", "TensorScatter"): products.scatter,
    **{("com.microsoft", op): elementwise for op in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")},
    ("com.microsoft", "RotaryEmbedding"): _rotary,
    ("com.microsoft", "MultiHeadAttention"): products.multi_head,
    ("com.microsoft", "GroupQueryAttention"): products.group_query,
    ("com.microsoft", "Attention"): products.packed_attention,
}
"""By domain and operator; what is not here stops a cut."""


def spec_of(node: ir.Node) -> Spec:
    """The axes of a node.

    Raises:
        Blocked: The operator is not known, or its axes are not.
    """
    row = ROWS.get((node.domain, node.op_type))
    if row is None:
        raise Blocked(f"{node.op_type} takes part, which no cut goes through")
    return row(node)
