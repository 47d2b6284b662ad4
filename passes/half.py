"""Cast the graph to float16 or bfloat16; inputs and outputs of the model keep their types, caches do not.

1. Initializers and constants read by converted nodes are rounded; a copy is made where a float32 reader remains.
2. Values between converted nodes become 16 bits wide, Q/DQ scales included (``quantize`` picks scales that float16
   holds).
3. Casts stand where a converted node meets a float32 one: model inputs and outputs, kept nodes.
4. A cache, an input that TensorScatter writes into and hands out again, becomes 16 bits wide at both ends.

Kept in float32, with the reason: what was observed on data to come near the end of the format (``extremes``); sums over
many elements, and norms in small operators from the square to the root; what reads a constant beyond the format, unless
it is a mask, which is first made to fit (``stabilize``), or a bound; constants below the normal numbers of the format,
such as the 1e-12 that guards a division, together with all that reads what they guard; numbers that count positions;
and operators that the opset does not define for the format or whose output type does not follow their inputs.

float16 ends at 65504 and keeps 11 bits of every number. bfloat16 ends where float32 does and keeps 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qexport.errors import UsageError
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.casting.cast import Caster
from qexport.passes.casting.digits import positions, squares
from qexport.passes.casting.rules import FORMATS, Format, beyond, near_zero, no_form, overflow, values_of
from qexport.passes.match import check_names
from qexport.passes.numbers.extreme import extreme_of
from qexport.passes.numbers.range import HALF_QUANTIZERS
from qexport.passes.stabilize import soften
from qexport.passes.target import find_target

_SHORT = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_SUMS = ("ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "CumSum")


@dataclass(frozen=True)
class Half(Pass):
    """Cast what is not quantized to 16 bits, where the target computes in them."""

    exact: ClassVar[bool] = False

    target: str = "tensorrt-rtx"
    dtype: Literal["float16", "bfloat16"] = "float16"
    """float16 has more digits, bfloat16 the range of float32."""
    headroom: float = 2.0
    """How often the observed extremes must fit below the largest number; data never shows the worst case."""
    keep_ops: tuple[str, ...] = _SUMS
    """Operator types that stay in float32."""
    keep: tuple[str, ...] = ()
    """Names of nodes that stay in float32."""

    def __post_init__(self) -> None:
        """Check the options."""
        if self.dtype not in FORMATS:
            raise UsageError(f"unknown dtype {self.dtype!r}", hint=f"known: {', '.join(FORMATS)}")
        if not (math.isfinite(self.headroom) and self.headroom >= 1):
            raise UsageError(f"headroom is {self.headroom!r}, expected a number from 1 on")

    def call(self, model: ir.Model) -> Outcome:
        """Convert the main graph; models with control flow and old Q/DQ opsets are left alone with a reason.

        Raises:
            UsageError: The target does not read bfloat16, or no node has a name that is to be kept.
        """
        if self.dtype == "bfloat16":
            find_target(self.target).demand("bfloat16", "option 'dtype' of half")
        check_names(self.keep, model)
        refusal = self._refusal(model)
        if refusal is not None:
            return Outcome(model, False, (Decision("", "graph", "skipped", refusal),))
        if any(value.type is None for node in model.graph for value in node.outputs if value.name):
            ShapeInferencePass(check_type=False, strict_mode=False)(model)
        masks = tuple(decision for decision in soften(model) if decision.action == "softened")
        reasons = self._reasons(model)
        chosen = {node for node, reason in reasons.items() if reason is None}
        chosen |= {node for node in model.graph if node.op_type == "QuantizeLinear" and _reads(node, chosen)}
        kept = tuple(
            Decision(node.name or "", node.op_type, "kept", reason) for node, reason in reasons.items() if reason
        )
        if chosen:
            Caster(model.graph, chosen, FORMATS[self.dtype]).run()
        return Outcome(model, bool(chosen or masks), (*masks, *_unobserved(reasons, self.dtype), *kept))

    def _refusal(self, model: ir.Model) -> str | None:
        if find_target(self.target).rest != "float16":
            return f"target {self.target} computes in float32"
        if any(node.graph is not model.graph for node in model.graph.all_nodes()) or model.functions:
            return "the model has control flow or functions"
        quantized = any(node.op_type == "QuantizeLinear" for node in model.graph)
        if quantized and model.opset_imports.get("", 0) < HALF_QUANTIZERS:
            return f"{self.dtype} Q/DQ needs opset {HALF_QUANTIZERS}"
        return None

    def _reasons(self, model: ir.Model) -> dict[ir.Node, str | None]:
        """Every node that computes in float32, with the reason to leave it there if there is one."""
        form, graph = FORMATS[self.dtype], model.graph
        named: dict[ir.Node, str] = dict.fromkeys(positions(graph, form), "counts positions")
        named |= dict.fromkeys(near_zero(graph, form), f"a constant is too small for {form.name}")
        named |= dict.fromkeys(squares(graph, self.keep_ops), "belongs to a sum of squares")
        named |= beyond(graph, form)
        named |= {node: "sums many elements" for node in graph if node.op_type in self.keep_ops}
        named |= {node: "kept in float32 by name" for node in graph if node.name in self.keep}
        floats = [node for node in graph if _computes_float(node)]
        return {node: self._reason(node, model.opset_imports, form) or named.get(node) for node in floats}

    def _reason(self, node: ir.Node, opsets: Mapping[str, int], form: Format) -> str | None:
        """Why ``node`` cannot leave float32 by itself, if it cannot."""
        if not all(isinstance(value.type, ir.TensorType) for value in values_of(node)):
            return "a value is no tensor, or of unknown type"
        return no_form(node, opsets.get(node.domain, 0), form) or overflow(node, form, self.headroom)


def _unobserved(reasons: Mapping[ir.Node, str | None], dtype: str) -> tuple[Decision, ...]:
    """What to say where the ranges of float16 were never looked at."""
    if dtype != "float16" or not reasons or any(extreme_of(v) is not None for node in reasons for v in values_of(node)):
        return ()
    return (Decision("", "graph", "noted", "ranges were not observed, the guard knows constants only"),)


def _reads(quantizer: ir.Node, chosen: Collection[ir.Node]) -> bool:
    """Whether a quantizer of floats reads what a chosen node makes: a Cast between both would part them in engines."""
    source = quantizer.inputs[0]
    return source is not None and source.dtype == ir.DataType.FLOAT and source.producer() in chosen


def _computes_float(node: ir.Node) -> bool:
    """Whether the node makes float32 values from something that is not just a wider copy of a short one.

    Constants are converted for each reader.
    """
    if node.op_type == "Constant" or not any(value.dtype == ir.DataType.FLOAT for value in node.outputs):
        return False
    source = node.inputs[0] if node.inputs else None
    return not (node.op_type == "Cast" and source is not None and source.dtype in _SHORT)
