"""Cast the graph to float16; inputs and outputs of the model keep their types.

1. Initializers and constants read by converted nodes become float16; a copy is made where a float32 reader remains.
2. Values between converted nodes become float16, Q/DQ scales included (``quantize`` picks scales that float16 holds).
3. Casts stand where a converted node meets a float32 one: model inputs and outputs, kept nodes.

Kept in float32: sums over many elements, nodes with a weight beyond the float16 range, and operators that the opset
does not define for float16 or whose output type does not follow their inputs. So are constants below the normal
float16 numbers, such as the 1e-12 that guards a division, together with all that reads what they guard. Masks such as
-1e9 or the lowest float32 are clamped to -65504.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.match import Names, check_names, constant, sweep
from qexport.passes.range import HALF_QUANTIZERS
from qexport.passes.target import find_target

LARGEST = 65504.0
SMALLEST = 2.0**-14  # the smallest normal float16; what is smaller loses digits, or is zero
FEW = 16  # elements of a constant that is looked at for that; a bias may be small without guarding anything
_F32, _F16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
_TYPE_ATTRIBUTES = {"Cast": "to", "DequantizeLinear": "output_dtype"}
_FILL = {"ConstantOfShape": "value"}
_SUMS = ("ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "CumSum")
_CARRIES = frozenset(
    {
        "Abs",
        "Cast",
        "Expand",
        "Identity",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Pow",
        "Reciprocal",
        "Reshape",
        "Slice",
        "Sqrt",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
"""What is still near zero behind these operators if all that they read is."""


@dataclass(frozen=True)
class Half(Pass):
    """Cast what is not quantized to float16, where the target computes in it."""

    exact: ClassVar[bool] = False

    target: str = "tensorrt-rtx"
    keep_ops: tuple[str, ...] = _SUMS
    """Operator types that stay in float32."""
    keep: tuple[str, ...] = ()
    """Names of nodes that stay in float32."""

    def call(self, model: ir.Model) -> Outcome:
        """Convert the main graph; models with control flow and old Q/DQ opsets are left alone with a reason."""
        check_names(self.keep, model)
        refusal = self._refusal(model)
        if refusal is not None:
            return Outcome(model, False, (Decision("", "graph", "skipped", refusal),))
        if any(value.type is None for node in model.graph for value in node.outputs if value.name):
            ShapeInferencePass(check_type=False, strict_mode=False)(model)
        near = _near_zero(model.graph)
        floats = [node for node in model.graph if _computes_float(node)]
        reasons = {node: self._reason(node, model.opset_imports, near) for node in floats}
        chosen = [node for node, reason in reasons.items() if reason is None]
        kept = tuple(
            Decision(node.name or "", node.op_type, "kept", reason) for node, reason in reasons.items() if reason
        )
        if not chosen:
            return Outcome(model, False, kept)
        _Caster(model.graph, set(chosen)).run()
        return Outcome(model, True, kept)

    def _refusal(self, model: ir.Model) -> str | None:
        if find_target(self.target).rest != "float16":
            return f"target {self.target} computes in float32"
        if any(node.graph is not model.graph for node in model.graph.all_nodes()) or model.functions:
            return "the model has control flow or functions"
        quantized = any(node.op_type == "QuantizeLinear" for node in model.graph)
        if quantized and model.opset_imports.get("", 0) < HALF_QUANTIZERS:
            return f"float16 Q/DQ needs opset {HALF_QUANTIZERS}"
        return None

    def _reason(self, node: ir.Node, opsets: Mapping[str, int], near: set[ir.Node]) -> str | None:
        """Why ``node`` stays in float32, if it does."""
        if node.op_type in self.keep_ops:
            return "sums many elements"
        if node.name in self.keep:
            return "kept in float32 by name"
        if not all(isinstance(value.type, ir.TensorType) for value in _values(node)):
            return "a value is no tensor, or of unknown type"
        reason = _no_half_form(node, opsets.get(node.domain, 0))
        if reason is not None:
            return reason
        if any(_overflows(value) for value in node.inputs):
            return "a weight is beyond the float16 range"
        return "a constant is too small for float16" if node in near else None


class _Caster:
    """Converts the chosen nodes of one graph and puts casts at the borders."""

    def __init__(self, graph: ir.Graph, chosen: set[ir.Node]) -> None:
        self.graph = graph
        self.chosen = chosen
        self._names = Names(graph)
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._halves: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        made = {value for node in self.chosen for value in node.outputs if _is_float(value)}
        for node in list(self.graph):
            self._convert_inputs(node, made)
        for node in self.chosen:
            _convert_attributes(node)
        for value in made:
            value.type = ir.TensorType(_F16)  # a new object: clones share the old one
        for index, value in enumerate(list(self.graph.outputs)):
            if value in made:
                self._restore_output(index, value)
        sweep(list(self._halves))

    def _convert_inputs(self, node: ir.Node, made: set[ir.Value]) -> None:
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            if node in self.chosen and _is_float(value) and value not in made:
                node.replace_input_with(index, self._half(value))
            elif node not in self.chosen and value in made:
                node.replace_input_with(index, self._cast(value, _F32))

    def _half(self, value: ir.Value) -> ir.Value:
        """The float16 form of a float32 value that no chosen node makes."""
        tensor = constant(value)
        if tensor is None:
            return self._cast(value, _F16)
        if value not in self._halves:
            name = self._names.fresh(f"{value.name}/half")
            half = _to_half(tensor)
            copy = ir.Value(name=name, type=ir.TensorType(_F16), shape=ir.Shape(half.shape))
            copy.const_value = ir.tensor(half, name=name)
            self.graph.register_initializer(copy)
            self._halves[value] = copy
        return self._halves[value]

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        if (value, to) not in self._casts:
            name = self._names.fresh(f"{value.name}/Cast_{to.name.lower()}")
            node = ir.node("Cast", [value], {"to": to}, name=name)
            out = node.outputs[0]
            out.name, out.type = self._names.fresh(f"{value.name}/{to.name.lower()}"), ir.TensorType(to)
            out.shape = None if value.shape is None else value.shape.copy()
            producer = value.producer()
            if producer is not None:
                self.graph.insert_after(producer, node)
            else:
                self.graph.insert_before(self.graph[0], node)
            self._casts[value, to] = out
        return self._casts[value, to]

    def _restore_output(self, index: int, value: ir.Value) -> None:
        """Give the model's output its name and type back."""
        name = value.name
        value.name = self._names.fresh(f"{name}/half")
        producer = value.producer()
        cast = self._casts.get((value, _F32))
        if cast is None and producer is not None:
            node = ir.node("Cast", [value], {"to": _F32}, name=self._names.fresh(f"{name}/Cast_output"))
            self.graph.insert_after(producer, node)
            cast = node.outputs[0]
        if cast is None:
            raise ValueError(f"output {name!r} has no producer")
        cast.name, cast.type, cast.shape = name, ir.TensorType(_F32), value.shape
        self.graph.outputs[index] = cast


