"""A summary of a model: what goes in and out, what it is made of, and in which precision its layers compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass
from pydantic import BaseModel, ConfigDict

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

_TRANSPARENT = {"Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze", "Flatten"}
"""Operators that stand between a DequantizeLinear and its layer without computing anything."""

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


def inspect_model(model: ir.Model) -> Summary:
    """Return the summary of ``model``, which is not changed."""
    seen = _with_types(model)
    nodes = list(_all_nodes(seen))
    ops = Counter(_op_name(node) for node in nodes)
    tensors = [value.const_value for graph in seen.graphs() for value in graph.initializers.values()]
    stored: Counter[str] = Counter()
    for tensor in filter(None, tensors):
        stored[dtype_name(tensor.dtype)] += tensor.nbytes
    layers = tuple(map(_layer, find_layers(seen)))
    graph = seen.graph
    return Summary(
        inputs=tuple(_port(value) for value in graph.inputs if value.name not in graph.initializers),
        outputs=tuple(map(_port, graph.outputs)),
        opsets=dict(seen.opset_imports),
        ops=dict(ops.most_common()),
        nodes=len(nodes),
        parameters=sum(tensor.size for tensor in tensors if tensor is not None),
        weight_bytes=dict(stored.most_common()),
        precision=dict(Counter(f"{layer.activation} x {layer.weight}" for layer in layers).most_common()),
        layers=layers,
        quantized=bool(_QUANTIZED & ops.keys()) or any(layer.op.startswith("QLinear") for layer in layers),
    )


def _with_types(model: ir.Model) -> ir.Model:
    """Return a model whose values have types: the same one, or a clone on which they were inferred."""
    factors = (node.inputs[i] for node in find_layers(model) for i in factors_of(node))
    if all(value is None or stored_type(value) is not None for value in factors):
        return model
    clone = model.clone()
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(clone)
    return clone


def stored_type(value: ir.Value) -> ir.DataType | None:
    """Return the element type that carries ``value``: the integers of a DequantizeLinear, else its own type."""
    source = value
    while (node := source.producer()) is not None and node.inputs and node.inputs[0] is not None:
        if node.op_type == "DequantizeLinear":
            return node.inputs[0].dtype or stored_type(node.inputs[0]) or _quantized_type(node.inputs[0])
        if node.op_type not in _TRANSPARENT:
            break
        source = node.inputs[0]
    return value.dtype


def _quantized_type(value: ir.Value) -> ir.DataType | None:
    """Return the type a QuantizeLinear writes: its zero point's, its ``output_dtype``, or the default."""
    node = value.producer()
    if node is None or node.op_type != "QuantizeLinear":
        return None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return node.inputs[2].dtype
    code = node.attributes.get_int("output_dtype", 0)
    return ir.DataType(code) if code else ir.DataType.UINT8


def find_layers(model: ir.Model) -> list[ir.Node]:
    """Every node that does the arithmetic, in the order of the graph, subgraphs and functions included."""
    return [node for node in _all_nodes(model) if _is_layer(node)]


def _is_layer(node: ir.Node) -> bool:
    return node.op_type in LAYERS and node.domain == _CONTRIBUTED.get(node.op_type, "")


def _layer(node: ir.Node) -> Layer:
    first, second = (_type_name(node.inputs[i]) for i in factors_of(node))
    return Layer(node=node.name or "", op=node.op_type, activation=first, weight=second)


def factors_of(node: ir.Node) -> tuple[int, int]:
    """Which inputs of a layer are multiplied; the weight is the second."""
    return LAYERS[node.op_type]


def _type_name(value: ir.Value | None) -> str:
    return dtype_name(None if value is None else stored_type(value))


def dtype_name(dtype: ir.DataType | None) -> str:
    """What reports call an element type."""
    if dtype is None:
        return "unknown"
    return {"float": "float32", "double": "float64"}.get(dtype.name.lower(), dtype.name.lower())


def _port(value: ir.Value) -> Port:
    shape = None
    if value.shape is not None:
        shape = tuple(axis if isinstance(axis, int) else str(axis.value or "?") for axis in value.shape)
    return Port(name=value.name or "", dtype=dtype_name(value.dtype), shape=shape)


def _op_name(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()
