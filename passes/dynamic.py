"""Quantize weights beforehand and activations at every call: no calibration data, and no value is ever clipped.

1. ``MatMul`` and ``Gemm`` with a constant weight become integer products (``per_call`` shows the nodes); weights are
   int8, symmetric per output channel.
2. Convolutions stay in float: onnxruntime 1.31 computes ConvInteger three to ten times more slowly than Conv.
3. Embedding tables and biases stay float.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.match import check_names
from qexport.passes.placement import Site, plan
from qexport.passes.quantize import KEPT
from qexport.passes.target import find_target
from qexport.passes.writing.per_call import NEEDS, Granularity, PerCall, unfit
from qexport.passes.writing.quantized import quantized_nodes


@dataclass(frozen=True)
class Dynamic(Pass):
    """Quantize weights to int8 beforehand and activations at every call."""

    exact: ClassVar[bool] = False
    quantizes: ClassVar[bool] = True

    target: str = "ort-cpu"
    granularity: Granularity = "tensor"
    """tensor: one scale for a whole activation, one kernel. token: one for each position, closer and slower."""
    keep: tuple[str, ...] = ()
    """Names of nodes that stay in float."""

    def call(self, model: ir.Model) -> Outcome:
        """Replace the products; a quantized model, or an opset too old, is left alone with a reason.

        A target without ranges per call, or a name in ``keep`` that no node has, is a ``UsageError``.
        """
        target = find_target(self.target)
        target.demand("dynamic", "pass dynamic")
        refusal = refuse(model, NEEDS[self.granularity])
        if refusal is not None:
            return Outcome(model, False, (Decision("", "graph", "skipped", refusal),))
        check_names(self.keep, model)
        found = plan(model, target)
        chosen, refused = split(found.roots, self.keep)
        editor = PerCall(model.graph, target, self.granularity)
        for site in chosen:
            editor.replace(site)
        done = [decision(site, "quantized", f"ranges per {self.granularity}, at every call") for site in chosen]
        return Outcome(model, bool(done), (*done, *found.refused, *refused))


def refuse(model: ir.Model, need: int) -> str | None:
    """Why the whole model is left alone, if it is."""
    if quantized_nodes(model):
        return "already quantized"
    opset = model.opset_imports.get("", 1)
    return f"needs opset {need}, model has {opset}" if opset < need else None


def split(sites: Iterable[Site], keep: tuple[str, ...]) -> tuple[list[Site], list[Decision]]:
    """The sites whose activations can be quantized at every call, and why the others are not."""
    reasons = [(site, KEPT if site.node.name in keep else unfit(site)) for site in sites]
    chosen = [site for site, reason in reasons if reason is None]
    return chosen, [decision(site, "skipped", reason) for site, reason in reasons if reason is not None]


def decision(site: Site, action: str, reason: str) -> Decision:
    """What was done with a site, and why."""
    return Decision(site.node.name or "", site.node.op_type, action, reason)
