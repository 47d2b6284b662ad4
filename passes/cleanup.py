"""Fold what is constant and drop what computes nothing, with the libraries' own passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qexport.passes import match
from qexport.passes.base import Decision, Outcome, Pass

ROUNDS = 16
"""Rounds until nothing changes; real models need two or three."""

SMALL = 64
"""Elements of a constant that is stored rather than filled in at run time; amounts of padding are such."""

BOUNDED = ("Compress", "NonZero", "Unique")
"""Operators whose output size is unknown before they run, yet never far above the input's."""

RULES = (
    "mul_by_1",
    "div_by_1",
    "add_0",
    "sub_0",
    "no_op_cast",
    "no_op_expand",
    "no_op_transpose",
    "transpose_transpose",
    "unsqueeze_unsqueeze",
    "squeeze_reshape_1d",
    "collapse_slice",
)
"""onnxscript's rewrite rules that are used."""


@dataclass(frozen=True)
class Cleanup(Pass):
    """Inline functions, infer shapes, fold constants, remove no-ops, duplicates and unused nodes.

    Names and order of the model's inputs and outputs stay. Nothing larger than ``size_limit`` is ever computed, so a
    few bytes that would expand to terabytes stay a few bytes.

    Args:
        size_limit: Largest number of elements that a folded constant may have.
        slim: Also run onnxslim, which knows more patterns. It works on a copy of the whole model in memory, and it is
            kept from models that hold something too large to fold.
    """

    size_limit: int = 1 << 18
    slim: bool = False

    def call(self, model: ir.Model) -> Outcome:
        """Repeat until nothing changes."""
        before = sum(1 for _ in model.graph.all_nodes())
        modified, decisions = _settle(model, self.size_limit), []
        if self.slim:
            reason = _bomb(model, self.size_limit) or _slim(model)
            if reason is None:
                modified = _settle(model, self.size_limit) or True
            else:
                decisions.append(Decision(model.graph.name or "", "Graph", "skipped", reason))
        after = sum(1 for _ in model.graph.all_nodes())
        if after < before:
            decisions.append(Decision(model.graph.name or "", "Graph", "folded", f"{before} nodes to {after}"))
        return Outcome(model, modified, tuple(decisions))


def _settle(model: ir.Model, size_limit: int) -> bool:
    """Run the libraries' passes until the model stays as it is; return whether it changed.

    Their own ``modified`` is not used: two of them undo each other where a model returns one value three times.
    """
    import onnx_ir.passes.common as common

    steps = _steps(size_limit)
    first = state = _state(model)
    named = False
    for _ in range(ROUNDS):
        for step in steps:
            step(model)
        named |= common.NameFixPass()(model).modified
        last, state = state, _state(model)
        if state == last:
            break
    return named or state != first


def _steps(size_limit: int) -> tuple[Callable[[ir.Model], object], ...]:
    """Return one round. Without IdentityEliminationPass and OutputFixPass, which rename inputs and outputs."""
    import onnx_ir.passes.common as common
    from onnxscript import optimizer
    from onnxscript.rewriter import RewritePass
    from onnxscript.rewriter.rules import common as rules

    def foldable(node: ir.Node) -> bool | None:
        if node.op_type == "ConstantOfShape" and _elements(node.outputs) <= SMALL:
            return True  # the library keeps all of them, to keep files small
        return None if node.op_type in BOUNDED or _elements(node.outputs) <= size_limit or not _grows(node) else False

    def fold(model: ir.Model) -> None:
        optimizer.fold_constants_ir(
            model,
            onnx_shape_inference=True,
            input_size_limit=size_limit,
            output_size_limit=size_limit,
            should_fold=foldable,
        )

    return (
        common.InlinePass(),
        common.ShapeInferencePass(check_type=False, strict_mode=False),
        _fold_shapes,
        fold,
        # The rules that hold for every opset and round nothing; others in the library's default set do not.
        RewritePass([rule for name in RULES for rule in getattr(rules, f"{name}_rule").commute()]),
        common.RemoveUnusedNodesPass(),
        _forget_removed,
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]  # the library leaves its constructor so
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        _lay_out,
        common.DeduplicateHashedInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
    )


