"""A summary of a model: what goes in and out, what it is made of, and in which precision its layers compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict

from qexport.exporter.load import load_model
from qexport.exporter.looking.element_types import ElementTypes, element_types
from qexport.passes.pipeline import parameters

LAYERS = {
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "Conv": (0, 1),
    "ConvTranspose": (0, 1),
    "MatMulInteger": (0, 1),
    "ConvInteger": (0, 1),
    "QLinearMatMul": (0, 3),
    "QLinearConv": (0, 3),
    "MatMulIntegerToFloat": (0, 1),
}
"""Operators that do the arithmetic, with the inputs that are multiplied."""

_CONTRIBUTED = {"MatMulIntegerToFloat": "com.microsoft"}
"""Those that are not ONNX's own, and whose they are."""

_QUANTIZED = {"DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear"}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Port(_Record):
    """An input or an output; a free axis is given by its name, or ``?``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None


class Layer(_Record):
    """One layer that multiplies: the types of both factors as stored, seen through Q/DQ."""

    node: str
    op: str
    activation: str
    weight: str

    @property
    def precision(self) -> str:
        """Both, as one word of a table."""
        return f"{self.activation} x {self.weight}"


class Summary(_Record):
    """What a model is.

    Attributes:
        inputs: Without initializers.
        outputs: In order.
        opsets: Domain ("" is ONNX) to version.
        ops: Operator to count, most frequent first, subgraphs and functions included.
        nodes: How many in all.
        parameters: Elements of all initializers.
        weight_bytes: Element type to bytes of initializers, largest first.
        precision: ``activation x weight`` to number of layers.
        layers: Every layer that multiplies.
        quantized: Whether any quantizer is in the graph.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    opsets: dict[str, int]
    ops: dict[str, int]
    nodes: int
    parameters: int
    weight_bytes: dict[str, int]
    precision: dict[str, int]
    layers: tuple[Layer, ...]
    quantized: bool

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        from qexport.exporter.report.notebook import table_html

        rows = [("nodes", self.nodes), ("parameters", self.parameters)]
        rows += [(f"stored as {dtype}, bytes", count) for dtype, count in self.weight_bytes.items()]
        rows += [(f"layers of {name}", count) for name, count in self.precision.items()]
        return table_html(("", "count:"), [*rows, *self.ops.items()])


def inspect(model: str | Path) -> Summary:
    """Load a model and return what it is made of; nothing is run.

    Args:
        model: An .onnx file, a folder with ``model.onnx``, or a Hugging Face folder.

    Returns:
        The same as ``qexport inspect --json``, which tells blocks and zeros besides.

    Raises:
        QexportError: It cannot be read, or breaks a rule; see ``load_source``.
    """
    return inspect_model(load_model(model))


def inspect_model(model: ir.Model) -> Summary:
    """Return the summary of ``model``, which is not changed; time and memory are linear in its nodes."""
    facts, types = facts_of(model), element_types(model)
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    stored: Counter[str] = Counter()
    for tensor in filter(None, tensors):
        stored[dtype_name(tensor.dtype)] += tensor.nbytes
    layers = tuple(_layer(node, types) for node in find_layers(model))
    graph = model.graph
    return Summary(
        inputs=tuple(_port(value, types) for value in graph.inputs if value.name not in graph.initializers),
        outputs=tuple(_port(value, types) for value in graph.outputs),
        opsets=facts.opsets,
        ops=dict(facts.ops.most_common()),
        nodes=facts.nodes,
        parameters=facts.parameters,
        weight_bytes=dict(stored.most_common()),
        precision=dict(Counter(layer.precision for layer in layers).most_common()),
        layers=layers,
        quantized=facts.quantized,
    )


@dataclass(frozen=True, slots=True)
class Facts:
    """What one walk over the nodes tells.

    Attributes:
        opsets: Domain ("" is ONNX) to version.
        ops: Operator to count, subgraphs and functions included.
        parameters: Elements of all initializers.
    """

    opsets: dict[str, int]
    ops: Counter[str]
    parameters: int

    @property
    def nodes(self) -> int:
        """How many in all."""
        return self.ops.total()

    @property
    def quantized(self) -> bool:
        """Whether any quantizer is in the graph."""
        return bool(_QUANTIZED & self.ops.keys()) or any(op.startswith("QLinear") for op in self.ops)


def facts_of(model: ir.Model) -> Facts:
    """Count what ``model`` is made of, without looking at types."""
    ops = Counter(_op_name(node) for node in _all_nodes(model))
    return Facts(dict(model.opset_imports), ops, parameters(model))


def find_layers(model: ir.Model) -> list[ir.Node]:
    """Every node that does the arithmetic, in the order of the graph, subgraphs and functions included."""
    return [node for node in _all_nodes(model) if _is_layer(node)]


def _is_layer(node: ir.Node) -> bool:
    return node.op_type in LAYERS and node.domain == _CONTRIBUTED.get(node.op_type, "")


def _layer(node: ir.Node, types: ElementTypes) -> Layer:
    first, second = (
        dtype_name(types.stored(node.inputs[place]) if place < len(node.inputs) else None) for place in factors_of(node)
    )
    return Layer(node=node.name or "", op=node.op_type, activation=first, weight=second)


def factors_of(node: ir.Node) -> tuple[int, int]:
    """Which inputs of a layer are multiplied; the weight is the second."""
    return LAYERS[node.op_type]


def dtype_name(dtype: ir.DataType | None) -> str:
    """What reports call an element type."""
    if dtype is None:
        return "unknown"
    return {"float": "float32", "double": "float64"}.get(dtype.name.lower(), dtype.name.lower())


def _port(value: ir.Value, types: ElementTypes) -> Port:
    shape = None
    if value.shape is not None:
        shape = tuple(axis if isinstance(axis, int) else str(axis.value or "?") for axis in value.shape)
    return Port(name=value.name or "", dtype=dtype_name(types.of(value)), shape=shape)


def _op_name(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()
