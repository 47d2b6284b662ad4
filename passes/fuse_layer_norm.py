"""Find layer normalization that an exporter spelt in small operators, and say it in one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qexport.passes import match
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.normalize import Norm, find_norm, mean_of, take_affine, take_casts

OPSET = 17


@dataclass(frozen=True)
class FuseLayerNorm(Pass):
    """Fuse decomposed layer normalization (Ba et al. 2016) into LayerNormalization.

    1. ``d = x - mean(x)``; ``d / sqrt(mean(d * d) + epsilon)`` over trailing axes, the square as Pow or Mul, the
       division as Div or as Mul by Reciprocal(Sqrt), 1 / Sqrt or Pow(-0.5);
    2. then optionally Cast back to the half precision that ``x`` was cast from;
    3. then optionally ``* gamma`` and ``+ beta`` of exactly the normalized shape, operands in either order.

    What is computed in half precision or double stays: LayerNormalization computes in float32. So does whatever
    has an inner value that is read elsewhere, except that a shared normalized value is fused without its affine part.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Fuse every match; needs opset 17 and known sizes of the normalized axes."""
        decisions = [
            _fuse(norm, opset) for node, opset in match.visit(model, "Div", "Mul") if (norm := _find(node)) is not None
        ]
        return Outcome(model, any(d.action == "fused" for d in decisions), tuple(decisions))


def _find(node: ir.Node) -> Norm | None:
    norm = find_norm(node)
    center = match.producer(norm.x, "Sub") if norm is not None else None
    for x, mean in match.operands(center):
        if norm is not None and mean_of(mean) == (x, norm.axis):
            return replace(norm, x=x, nodes=norm.nodes | {match.maker(norm.x), match.maker(mean)})
    return None


def _fuse(norm: Norm, opset: int) -> Decision:
    if opset < OPSET:
        return match.too_old(match.maker(norm.output), "LayerNormalization", OPSET, opset)
    norm, gamma = take_affine(take_casts(norm), "Mul")
    norm, beta = take_affine(norm, "Add")
    last, reason = match.maker(norm.output), _refusal(norm)
    if reason is not None:
        return Decision(last.name or "", "LayerNormalization", "skipped", reason)
    if gamma is None:
        dtype = norm.dtype if norm.x.dtype is None else norm.x.dtype
        gamma = match.add_constant(last, f"{norm.output.name}_gamma", np.ones(norm.sizes, dtype.numpy()))
    attributes = {"axis": norm.axis, "epsilon": norm.epsilon, "stash_type": 1}
    fused = ir.node("LayerNormalization", [norm.x, gamma, *([beta] if beta else [])], attributes)
    match.replace(norm.nodes, norm.output, [fused])
    return Decision(fused.name or "", "LayerNormalization", "fused", "layer normalization in small operators")


def _refusal(norm: Norm) -> str | None:
    if norm.dtype != ir.DataType.FLOAT:
        return f"computed in {norm.dtype.name.lower()}"
    if not norm.sizes:
        return "the normalized sizes are not known"
    return None if match.closed(norm.nodes, norm.output) else match.SHARED
