"""Q/DQ pairs, stored weights and integer tables: the edits that ``quantize`` makes to a graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.base import Decision
from qexport.passes.match import Names, constant, maker, producer, sweep
from qexport.passes.numbers.formats import FORMATS, Kind
from qexport.passes.numbers.range import integers_for, range_of
from qexport.passes.numbers.weights import stored_numbers
from qexport.passes.placement import Site
from qexport.passes.target import Target

MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")
"""Operators behind which a quantizer gives the same numbers as before them."""

UNTYPED_ZERO = 21  # first opset whose QuantizeLinear tells its type without a zero point


def needs_half(target: Target, dtype: ir.DataType) -> bool:
    """Whether the scales of a tensor of ``dtype`` must be float16 numbers."""
    return target.rest == "float16" or dtype == ir.DataType.FLOAT16


def is_quantized(value: ir.Value) -> bool:
    """Whether a value is read by quantizers alone, through operators that move numbers."""
    todo = [value]
    while todo:
        seen = todo.pop()
        if seen.is_graph_output() or not seen.uses():
            return False
        for node, _ in seen.uses():
            if node.op_type in MOVES:
                todo.append(node.outputs[0])
            elif node.op_type != "QuantizeLinear":
                return False
    return True


def float_type(site: Site) -> ir.DataType:
    """The type that a site computes in."""
    known = [value.dtype for value in site.values if value.dtype is not None]
    return known[0] if known else ir.DataType.FLOAT if site.weight is None else site.kernel.dtype


class Editor:
    """Edits one graph; keeps the pairs and weights it has made, so that consumers share them."""

    def __init__(self, graph: ir.Graph, target: Target) -> None:
        self.graph = graph
        self.target = target
        self._names = Names(graph)
        self._pairs: dict[ir.Value, ir.Value] = {}
        self._stored: dict[tuple[ir.Value, int, Kind], tuple[ir.Value, NDArray[np.generic]]] = {}
        self._weights: dict[tuple[ir.Value, int, Kind], ir.Value] = {}
        self._columns: dict[ir.Value, ir.Value] = {}

    def quantize(self, site: Site) -> Decision:
        """Put pairs on the activations of a calibrated site, and its weight as integers."""
        dtype, kind = float_type(site), FORMATS[self.target.activation].weight
        for index in site.inputs:
            value = site.node.inputs[index]
            if value is not None:
                site.node.replace_input_with(index, self._pair(value, dtype))
        if site.weight is not None:
            weight = site.node.inputs[site.weight]
            if weight is not None:
                site.node.replace_input_with(site.weight, self._weight(weight, site.kernel, site.axis, kind))
        return Decision(site.node.name or "", site.node.op_type, "quantized", site.kind)

    def quantize_output(self, site: Site) -> None:
        """Let everything that reads what a site makes read it through a pair.

        Where all readers do already, behind operators that only move numbers, the engine quantizes it as it is: there
        the pair moves up to what makes them (NVIDIA TensorRT, "Explicit Quantization": Q backward propagation).
        """
        if site.output is None or is_quantized(site.output):
            return
        readers = tuple(site.output.uses())
        numbers = self._pair(site.output, float_type(site))
        for node, index in readers:
            if node.op_type != "QuantizeLinear":
                node.replace_input_with(index, numbers)
        if self.graph.opset_imports.get("", 1) >= UNTYPED_ZERO:
            _leave_out_zero(numbers)

    def quantize_table(self, node: ir.Node) -> Decision:
        """Store the table of a Gather as integers, read back as the target wants it."""
        table, indices = node.inputs[:2]
        tensor = constant(table)
        if table is None or tensor is None:
            raise ValueError(f"node {node.name!r} has no constant table")
        if self.target.table == "dequantize":
            node.replace_input_with(0, self._weight(table, tensor, 0, "int8"))
        else:
            self._gather_rows(node, indices, table, tensor)
        return Decision(node.name or "", node.op_type, "quantized", "embedding table, one scale a row")

    def finish(self) -> None:
        """Drop the float weights that nothing reads any more."""
        sweep([value for value, _, _ in self._stored])

    def _pair(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value not in self._pairs:
            span = range_of(value)
            if span is None:
                raise ValueError(f"value {value.name!r} has no range")
            numbers = integers_for(span, self.target.activation, half=needs_half(self.target, dtype))
            scale = self._initializer(f"{value.name}/scale", np.array(numbers.scale, dtype.numpy()))
            zero = self._initializer(f"{value.name}/zero_point", numbers.zero)
            q = self._node("QuantizeLinear", [value, scale, zero], f"{value.name}")
            dq = self._node("DequantizeLinear", [q.outputs[0], scale, zero], f"{value.name}")
            self._describe(q, f"{value.name}/quantized", ir.DataType.from_numpy(numbers.zero.dtype), value.shape)
            self._describe(dq, f"{value.name}/dequantized", dtype, value.shape)
            self._insert_after(value, [q, dq])
            self._pairs[value] = dq.outputs[0]
        return self._pairs[value]

    def _weight(self, value: ir.Value, tensor: ir.TensorProtocol, axis: int, kind: Kind) -> ir.Value:
        if (value, axis, kind) not in self._weights:
            held, scale = self._store(value, tensor, axis, kind)
            inputs = [
                held,
                self._initializer(f"{value.name}/scale", scale),
                self._initializer(f"{value.name}/zero_point", np.zeros(scale.shape, FORMATS[kind].stored)),
            ]
            dq = self._node("DequantizeLinear", inputs, f"{value.name}", axis=axis)
            self._describe(dq, f"{value.name}/dequantized", tensor.dtype, held.shape)
            self.graph.insert_before(self.graph[0], dq)
            self._weights[value, axis, kind] = dq.outputs[0]
        return self._weights[value, axis, kind]

    def _store(
        self, value: ir.Value, tensor: ir.TensorProtocol, axis: int, kind: Kind
    ) -> tuple[ir.Value, NDArray[np.generic]]:
        """The numbers of a weight as an initializer, made once, and their scales."""
        if (value, axis, kind) not in self._stored:
            half = needs_half(self.target, tensor.dtype)
            numbers, scale = stored_numbers(value, tensor, axis, half=half, kind=kind)
            held = self._initializer(f"{value.name}/{kind}", numbers)
            self._stored[value, axis, kind] = held, scale.astype(tensor.dtype.numpy())
        return self._stored[value, axis, kind]

    def _gather_rows(self, node: ir.Node, indices: ir.Value | None, table: ir.Value, tensor: ir.TensorProtocol) -> None:
        """Gather int8 rows and their scales, then multiply: no pass over the whole table at run time."""
        integers, scale = self._store(table, tensor, 0, "int8")
        if table not in self._columns:
            self._columns[table] = self._initializer(f"{table.name}/scale", scale[:, None])
        name = node.name or f"{table.name}"
        rows = self._node("Gather", [integers, indices], name)
        scales = self._node("Gather", [self._columns[table], indices], f"{name}/scale")
        cast = self._node("Cast", [rows.outputs[0]], name, to=tensor.dtype)
        product = self._node("Mul", [cast.outputs[0], scales.outputs[0]], name)
        nodes = [rows, scales, cast, product]
        for made in nodes:
            self._describe(made, f"{made.name}:0", None, None)
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], nodes, node.outputs, product.outputs)
        for key, note in node.outputs[0].meta.items():
            product.outputs[0].meta[key] = note

    def _node(self, op: str, inputs: Sequence[ir.Value | None], scope: str, **attributes: int) -> ir.Node:
        return ir.node(op, inputs, attributes or None, name=self._names.fresh(f"{scope}/{op}"))

    def _initializer(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        name = self._names.fresh(name)
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        self.graph.register_initializer(value)
        return value

    def _describe(self, node: ir.Node, name: str, dtype: ir.DataType | None, shape: ir.Shape | None) -> None:
        value = node.outputs[0]
        value.name = self._names.fresh(name)
        value.type = None if dtype is None else ir.TensorType(dtype)
        value.shape = None if shape is None else shape.copy()

    def _insert_after(self, value: ir.Value, nodes: list[ir.Node]) -> None:
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], nodes)
        else:
            self.graph.insert_after(producer, nodes)


def _leave_out_zero(numbers: ir.Value) -> None:
    """Let the pair that makes ``numbers`` tell its type by an attribute, where its zero point is zero.

    onnxruntime 1.31 copies a pair to behind a Reshape or Transpose that reads it, notes the type of its integers there,
    turns int8 zero points into uint8, and then refuses the copy as contradictory.
    """
    dequantize = maker(numbers)
    quantize, zero = producer(dequantize.inputs[0], "QuantizeLinear"), constant(dequantize.inputs[2])
    if quantize is None or zero is None or zero.numpy().any():
        return
    quantize.attributes["output_dtype"] = ir.AttrInt64("output_dtype", zero.dtype)
    dropped = dequantize.inputs[2]
    for node in (quantize, dequantize):
        node.resize_inputs(2)
    sweep([dropped])