def _state(model: ir.Model) -> list[object]:
    """Return everything about a model but the names of its nodes, to compare."""

    def facts(value: ir.Value | None) -> object:
        return value and (value.name, match.dims(value), value.dtype, value.const_value)

    state: list[object] = [*model.opset_imports.items(), *model.functions]
    for graph in model.graphs():
        state.extend(facts(value) for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()))
    for node in model.graph.all_nodes():
        state.append((node.domain, node.op_type, [value and value.name for value in node.inputs]))
        state.append(([facts(value) for value in node.outputs], [(a.name, a.value) for a in node.attributes.values()]))
    return state


def _forget_removed(model: ir.Model) -> None:
    """Take back what nodes inside of removed ones read: their values would seem to be needed for ever."""
    nodes = set(model.graph.all_nodes())
    values = [value for node in nodes for value in node.outputs]
    for graph in model.graphs():
        values += [*graph.inputs, *graph.initializers.values()]
    for value in values:
        for user, index in tuple(value.uses()):
            if user not in nodes:
                user.replace_input_with(index, None)


def _lay_out(model: ir.Model) -> None:
    """Copy folded constants that are views with other strides; hashing them is refused."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.Tensor) and not tensor.numpy().flags.c_contiguous:
            value.const_value = ir.tensor(np.ascontiguousarray(tensor.numpy()), tensor.dtype, name=tensor.name)


def _fold_shapes(model: ir.Model) -> None:
    """Turn a Slice of a Shape into a constant where the sizes it picks are known."""
    for node, _ in match.visit(model, "Slice"):
        shape = match.producer(node.inputs[0], "Shape")
        bounds = [match.scalar(value) for value in node.inputs[1:]]
        known = match.dims(shape.inputs[0]) if shape is not None and not shape.attributes else None
        start, stop = bounds[:2] if len(bounds) > 1 else (None, None)
        if known is None or start is None or stop is None or bounds[2:] not in ([], [0.0], [0.0, 1.0]):
            continue
        picked = [size for size in known[int(start) : int(stop)] if isinstance(size, int)]
        if len(picked) == len(known[int(start) : int(stop)]):
            value = match.add_constant(node, f"{node.outputs[0].name}_sizes", np.array(picked, np.int64))
            match.replace({node}, node.outputs[0], [ir.node("Identity", [value])])


def _elements(values: Sequence[ir.Value | None]) -> float:
    """Return the size of the largest value; infinite where one is not known."""
    shapes = [match.dims(value) or (None,) if value is not None and value.shape != () else () for value in values]
    return max((math.prod(math.inf if not isinstance(n, int) else n for n in shape) for shape in shapes), default=0)


def _grows(node: ir.Node) -> bool:
    return _elements(node.outputs) > _elements(node.inputs)


def _bomb(model: ir.Model, size_limit: int) -> str | None:
    """Return why onnxslim must not see the model: it computes a constant before it looks at its size."""
    constant = set[ir.Value]()
    for node in model.graph.all_nodes():
        if all(value is None or value in constant or match.constant(value) is not None for value in node.inputs):
            constant.update(node.outputs)
            if node.inputs and node.op_type not in BOUNDED and _elements(node.outputs) > size_limit:
                return "a constant is too large to compute"
    return None


def _slim(model: ir.Model) -> str | None:
    """Adopt what onnxslim makes of the model if that has fewer nodes; return why not."""
    import onnxslim

    slimmed = ir.from_proto(onnxslim.slim(ir.to_proto(model.clone())))
    ends = [[value.name for value in (*m.graph.inputs, *m.graph.outputs)] for m in (model, slimmed)]
    if ends[0] != ends[1] or len(model.graph.inputs) != len(slimmed.graph.inputs):
        return "onnxslim changed the inputs or outputs"
    if sum(1 for _ in slimmed.graph.all_nodes()) >= sum(1 for _ in model.graph.all_nodes()):
        return "onnxslim found nothing"
    model.graph = slimmed.graph
    return None
