"""What the engine builders read wrongly or die of without saying so: found in the model before they see it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

_QUANTIZED = {ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1}
_FUSED_ATTENTION = {"Attention", "MultiHeadAttention"}


def find_faults(model: ir.Model, module: str) -> Iterator[tuple[ir.Node, str]]:
    """Yield the nodes that the builder ``module`` would misread, and why.

    1. QuantizeLinear or DequantizeLinear of another type than int8, int4, fp8 or fp4. The parsers read uint8 with
       zero point 0, which is also what a QuantizeLinear without zero point has, as int8 and only log a warning
       (onnx-tensorrt 8.6 to 11, TensorRT-RTX 1.7): every value above 127 would be clipped.
    2. Attention with the lengths of its keys and ``is_causal``. The parser drops the lengths without a word and lets
       query ``i`` see the first ``i + 1`` keys, wherever the query stands (TensorRT-RTX 1.7.1, and the same parser in
       TensorRT). A mask as an input says the same in a way that is read.
    3. A fused attention whose query and key are the same tensor ends the process (TensorRT-RTX 1.7.1).
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            dtype = _quantized_type(node)
            if dtype is not None and dtype not in _QUANTIZED:
                yield node, f"{dtype.name.lower()} would be read as int8, quantize to int8 with zero point 0"
        elif node.op_type == "Attention" and _drops_lengths(node):
            yield node, "nonpad_kv_seqlen with is_causal would be ignored, give a mask instead"
        elif module == "tensorrt_rtx" and node.op_type in _FUSED_ATTENTION and _shares_query(node):
            yield node, "query and key are the same tensor, which ends the process; give each a projection of its own"


def domain_of(model: ir.Model, name: str, op: str) -> str:
    """Return the domain of the node called ``name``; empty for the standard operators and where there is none."""
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return next((node.domain for node in nodes if (node.name or "") == name and node.op_type == op), "")


def _quantized_type(node: ir.Node) -> ir.DataType | None:
    """Return the type on the quantized side, ``None`` where the node before decides it."""
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is not None:
        return _type(zero_point)
    if node.op_type == "DequantizeLinear":
        return _type(node.inputs[0])
    asked = node.attributes.get_int("output_dtype", 0)
    return ir.DataType(asked) if asked else ir.DataType.UINT8


def _type(value: ir.Value | None) -> ir.DataType | None:
    if value is None:
        return None
    constant = ir.convenience.get_const_tensor(value)
    return value.dtype if constant is None else constant.dtype


def _drops_lengths(node: ir.Node) -> bool:
    """Whether an Attention has its seventh input, and is causal besides."""
    given = len(node.inputs) > 6 and node.inputs[6] is not None
    return given and node.domain == "" and node.attributes.get_int("is_causal", 0) != 0


def _shares_query(node: ir.Node) -> bool:
    return len(node.inputs) > 1 and node.inputs[0] is not None and node.inputs[0] is node.inputs[1]
