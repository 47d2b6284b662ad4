"""Spell residual sums so that onnxruntime leaves them alone.

``Add(x, y) -> LayerNormalization`` becomes ``Sum(x, y) -> LayerNormalization``: the same numbers from a kernel of the
same speed. onnxruntime merges the first spelling into SkipLayerNormalization, whose CPU kernel is five times slower
than the two operators (1.31; a fifth of int8 MiniLM's time). A session can switch that off, a file cannot. It merges
only sums that nothing else reads, so others stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.match import constant, consumer, replace, too_old, visit
from qexport.passes.target import find_target

OPSET = 8  # the first whose Sum broadcasts as Add does


@dataclass(frozen=True)
class PlainResiduals(Pass):
    """Keep onnxruntime from merging residual sums with the normalization behind them, which is slower."""

    target: str = "ort-cpu"

    def call(self, model: ir.Model) -> Outcome:
        """Rewrite the main graph, its branches and functions, for targets that gain from it."""
        if not find_target(self.target).plain_residuals:
            return Outcome(model, False)
        found = [(node, opset) for node, opset in visit(model, "Add") if _is_residual(node)]
        decisions = [_spell(node, opset) for node, opset in found]
        return Outcome(model, any(d.action == "fused" for d in decisions), tuple(decisions))


def _is_residual(add: ir.Node) -> bool:
    """Whether two computed values are added for a LayerNormalization alone."""
    norm = consumer(add.outputs[0], "LayerNormalization")
    if norm is None or norm.inputs[0] is not add.outputs[0]:
        return False
    return all(value is not None and constant(value) is None for value in add.inputs)


def _spell(add: ir.Node, opset: int) -> Decision:
    if opset < OPSET:
        return too_old(add, "Sum", OPSET, opset)
    made = ir.node("Sum", list(add.inputs))
    replace([add], add.outputs[0], [made])
    return Decision(made.name or "", "Add", "fused", "a sum that is not merged with the normalization behind it")
