"""Find root-mean-square normalization that an exporter spelt in small operators, and say it in one."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qexport.passes import match
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.normalize import Norm, find_norm, mean_of, take_affine, take_casts

OPSET = 23


@dataclass(frozen=True)
class FuseRMSNorm(Pass):
    """Fuse decomposed root-mean-square normalization (Zhang and Sennrich 2019) into RMSNormalization.

    1. ``x / sqrt(mean(x * x) + epsilon)`` over trailing axes, the square as Pow or Mul, the division as Div or as
       Mul by Reciprocal(Sqrt), 1 / Sqrt or Pow(-0.5);
    2. then optionally Cast back to the half precision that ``x`` was cast from;
    3. then ``* gamma`` of exactly the normalized shape, operands in either order.

    Without gamma it is left alone, and so is the same arithmetic on ``x - mean(x)``, which is layer normalization.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Fuse every match; needs opset 23 (``raise_opset`` gets there) and known sizes of the normalized axes."""
        decisions = [
            _fuse(norm, opset)
            for node, opset in match.visit(model, "Div", "Mul")
            if (norm := find_norm(node)) is not None and not _is_centered(norm)
        ]
        return Outcome(model, any(d.action == "fused" for d in decisions), tuple(decisions))


def _is_centered(norm: Norm) -> bool:
    return any(mean_of(mean) == (x, norm.axis) for x, mean in match.operands(match.producer(norm.x, "Sub")))


def _fuse(norm: Norm, opset: int) -> Decision:
    if opset < OPSET:
        return match.too_old(match.maker(norm.output), "RMSNormalization", OPSET, opset)
    scaled, gamma = take_affine(take_casts(norm), "Mul")
    name = match.maker(scaled.output).name or ""
    reason = _refusal(scaled, gamma)
    if reason is not None or gamma is None:
        return Decision(name, "RMSNormalization", "skipped", reason or "")
    attributes = {"axis": norm.axis, "epsilon": norm.epsilon, "stash_type": 1}
    match.replace(scaled.nodes, scaled.output, [ir.node("RMSNormalization", [scaled.x, gamma], attributes)])
    return Decision(name, "RMSNormalization", "fused", "root-mean-square normalization in small operators")


def _refusal(norm: Norm, gamma: ir.Value | None) -> str | None:
    if norm.dtype != ir.DataType.FLOAT:
        return f"computed in {norm.dtype.name.lower()}"
    if gamma is None:
        return "no scale of the normalized shape follows"
    return None if match.closed(norm.nodes, norm.output) else match.SHARED
