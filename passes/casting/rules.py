"""What 16 bits cannot hold: the two formats, and which nodes of a graph must stay in float32 for their range."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from qexport.passes.match import constant
from qexport.passes.numbers.extreme import extreme_of


@dataclass(frozen=True, slots=True)
class Format:
    """A float of 16 bits.

    Attributes:
        name: What a recipe calls it.
        dtype: Its element type.
        largest: Its largest finite number.
        smallest: Its smallest normal number; what is smaller loses digits, or is zero.
        whole: Up to here it holds every whole number.
    """

    name: str
    dtype: ir.DataType
    largest: float
    smallest: float
    whole: int


FORMATS = {
    "float16": Format("float16", ir.DataType.FLOAT16, 65504.0, 2.0**-14, 2**11),
    "bfloat16": Format("bfloat16", ir.DataType.BFLOAT16, (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2**8),
}

FEW = 16  # elements of a constant that is looked at for being small; a bias may be small without guarding anything
TYPE_ATTRIBUTES = {"Cast": "to", "DequantizeLinear": "output_dtype"}
FILL = {"ConstantOfShape": "value"}
MOVES = frozenset(["Expand", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"])
_CARRY_SMALL = MOVES | frozenset(["Abs", "Cast", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Sqrt"])
"""What is still near zero behind these operators if all that they read is."""
_CARRY_LARGE = MOVES | frozenset(
    [
        *("Abs", "Add", "Cast", "Concat", "ConstantOfShape", "Gather", "Max", "Min", "Mul", "Neg", "Pad", "ReduceMax"),
        *("ReduceMin", "Relu", "ScatterElements", "ScatterND", "Sub", "Trilu", "Where"),
    ]
)
"""What is still large behind these operators."""
_SATURATE = {"Clip": (1, 2), "Max": range(2**31), "Min": range(2**31)}
"""Inputs that bound what a node makes, and that may as well be the largest number there is."""
_SQUARES = ("LpNormalization", "GlobalLpPool", "LpPool", "ReduceL2", "ReduceSumSquare", "MeanVarianceNormalization")
_STASHES = ("LayerNormalization", "RMSNormalization", "GroupNormalization")
_FLOAT32 = int(ir.DataType.FLOAT)


def values_of(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads and makes, without what is left out."""
    yield from (value for value in node.inputs if value is not None)
    yield from (value for value in node.outputs if value.name)


def is_float(value: ir.Value | None) -> bool:
    """Whether ``value`` is a tensor of float32."""
    return value is not None and isinstance(value.type, ir.TensorType) and value.dtype == ir.DataType.FLOAT


def no_form(node: ir.Node, opset: int, form: Format) -> str | None:
    """Why ``form`` cannot stand wherever this node has float32, if the operator's definition does not let it."""
    missing, wanted = f"the operator has no {form.name} form", f"tensor({form.name})"
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return missing
    read, made = list(_formals(node.inputs, schema.inputs)), list(_formals(node.outputs, schema.outputs))
    if not all(wanted in formal.types for formal in read + made):
        return missing
    follows = {formal.type_str for formal in schema.inputs} | {wanted}
    known = node.op_type in TYPE_ATTRIBUTES or node.op_type in FILL
    return None if known or all(formal.type_str in follows for formal in made) else "its output type is fixed"


def _formals(
    values: Iterable[ir.Value | None], formals: Sequence[onnx.defs.OpSchema.FormalParameter]
) -> Iterator[onnx.defs.OpSchema.FormalParameter]:
    """The definition's parameter of every float32 value."""
    for index, value in enumerate(values):
        if is_float(value):
            yield formals[min(index, len(formals) - 1)]


def beyond(graph: ir.Graph, form: Format) -> Mapping[ir.Node, str]:
    """Which nodes read a finite constant that ``form`` does not hold, or what such a constant was put into.

    A bound that is never reached in ``form`` does not count. Reasons by node.
    """
    large, found = set[ir.Value](), dict[ir.Node, str]()
    for node in graph:
        bounds = _SATURATE.get(node.op_type, ())
        direct = _is_large(filling(node), form) or any(
            index not in bounds and _is_large(constant(value), form) for index, value in enumerate(node.inputs)
        )
        if direct or any(value in large for value in node.inputs):
            found[node] = f"a constant is beyond {form.name}" if direct else f"it may read what is beyond {form.name}"
            large.update(node.outputs if node.op_type in _CARRY_LARGE else ())
    return found


def _is_large(tensor: ir.TensorProtocol | None, form: Format) -> bool:
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return False
    sizes = np.abs(tensor.numpy())
    return bool(((sizes > form.largest) & (sizes < np.inf)).any())


def near_zero(graph: ir.Graph, form: Format) -> set[ir.Node]:
    """The nodes that read a constant below the normal numbers of ``form``, or what such a constant guards from zero.

    A guard is good for nothing if the next node rounds it to zero, so its readers count as well, and theirs as long as
    nothing but guarded values is read.
    """
    small, guarded, near = set[ir.Value](), set[ir.Value](), set[ir.Node]()
    for node in graph:
        floats = [value for value in node.inputs if is_float(value)]
        tiny = [value for value in floats if value in small or _is_small(constant(value), form)]
        behind = [value for value in floats if value in guarded]
        carries = node.op_type in _CARRY_SMALL and all(
            v in guarded or v in tiny or constant(v) is not None for v in floats
        )
        if _is_small(filling(node), form) or (tiny and carries and len(tiny) == len(floats)):
            small.update(node.outputs)
        elif tiny or (behind and carries):
            guarded.update(node.outputs)
        elif not behind:
            continue
        near.add(node)
    return near


def _is_small(tensor: ir.TensorProtocol | None, form: Format) -> bool:
    """Whether the few numbers of a float32 constant are below the normal ones of ``form``, and not just zero."""
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size > FEW:
        return False
    return bool(0 < np.abs(tensor.numpy()).max(initial=0.0) < form.smallest)


def filling(node: ir.Node) -> ir.TensorProtocol | None:
    """What a node fills its output with, where an attribute says so."""
    name = FILL.get(node.op_type)
    return node.attributes.get_tensor(name, None) if name is not None else None


def overflow(node: ir.Node, form: Format, headroom: float) -> str | None:
    """Which observed number of ``node``, times ``headroom``, is beyond ``form``; ``None`` where none is known to be.

    Looks at what the node makes, what it reads and what it has in between. Products and convolutions add up in float32
    on every target, so that their results are all that counts.
    """
    for place, values in (("output", node.outputs), ("input", node.inputs)):
        for value in values:
            peak = extreme_of(value)
            if is_float(value) and peak is not None and peak * headroom > form.largest:
                return f"observed {peak:.1e} at its {place}, {form.name} ends at {_end(form)}"
    inner = _inner(node)
    if inner is not None and inner * headroom > form.largest:
        return f"observed {inner:.1e} inside it, {form.name} ends at {_end(form)}"
    return None


def _end(form: Format) -> str:
    return f"{form.largest:.0f}" if form.largest < 1e6 else f"{form.largest:.1e}"


def _inner(node: ir.Node) -> float | None:
    """What was observed at the first input, as the node uses it: squared by norms that do not compute in float32."""
    peak = extreme_of(node.inputs[0]) if node.inputs else None
    if peak is None:
        return None
    if node.op_type in _SQUARES:
        return peak * peak
    if node.op_type in _STASHES and node.attributes.get_int("stash_type", _FLOAT32) != _FLOAT32:
        return peak * peak
    return float(np.exp(min(peak, 700.0))) if node.op_type == "Softplus" else None
