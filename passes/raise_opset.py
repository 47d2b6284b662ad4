"""Bring a model to a newer operator set, so that newer operators can be used in it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qexport.errors import UsageError
from qexport.passes import match
from qexport.passes.base import Decision, Outcome, Pass

HIGHEST = 25
"""Newest opset that the converters know."""

UNSURE = {"GroupNormalization": 21}
"""Operators that the converter may leave as they were although they mean something else from that opset on."""


@dataclass(frozen=True)
class RaiseOpset(Pass):
    """Raise the default opset, rewriting operators whose meaning changed; never lower it.

    From opset 18 on the conversion is onnxscript's, below it onnx's own. Functions are inlined, shapes are inferred
    anew. Run it before calibration: the notes on values do not survive a conversion from below opset 18.

    Args:
        opset: The opset to reach; the target's or lower.
    """

    opset: int = 23

    def call(self, model: ir.Model) -> Outcome:
        """Convert a clone and adopt it when that worked, so a refusal leaves the model as it was.

        Raises:
            UsageError: No converter reaches this opset.
        """
        if not 1 <= self.opset <= HIGHEST:
            raise UsageError(f"cannot raise to opset {self.opset}", hint=f"the converters know opsets up to {HIGHEST}")
        before = model.opset_imports.get("", 1)
        if before >= self.opset:
            return Outcome(model, False)
        where = model.graph.name or ""
        reason = _refusal(model, before, self.opset) or _convert(model, self.opset)
        if reason is not None:
            return Outcome(model, False, (Decision(where, "Graph", "skipped", reason),))
        raised = f"opset {before} to {self.opset}"
        return Outcome(model, True, (Decision(where, "Graph", "raised", raised),))


def _refusal(model: ir.Model, before: int, after: int) -> str | None:
    present = {node.op_type for node in model.graph.all_nodes() if node.domain == ""}
    changed = [op for op, since in UNSURE.items() if op in present and before < since <= after]
    return f"{changed[0]} means something else from opset {UNSURE[changed[0]]} on" if changed else None


def _convert(model: ir.Model, opset: int) -> str | None:
    """Convert in place; return why not, leaving the model alone."""
    import onnx
    from onnx_ir.passes.common import ShapeInferencePass
    from onnxscript.version_converter import ConvertVersionPass

    work = model.clone()
    try:
        ConvertVersionPass(opset, fallback=True)(work)
    except (RuntimeError, ValueError) as error:
        return f"the converter refused: {str(error).splitlines()[0][:80]}"
    if work.opset_imports.get("") != opset or _signature(work) != _signature(model):
        return "the converter could not carry every operator over"
    _forget(work)
    ShapeInferencePass(check_type=False, strict_mode=False)(work)
    model.graph = work.graph
    model.functions.clear()
    model.functions.update(work.functions)
    needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    model.ir_version = max(model.ir_version, needed)
    return None


def _forget(model: ir.Model) -> None:
    """Forget sizes with a made-up name: inferring them again, with values followed, tells which are equal."""
    for node in model.graph.all_nodes():
        for value in node.outputs:
            named = match.dims(value) or ()
            if not value.is_graph_output() and any(str(size).startswith("unk__") for size in named):
                value.shape = ir.Shape([None if str(size).startswith("unk__") else size for size in named])


def _signature(model: ir.Model) -> tuple[list[str | None], list[str | None]]:
    return [value.name for value in model.graph.inputs], [value.name for value in model.graph.outputs]
