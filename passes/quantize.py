"""Insert Q/DQ pairs from calibrated ranges and store weights as integers.

1. Activation: ``x -> op`` becomes ``x -> QuantizeLinear -> DequantizeLinear -> op``, for the quantized consumers of x
   only; they share one pair.
2. Weight: ``W -> op`` becomes ``int8 W -> DequantizeLinear -> op``, symmetric per output channel; the float weight is
   dropped when nothing else reads it.
3. Embedding table: rows are stored as int8 with one scale each (``target.table`` says how they are read back), where
   nothing else needs the float rows.
4. Biases stay float.

Scales have the type of what they scale, and are float16 numbers wherever half precision may come to read them.

Equations: Jacob et al. 2018, eq. 1; symmetric ranges of Wu et al. 2020, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.errors import UsageError
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.match import Names, check_names, constant, sweep
from qexport.passes.placement import Site, plan, residual_sites
from qexport.passes.range import HALF_QUANTIZERS, SQNR_KEY, beyond_half, integers_for, range_of
from qexport.passes.target import Target, find_target
from qexport.passes.weights import misfit, quantize_weight

MIN_TABLE = 1 << 16  # elements; below it an int8 table saves nothing worth a node
AXIS_OPSET = 13  # the first whose DequantizeLinear takes a scale for each channel
NOT_CALIBRATED = "not calibrated: no sample reached it"
KEPT = "kept in float by name"

QUANTIZED_OPS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
        "MatMulInteger16",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
        "MatMulNBits",
        "MatMulBnb4",
        "MatMulFpQ4",
        "GatherBlockQuantized",
        "QAttention",
        "QGemm",
        "QMoE",
        "QEmbedLayerNormalization",
        "QuantizeBFP",
        "DequantizeBFP",
        "QuantizeWithOrder",
        "DequantizeWithOrder",
    }
)
"""Operators of the standard and of onnxruntime that only quantized models have."""
QUANTIZED_PREFIXES = ("QLinear", "QOrdered", "TRT_FP8", "TRT_INT4", "TRT_MXFP8", "TRT_FP4")


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantize weights and activations to 8 bits where the target gains from it."""

    exact: ClassVar[bool] = False
    quantizes: ClassVar[bool] = True

    target: str = "tensorrt-rtx"
    min_sqnr: float = 22.0
    """A node whose output would have less signal over quantization noise than this (dB) stays in float."""
    keep: tuple[str, ...] = ()
    """Names of nodes that stay in float."""
    attention: bool = False
    """Whether products of two computed tensors are quantized; needs calibrate.attention, and no fuse-attention."""

    def call(self, model: ir.Model) -> Outcome:
        """Insert the quantizers; a model that has some, or an opset without them, is left alone with a reason.

        Nothing calibrated at all, or a name in ``keep`` that no node has, is a ``UsageError``.
        """
        refusal = _refusal(model)
        if refusal is not None:
            return Outcome(model, False, (Decision("", "graph", "skipped", refusal),))
        check_names(self.keep, model)
        target, opset = find_target(self.target), model.opset_imports.get("", 1)
        found = plan(model, target, attention=self.attention)
        rules = _Rules(target, opset, self.keep, self.min_sqnr)
        chosen, refused = rules.split(found.roots)
        if any(d.reason == NOT_CALIBRATED for d in refused) and not any(map(_calibrated, found.roots)):
            raise UsageError("no tensor has a calibrated range", hint="put a calibrate step before quantize")
        skips, refused_skips = rules.split(residual_sites(model.graph, chosen, target))
        editor = _Editor(model.graph, target)
        done = [editor.quantize(site) for site in chosen + skips]
        tables, refused_tables = rules.split_tables(model.graph)
        done += [editor.quantize_table(node) for node in tables]
        editor.finish()
        return Outcome(model, bool(done), (*done, *found.refused, *refused, *refused_skips, *refused_tables))


