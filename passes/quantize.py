"""Insert Q/DQ pairs from calibrated ranges and store weights as integers.

1. Activation: ``x -> op`` becomes ``x -> QuantizeLinear -> DequantizeLinear -> op``, for the quantized consumers of x
   only; they share one pair.
2. Weight: ``W -> op`` becomes ``int8 W -> DequantizeLinear -> op``, symmetric per output channel; the float weight is
   dropped when nothing else reads it.
3. Embedding table: rows are stored as int8 with one scale each (``target.table`` says how they are read back).
4. Biases stay float.

Equations: Jacob et al. 2018, eq. 1; symmetric ranges of Wu et al. 2020, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.errors import UsageError
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.match import constant
from qexport.passes.placement import Plan, Site, plan
from qexport.passes.range import SQNR_KEY, Integers, half_precision, integers_for, range_of
from qexport.passes.target import Target, find_target

MIN_TABLE = 1 << 16  # elements; below it an int8 table saves nothing worth a node


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantize weights and activations to 8 bits where the target gains from it."""

    exact: ClassVar[bool] = False

    target: str = "tensorrt-rtx"
    min_sqnr: float = 22.0
    """A node whose output would have less signal over quantization noise than this (dB) stays in float."""
    keep: tuple[str, ...] = ()
    """Names of nodes that stay in float."""
    attention: bool = False
    """Whether products of two computed tensors are quantized (leave fuse-attention out of the recipe then)."""

    def call(self, model: ir.Model) -> Outcome:
        """Insert the quantizers; a model that has some already is a ``UsageError``."""
        if _has_quantizers(model):
            return Outcome(model, False)
        target = find_target(self.target)
        found = plan(model, target, attention=self.attention)
        chosen, refused = self._choose(found)
        editor = _Editor(model.graph, target)
        done = [editor.quantize(site) for site in chosen]
        done += [editor.quantize_table(node) for node in _tables(model, target)]
        editor.finish()
        return Outcome(model, bool(done), tuple(done + refused))

    def _choose(self, found: Plan) -> tuple[list[Site], list[Decision]]:
        chosen: list[Site] = []
        refused = list(found.refused)
        for site in found.sites:
            reason = self._refusal(site)
            if reason is None:
                chosen.append(site)
            else:
                refused.append(Decision(site.node.name or "", site.node.op_type, "skipped", reason))
        if found.sites and not chosen and all("not calibrated" in decision.reason for decision in refused):
            raise UsageError("no tensor has a calibrated range", hint="put a calibrate step before quantize")
        return chosen, refused

    def _refusal(self, site: Site) -> str | None:
        if site.node.name in self.keep:
            return "kept in float by name"
        ranges = [range_of(value) for value in site.values]
        if any(span is None for span in ranges):
            return "not calibrated: no sample reached it"
        if any(span.low == span.high == 0 for span in ranges if span is not None):
            return "its input is always zero"
        sqnr = site.node.meta.get(SQNR_KEY)
        if sqnr is not None and sqnr < self.min_sqnr:
            return f"output SQNR below {self.min_sqnr:g} dB"
        return None


