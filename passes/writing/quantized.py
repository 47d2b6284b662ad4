"""What tells a quantized model from a float one: its operators."""

from __future__ import annotations

import onnx_ir as ir

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


def quantized_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes, subgraphs and functions included, that only a quantized model has."""
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    nodes = (node for body in bodies for node in body.all_nodes())
    return [node for node in nodes if node.op_type in QUANTIZED_OPS or node.op_type.startswith(QUANTIZED_PREFIXES)]