def quantized_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes, subgraphs and functions included, that only a quantized model has."""
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    nodes = (node for body in bodies for node in body.all_nodes())
    return [node for node in nodes if node.op_type in QUANTIZED_OPS or node.op_type.startswith(QUANTIZED_PREFIXES)]


def _refusal(model: ir.Model) -> str | None:
    if quantized_nodes(model):
        return "already quantized"
    opset = model.opset_imports.get("", 1)
    return f"needs opset {AXIS_OPSET}, model has {opset}" if opset < AXIS_OPSET else None


def _calibrated(site: Site) -> bool:
    return any(range_of(value) is not None for value in site.values)


@dataclass(frozen=True)
class _Rules:
    """Which sites and tables are not quantized although the target could: by request, by their numbers."""

    target: Target
    opset: int
    keep: tuple[str, ...]
    min_sqnr: float

    def split(self, sites: Iterable[Site]) -> tuple[list[Site], list[Decision]]:
        """The sites to quantize, and why the others are not."""
        chosen, refused = [], []
        for site in sites:
            reason = self._site(site)
            if reason is None:
                chosen.append(site)
            else:
                refused.append(Decision(site.node.name or "", site.node.op_type, "skipped", reason))
        return chosen, refused

    def split_tables(self, graph: ir.Graph) -> tuple[list[ir.Node], list[Decision]]:
        """The Gathers whose tables are to be quantized, and why others are not.

        A table is stored once: a reader that needs its float rows keeps it in float for all.
        """
        if self.target.table == "float":
            return [], []
        gathers = [node for node in graph if node.op_type == "Gather" and node.domain == "" and self._is_table(node)]
        reasons = {node: self._table(node) for node in gathers}
        willing = {node for node, reason in reasons.items() if reason is None}
        for node in willing:
            table = node.inputs[0]
            if table is None or table.is_graph_output() or any(user not in willing for user in table.consumers()):
                reasons[node] = "something else reads the float table"
        refused = [Decision(node.name or "", "Gather", "skipped", reason) for node, reason in reasons.items() if reason]
        return [node for node, reason in reasons.items() if reason is None], refused

    def _site(self, site: Site) -> str | None:
        if site.node.name in self.keep:
            return KEPT
        ranges = [range_of(value) for value in site.values]
        if any(span is None for span in ranges):
            return NOT_CALIBRATED
        if any(span.low == span.high == 0 for span in ranges if span is not None):
            return "its input is always zero"
        sqnr = site.node.meta.get(SQNR_KEY)
        if sqnr is not None and sqnr < self.min_sqnr:
            return f"output SQNR below {self.min_sqnr:g} dB"
        return self._numbers(site)

    def _numbers(self, site: Site) -> str | None:
        """Why 8-bit numbers with scales of the right type cannot stand for a calibrated site."""
        dtype = float_type(site)
        if dtype == ir.DataType.FLOAT16 and self.opset < HALF_QUANTIZERS:
            return f"float16 Q/DQ needs opset {HALF_QUANTIZERS}"
        half = self._half(dtype)
        for value in site.values:
            span = range_of(value)
            reason = beyond_half(span, self.target.activation) if half and span is not None else None
            if reason is not None:
                return reason
        return None if site.weight is None else misfit(site.kernel.numpy(), site.axis, half=half)

    def _is_table(self, node: ir.Node) -> bool:
        tensor = constant(node.inputs[0])
        return (
            tensor is not None
            and tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
            and len(tensor.shape) == 2
            and tensor.size >= MIN_TABLE
            and tensor.numpy().shape[1] >= self.target.min_dim
            and node.attributes.get_int("axis", 0) == 0
        )

    def _table(self, node: ir.Node) -> str | None:
        tensor = constant(node.inputs[0])
        if node.name in self.keep:
            return KEPT
        if tensor is None:
            return "its table is computed"
        if tensor.dtype == ir.DataType.FLOAT16 and self.target.table == "dequantize" and self.opset < HALF_QUANTIZERS:
            return f"float16 Q/DQ needs opset {HALF_QUANTIZERS}"
        return misfit(tensor.numpy(), 0, half=self._half(tensor.dtype))

    def _half(self, dtype: ir.DataType) -> bool:
        return needs_half(self.target, dtype)


def needs_half(target: Target, dtype: ir.DataType) -> bool:
    """Whether the scales of a tensor of ``dtype`` must be float16 numbers."""
    return target.rest == "float16" or dtype == ir.DataType.FLOAT16


def float_type(site: Site) -> ir.DataType:
    """The type that a site computes in."""
    known = [value.dtype for value in site.values if value.dtype is not None]
    return known[0] if known else ir.DataType.FLOAT if site.weight is None else site.kernel.dtype


class _Editor:
    """Edits one graph; keeps the pairs and weights it has made, so that consumers share them."""

    def __init__(self, graph: ir.Graph, target: Target) -> None:
        self.graph = graph
        self.target = target
        self._names = Names(graph)
        self._pairs: dict[ir.Value, ir.Value] = {}
        self._stored: dict[tuple[ir.Value, int], tuple[ir.Value, NDArray[np.generic]]] = {}
        self._weights: dict[tuple[ir.Value, int], ir.Value] = {}
        self._columns: dict[ir.Value, ir.Value] = {}

    def quantize(self, site: Site) -> Decision:
        dtype = float_type(site)
        for index in site.inputs:
            value = site.node.inputs[index]
            if value is not None:
                site.node.replace_input_with(index, self._pair(value, dtype))
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
            self._gather_rows(node, indices, table, tensor)
        return Decision(node.name or "", node.op_type, "quantized", "embedding table, one scale a row")

    def finish(self) -> None:
        """Drop the float weights that nothing reads any more."""
        sweep([value for value, _ in self._stored])

    def _pair(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value not in self._pairs:
            span = range_of(value)
            if span is None:
                raise ValueError(f"value {value.name!r} has no range")
            numbers = integers_for(span, self.target.activation, half=needs_half(self.target, dtype))
            scale = self._initializer(f"{value.name}/scale", np.array(numbers.scale, dtype.numpy()))
            zero = self._initializer(f"{value.name}/zero_point", np.array(numbers.zero_point, numbers.dtype))
            q = self._node("QuantizeLinear", [value, scale, zero], f"{value.name}")
            dq = self._node("DequantizeLinear", [q.outputs[0], scale, zero], f"{value.name}")
            self._describe(q, f"{value.name}/quantized", ir.DataType[numbers.dtype.upper()], value.shape)
            self._describe(dq, f"{value.name}/dequantized", dtype, value.shape)
            self._insert_after(value, [q, dq])
            self._pairs[value] = dq.outputs[0]
        return self._pairs[value]

    def _weight(self, value: ir.Value, tensor: ir.TensorProtocol, axis: int) -> ir.Value:
        if (value, axis) not in self._weights:
            integers, scale = self._store(value, tensor, axis)
            inputs = [
                integers,
                self._initializer(f"{value.name}/scale", scale),
                self._initializer(f"{value.name}/zero_point", np.zeros(scale.shape, np.int8)),
            ]
            dq = self._node("DequantizeLinear", inputs, f"{value.name}", axis=axis)
            self._describe(dq, f"{value.name}/dequantized", tensor.dtype, integers.shape)
            self.graph.insert_before(self.graph[0], dq)
            self._weights[value, axis] = dq.outputs[0]
        return self._weights[value, axis]

    def _store(self, value: ir.Value, tensor: ir.TensorProtocol, axis: int) -> tuple[ir.Value, NDArray[np.generic]]:
        """The integers of a weight as an initializer, made once, and their scales."""
        if (value, axis) not in self._stored:
            half = needs_half(self.target, tensor.dtype)
            integers, scale = quantize_weight(tensor.numpy(), axis, half=half)
            held = self._initializer(f"{value.name}/int8", integers)
            self._stored[value, axis] = held, scale.astype(tensor.dtype.numpy())
        return self._stored[value, axis]

    def _gather_rows(self, node: ir.Node, indices: ir.Value | None, table: ir.Value, tensor: ir.TensorProtocol) -> None:
        """Gather int8 rows and their scales, then multiply: no pass over the whole table at run time."""
        integers, scale = self._store(table, tensor, 0)
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
