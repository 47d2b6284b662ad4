"""Put the scale and shift of a batch normalization into the weights before it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes import match
from qexport.passes.base import Decision, Outcome, Pass

ROOTS = ("Conv", "ConvTranspose", "Gemm")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNormalization into the Conv, ConvTranspose or Gemm that feeds it.

    ``W' = W s`` and ``b' = (b - mean) s + beta`` with ``s = gamma / sqrt(variance + epsilon)`` per output channel
    (Jacob et al. 2018, section 3.2), computed in double precision. Groups and a missing bias are fine. Weights that
    other nodes share are copied, not edited. Training mode and a product that is read elsewhere are left alone.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Fold every match; the weights, the bias and the statistics have to be constant."""
        decisions = []
        for norm, _ in match.visit(model, "BatchNormalization"):
            root = match.producer(norm.inputs[0], *ROOTS)
            if root is not None:
                reason = _refusal(root, norm) or _fold(root, norm)
                action = "skipped" if reason else "folded"
                decisions.append(Decision(norm.name or "", norm.op_type, action, reason or f"into {root.op_type}"))
        return Outcome(model, any(d.action == "folded" for d in decisions), tuple(decisions))


def _refusal(root: ir.Node, norm: ir.Node) -> str | None:
    if match.consumer(root.outputs[0], "BatchNormalization") is None or root.graph is not norm.graph:
        return match.SHARED
    if norm.attributes.get_int("training_mode", 0) or any(o.uses() or o.is_graph_output() for o in norm.outputs[1:]):
        return "training mode"
    if any(match.constant(value) is None for value in (*root.inputs[1:], *norm.inputs[1:]) if value is not None):
        return "weights or statistics are not constant"
    return None


def _fold(root: ir.Node, norm: ir.Node) -> str | None:
    """Fold; return why not."""
    weight = root.inputs[1]
    gamma, beta, mean, variance = (_double(value) for value in norm.inputs[1:5])
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    old, bias = _double(weight), _bias(root, len(scale))
    axes = _channel_shape(root, old.shape, len(scale))
    if bias is None or axes is None or not np.isfinite(scale).all() or weight is None or weight.dtype is None:
        return "the shapes or the variance do not allow it"
    names = weight.name, root.inputs[2].name if root.inputs[2:] and root.inputs[2] else f"{weight.name}_bias"
    numbers = _scale(old, scale.reshape(axes), root), (bias - mean) * scale + beta
    new = [
        match.add_constant(root, f"{name}_folded", array.astype(weight.dtype.numpy()))
        for name, array in zip(names, numbers, strict=True)
    ]
    attributes = [attribute for name, attribute in root.attributes.items() if name != "beta"]
    fused, name = ir.Node("", root.op_type, [root.inputs[0], *new], attributes), root.name
    match.replace({root, norm}, norm.outputs[0], [fused])
    fused.name = name
    return None


def _double(value: ir.Value | None) -> Array:
    numbers = match.array(value)
    assert numbers is not None
    return numbers.astype(np.float64)


def _bias(root: ir.Node, channels: int) -> Array | None:
    """Return the bias as it is added, one number per output channel; a Gemm's may differ from row to row."""
    if len(root.inputs) < 3 or root.inputs[2] is None:
        return np.zeros(channels)
    bias = _double(root.inputs[2]) * (root.attributes.get_float("beta", 1.0) if root.op_type == "Gemm" else 1.0)
    if bias.ndim > 1 and bias.shape[0] != 1:
        return None
    return np.broadcast_to(bias.reshape(-1), (channels,)) if bias.size in (1, channels) else None


def _channel_shape(root: ir.Node, shape: tuple[int, ...], channels: int) -> tuple[int, ...] | None:
    """Return the shape that lines one number per output channel up with the weight (grouped for ConvTranspose)."""
    if root.op_type == "ConvTranspose":
        group = root.attributes.get_int("group", 1)
        return (group, 1, shape[1], *[1] * (len(shape) - 2)) if group * shape[1] == channels else None
    axis = 0 if root.op_type == "Conv" or root.attributes.get_int("transB", 0) == 1 else 1
    lined = tuple(channels if i == axis else 1 for i in range(len(shape)))
    return lined if shape[axis] == channels else None


def _scale(weight: Array, scale: Array, root: ir.Node) -> Array:
    if root.op_type != "ConvTranspose":
        return weight * scale
    return (weight.reshape(len(scale), -1, *weight.shape[1:]) * scale).reshape(weight.shape)
