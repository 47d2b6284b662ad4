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
    if norm.attributes.get_int("training_mode", 0) or len([o for o in norm.outputs if o.uses()]) > len(
        norm.outputs[:1]
    ):
        return "training mode"
    if any(match.constant(value) is None for value in (*root.inputs[1:], *norm.inputs[1:]) if value is not None):
        return "weights or statistics are not constant"
    return None


def _fold(root: ir.Node, norm: ir.Node) -> str | None:
    """Fold; return why not."""
    weight, gamma = (match.array(value) for value in (root.inputs[1], norm.inputs[1]))
    beta, mean, variance = (_double(value) for value in norm.inputs[2:5])
    assert weight is not None
    assert gamma is not None
    scale = gamma.astype(np.float64) / np.sqrt(np.maximum(variance + norm.attributes.get_float("epsilon", 1e-5), 0))
    bias = _bias(root, len(scale))
    axes = _channel_shape(root, weight.shape, len(scale))
    if bias is None or axes is None or not np.isfinite(scale).all():
        return "the shapes or the variance do not allow it"
    scaled = _scale(weight.astype(np.float64), scale.reshape(axes), root)
    shifted = (bias - mean) * scale + beta
    names = root.inputs[1].name, root.inputs[2].name if _has_bias(root) else f"{root.inputs[1].name}_bias"  # type: ignore[union-attr]
    new = [
        match.add_constant(root, f"{name}_folded", numbers.astype(weight.dtype))
        for name, numbers in zip(names, (scaled, shifted), strict=True)
    ]
    attributes = {key: value for key, value in root.attributes.items() if key != "beta"}
    fused = ir.Node("", root.op_type, [root.inputs[0], *new], attributes.values())
    name = root.name
    match.replace({root, norm}, norm.outputs[0], [fused])
    fused.name = name
    return None


def _double(value: ir.Value | None) -> Array:
    numbers = match.array(value)
    assert numbers is not None
    return numbers.astype(np.float64)


def _has_bias(root: ir.Node) -> bool:
    return len(root.inputs) > 2 and root.inputs[2] is not None


def _bias(root: ir.Node, channels: int) -> Array | None:
    """Return the bias as it is added, one number per output channel; a Gemm's may differ from row to row."""
    if not _has_bias(root):
        return np.zeros(channels)
    bias = _double(root.inputs[2]) * (root.attributes.get_float("beta", 1.0) if root.op_type == "Gemm" else 1.0)
    if bias.ndim > 1 and bias.shape[0] != 1:
        return None
    return np.broadcast_to(bias.reshape(-1), (channels,))


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
