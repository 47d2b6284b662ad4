"""Cast the graph to float16; inputs and outputs of the model keep their types.

1. Initializers and constants read by converted nodes become float16; a copy is made where a float32 reader remains.
2. Values between converted nodes become float16, Q/DQ scales included (``quantize`` picks scales that float16 holds).
3. Casts stand where a converted node meets a float32 one: model inputs and outputs, kept nodes.

Kept in float32: sums over many elements, nodes with a weight beyond the float16 range, and operators that the opset
does not define for float16. Masks such as -1e9 or the lowest float32 are clamped to -65504.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.target import find_target

LARGEST = 65504.0
HALF_QUANTIZERS = 19  # first opset whose Q/DQ take float16
_F32, _F16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
_TYPE_ATTRIBUTES = {"Cast": "to"}
_VALUE_ATTRIBUTES = {"Constant": "value", "ConstantOfShape": "value"}
_SUMS = ("ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "CumSum")


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
        refusal = self._refusal(model)
        if refusal is not None:
            return Outcome(model, False, (Decision("", "graph", "skipped", refusal),))
        if any(value.dtype is None for node in model.graph for value in node.outputs if value.name):
            ShapeInferencePass()(model)
        opset = model.opset_imports.get("", 0)
        reasons = {node: self._reason(node, opset) for node in model.graph if _computes_float(node)}
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

    def _reason(self, node: ir.Node, opset: int) -> str | None:
        """Why ``node`` stays in float32, if it does."""
        if node.op_type in self.keep_ops:
            return "sums many elements"
        if node.name in self.keep:
            return "kept in float32 by name"
        if not _allows_half(node, opset):
            return "the operator has no float16 form"
        if any(_overflows(value) for value in node.inputs):
            return "a weight is beyond the float16 range"
        return None


class _Caster:
    """Converts the chosen nodes of one graph and puts casts at the borders."""

    def __init__(self, graph: ir.Graph, chosen: set[ir.Node]) -> None:
        self.graph = graph
        self.chosen = chosen
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._halves: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        made = {value for node in self.chosen for value in node.outputs if value.dtype == _F32}
        for node in list(self.graph):
            self._convert_inputs(node, made)
        for node in self.chosen:
            _convert_attributes(node)
        for value in made:
            value.type = ir.TensorType(_F16)  # a new object: clones share the old one
        for index, value in enumerate(list(self.graph.outputs)):
            if value in made:
                self._restore_output(index, value)
        for value in self._halves:
            if (
                value.name
                and value.name in self.graph.initializers
                and not value.uses()
                and not value.is_graph_output()
            ):
                del self.graph.initializers[value.name]

    def _convert_inputs(self, node: ir.Node, made: set[ir.Value]) -> None:
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            if node in self.chosen and value.dtype == _F32 and value not in made:
                node.replace_input_with(index, self._half(value))
            elif node not in self.chosen and value in made:
                node.replace_input_with(index, self._cast(value, _F32))

    def _half(self, value: ir.Value) -> ir.Value:
        """The float16 form of a float32 value that no chosen node makes."""
        tensor = value.const_value
        if tensor is None or value.producer() is not None:
            return self._cast(value, _F16)
        if value not in self._halves:
            name = f"{value.name}/half"
            half = np.clip(tensor.numpy(), -LARGEST, LARGEST).astype(np.float16)
            copy = ir.Value(name=name, type=ir.TensorType(_F16), shape=ir.Shape(half.shape))
            copy.const_value = ir.tensor(half, name=name)
            self.graph.register_initializer(copy)
            self._halves[value] = copy
        return self._halves[value]

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        if (value, to) not in self._casts:
            node = ir.node("Cast", [value], {"to": to}, name=f"{value.name}/Cast_{to.name.lower()}")
            out = node.outputs[0]
            out.name, out.type = f"{value.name}/{to.name.lower()}", ir.TensorType(to)
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
        value.name = f"{name}/half"
        producer = value.producer()
        cast = self._casts.get((value, _F32))
        if cast is None and producer is not None:
            node = ir.node("Cast", [value], {"to": _F32}, name=f"{name}/Cast_output")
            self.graph.insert_after(producer, node)
            cast = node.outputs[0]
        if cast is None:
            raise ValueError(f"output {name!r} has no producer")
        cast.name, cast.type, cast.shape = name, ir.TensorType(_F32), value.shape
        self.graph.outputs[index] = cast


def _computes_float(node: ir.Node) -> bool:
    """Whether the node makes a float32 value from something that is not just a wider copy of a float16 one."""
    if not any(value.dtype == _F32 for value in node.outputs):
        return False
    source = node.inputs[0] if node.inputs else None
    return not (node.op_type == "Cast" and source is not None and source.dtype == _F16)


def _allows_half(node: ir.Node, opset: int) -> bool:
    """Whether the operator's definition admits float16 wherever this node has float32."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return False
    return all("tensor(float16)" in types for types in _formal_types(node, schema))


def _formal_types(node: ir.Node, schema: onnx.defs.OpSchema) -> Iterator[set[str]]:
    for values, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for index, value in enumerate(values):
            if value is not None and value.dtype == _F32:
                yield set(formals[min(index, len(formals) - 1)].types)


def _overflows(value: ir.Value | None) -> bool:
    """Whether ``value`` is a weight, not a scalar mask, with elements beyond the float16 range."""
    tensor = None if value is None else value.const_value
    if tensor is None or tensor.dtype != _F32 or tensor.size <= 1:
        return False
    return bool(np.abs(tensor.numpy()).max(initial=0.0) > LARGEST)


def _convert_attributes(node: ir.Node) -> None:
    kind = _TYPE_ATTRIBUTES.get(node.op_type)
    if kind is not None and node.attributes.get_int(kind, 0) == _F32:
        node.attributes[kind] = ir.AttrInt64(kind, _F16)
    name = _VALUE_ATTRIBUTES.get(node.op_type)
    tensor = node.attributes.get_tensor(name, None) if name else None
    if name and tensor is not None and tensor.dtype == _F32:
        half = np.clip(tensor.numpy(), -LARGEST, LARGEST).astype(np.float16)
        node.attributes[name] = ir.AttrTensor(name, ir.tensor(half))