def _values(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads and makes, without what is left out."""
    yield from (value for value in node.inputs if value is not None)
    yield from (value for value in node.outputs if value.name)


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and isinstance(value.type, ir.TensorType) and value.dtype == _F32


def _computes_float(node: ir.Node) -> bool:
    """Whether the node makes float32 values from something that is not just a wider copy of a float16 one.

    Constants are converted for each reader.
    """
    if node.op_type == "Constant" or not any(value.dtype == _F32 for value in node.outputs):
        return False
    source = node.inputs[0] if node.inputs else None
    return not (node.op_type == "Cast" and source is not None and source.dtype == _F16)


def _no_half_form(node: ir.Node, opset: int) -> str | None:
    """Why float16 cannot stand wherever this node has float32, if the operator's definition does not let it."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return "the operator has no float16 form"
    read, made = list(_formals(node.inputs, schema.inputs)), list(_formals(node.outputs, schema.outputs))
    if not all("tensor(float16)" in formal.types for formal in read + made):
        return "the operator has no float16 form"
    follows = {formal.type_str for formal in schema.inputs} | {"tensor(float16)"}
    known = node.op_type in _TYPE_ATTRIBUTES or node.op_type in _FILL
    return None if known or all(formal.type_str in follows for formal in made) else "its output type is fixed"


def _formals(
    values: Iterable[ir.Value | None], formals: Sequence[onnx.defs.OpSchema.FormalParameter]
) -> Iterator[onnx.defs.OpSchema.FormalParameter]:
    """The definition's parameter of every float32 value."""
    for index, value in enumerate(values):
        if _is_float(value):
            yield formals[min(index, len(formals) - 1)]


def _overflows(value: ir.Value | None) -> bool:
    """Whether ``value`` is a weight, not a scalar mask, with elements beyond the float16 range."""
    tensor = constant(value)
    if tensor is None or tensor.dtype != _F32 or tensor.size <= 1:
        return False
    return bool(np.abs(tensor.numpy()).max(initial=0.0) > LARGEST)


def _near_zero(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that read a constant below the normal float16 numbers, or what such a constant guards from zero.

    A guard is good for nothing if the next node rounds it to zero, so its readers count as well, and theirs as long as
    nothing but guarded values is read.
    """
    small, guarded, near = set[ir.Value](), set[ir.Value](), set[ir.Node]()
    for node in graph:
        floats = [value for value in node.inputs if _is_float(value)]
        tiny = [value for value in floats if value in small or _is_small(constant(value))]
        behind = [value for value in floats if value in guarded]
        carries = node.op_type in _CARRIES and all(v in guarded or v in tiny or constant(v) is not None for v in floats)
        if _is_small(_filling(node)) or (tiny and carries and len(tiny) == len(floats)):
            small.update(node.outputs)
        elif tiny or (behind and carries):
            guarded.update(node.outputs)
        elif not behind:
            continue
        near.add(node)
    return near


def _is_small(tensor: ir.TensorProtocol | None) -> bool:
    """Whether the few numbers of a float32 constant are below the normal float16 ones, and not just zero."""
    if tensor is None or tensor.dtype != _F32 or tensor.size > FEW:
        return False
    return bool(0 < np.abs(tensor.numpy()).max(initial=0.0) < SMALLEST)


def _filling(node: ir.Node) -> ir.TensorProtocol | None:
    """What a node fills its output with, where an attribute says so."""
    name = _FILL.get(node.op_type)
    return node.attributes.get_tensor(name, None) if name is not None else None


def _to_half(tensor: ir.TensorProtocol) -> NDArray[np.float16]:
    return np.asarray(np.clip(tensor.numpy(), -LARGEST, LARGEST).astype(np.float16))


def _convert_attributes(node: ir.Node) -> None:
    kind = _TYPE_ATTRIBUTES.get(node.op_type)
    if kind is not None and node.attributes.get_int(kind, 0) == _F32:
        node.attributes[kind] = ir.AttrInt64(kind, _F16)
    name = _FILL.get(node.op_type)
    if name is not None:
        tensor = _filling(node)
        half = np.zeros(1, np.float16) if tensor is None else _to_half(tensor)
        node.attributes[name] = ir.AttrTensor(name, ir.tensor(half))