class _Editor:
    """Edits one graph; keeps the pairs and weights it has made, so that consumers share them."""

    def __init__(self, graph: ir.Graph, target: Target) -> None:
        self.graph = graph
        self.target = target
        self._pairs: dict[ir.Value, ir.Value] = {}
        self._weights: dict[tuple[ir.Value, int], ir.Value] = {}

    def quantize(self, site: Site) -> Decision:
        for index in site.inputs:
            value = site.node.inputs[index]
            if value is not None:
                site.node.replace_input_with(index, self._pair(value))
        if site.weight is not None:
            weight = site.node.inputs[site.weight]
            if weight is not None:
                site.node.replace_input_with(site.weight, self._weight(weight, site.kernel, site.axis))
        return Decision(site.node.name or "", site.node.op_type, "quantized", site.kind)

    def quantize_table(self, node: ir.Node) -> Decision:
        table, indices = node.inputs[:2]
        tensor = constant(table)
        if table is None or tensor is None:
            raise ValueError(f"node {node.name!r} has no constant table")
        if self.target.table == "dequantize":
            node.replace_input_with(0, self._weight(table, tensor, 0))
        else:
            self._gather_rows(node, indices, table.name or "table", tensor)
        return Decision(node.name or "", node.op_type, "quantized", "embedding table, one scale a row")

    def finish(self) -> None:
        """Drop float weights that nothing reads any more."""
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del self.graph.initializers[name]

    def _pair(self, value: ir.Value) -> ir.Value:
        if value not in self._pairs:
            span = range_of(value)
            if span is None:
                raise ValueError(f"value {value.name!r} has no range")
            numbers = integers_for(span, self.target.activation)
            scale, zero = self._constants(f"{value.name}", numbers)
            q = ir.node("QuantizeLinear", [value, scale, zero], name=f"{value.name}/QuantizeLinear")
            dq = ir.node("DequantizeLinear", [q.outputs[0], scale, zero], name=f"{value.name}/DequantizeLinear")
            _describe(q.outputs[0], f"{value.name}/quantized", ir.DataType[numbers.dtype.upper()], value.shape)
            _describe(dq.outputs[0], f"{value.name}/dequantized", value.dtype, value.shape)
            self._insert_after(value, [q, dq])
            self._pairs[value] = dq.outputs[0]
        return self._pairs[value]

    def _weight(self, value: ir.Value, tensor: ir.TensorProtocol, axis: int) -> ir.Value:
        if (value, axis) not in self._weights:
            integers, scale = quantize_weight(tensor.numpy(), axis)
            inputs = [
                self._initializer(f"{value.name}/int8", integers),
                self._initializer(f"{value.name}/scale", scale.astype(tensor.dtype.numpy())),
                self._initializer(f"{value.name}/zero_point", np.zeros(scale.shape, np.int8)),
            ]
            dq = ir.node("DequantizeLinear", inputs, {"axis": axis}, name=f"{value.name}/DequantizeLinear")
            _describe(dq.outputs[0], f"{value.name}/dequantized", tensor.dtype, ir.Shape(integers.shape))
            self.graph.insert_before(self.graph[0], dq)
            self._weights[value, axis] = dq.outputs[0]
        return self._weights[value, axis]

    def _gather_rows(self, node: ir.Node, indices: ir.Value | None, name: str, tensor: ir.TensorProtocol) -> None:
        """Gather int8 rows and their scales, then multiply: no pass over the whole table at run time."""
        integers, scale = quantize_weight(tensor.numpy(), 0)
        rows = ir.node("Gather", [self._initializer(f"{name}/int8", integers), indices], name=f"{name}/Gather")
        scales = self._initializer(f"{name}/scale", scale.astype(tensor.dtype.numpy())[:, None])
        scale_rows = ir.node("Gather", [scales, indices], name=f"{name}/GatherScale")
        cast = ir.node("Cast", [rows.outputs[0]], {"to": tensor.dtype}, name=f"{name}/Cast")
        product = ir.node("Mul", [cast.outputs[0], scale_rows.outputs[0]], name=f"{name}/Mul")
        self.graph.insert_before(node, [rows, scale_rows, cast, product])
        ir.convenience.replace_nodes_and_values(
            self.graph, node, [node], [rows, scale_rows, cast, product], node.outputs, product.outputs
        )

    def _constants(self, name: str, numbers: Integers) -> tuple[ir.Value, ir.Value]:
        scale = self._initializer(f"{name}/scale", np.array(numbers.scale, np.float32))
        return scale, self._initializer(f"{name}/zero_point", np.array(numbers.zero_point, numbers.dtype))

    def _initializer(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        while name in self.graph.initializers:
            name += "_"
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        self.graph.register_initializer(value)
        return value

    def _insert_after(self, value: ir.Value, nodes: list[ir.Node]) -> None:
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], nodes)
        else:
            self.graph.insert_after(producer, nodes)


def quantize_weight(weight: NDArray[np.generic], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric absmax int8 along ``axis``: integers in [-127, 127] of the same shape, scales ``[channels]``."""
    w = np.asarray(weight, np.float32)
    others = tuple(i for i in range(w.ndim) if i != axis)
    scale = half_precision(np.abs(w).max(axis=others) / 127)
    wide = np.expand_dims(scale, others)
    return np.clip(np.rint(w / wide), -127, 127).astype(np.int8), scale


def _tables(model: ir.Model, target: Target) -> list[ir.Node]:
    if target.table == "float":
        return []
    return [node for node in model.graph if node.op_type == "Gather" and _is_table(node)]


def _is_table(node: ir.Node) -> bool:
    tensor = constant(node.inputs[0])
    return (
        tensor is not None
        and tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
        and len(tensor.shape) == 2
        and tensor.size >= MIN_TABLE
        and node.attributes.get_int("axis", 0) == 0
    )


def _has_quantizers(model: ir.Model) -> bool:
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.all_nodes())


def _describe(value: ir.Value, name: str, dtype: ir.DataType | None, shape: ir.Shape | None) -> None:
    value.name = name
    value.type = None if dtype is None else ir.TensorType(dtype)
    value.shape = None if shape is None else shape.copy()
