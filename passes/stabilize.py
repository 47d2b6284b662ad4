"""Make masks fit for half precision: huge constants that hide positions from a Softmax become 16384 of the same sign.

``exp(-16384 + s - max)`` is zero like ``exp(-1e9 + s - max)``, in float32 and in float16, for scores ``s`` within 8100
of zero; and three such masks and a score added up still lie within 65504, where float16 ends. (-65504 itself becomes
infinite with any score below -15.) So a row with a position that is not hidden gets the same weights. A row whose every
position is hidden means nothing; it stays finite, but becomes the Softmax of its bare scores where 1e9 swallowed them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.match import add_constant, constant, sweep
from qexport.passes.numbers.extreme import EXTREME_KEY

HIDDEN = 2.0**14
_SOFTMAX = frozenset({"Softmax"})
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_WHOLE = (ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8, ir.DataType.INT8)
_FILLS = "ConstantOfShape"
_MOVES = dict.fromkeys(
    ("Cast", "Expand", "Gather", "Identity", "Neg", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Trilu"), (0,)
) | {"Unsqueeze": (0,)}
_CARRIES = _MOVES | {
    "Add": (0, 1),
    "Concat": range(2**31),
    "Max": (0, 1),
    "Min": (0, 1),
    "ScatterElements": (0, 2),
    "ScatterND": (0, 2),
    "Sub": (0, 1),
    "Where": (1, 2),
}
"""Behind these inputs of an operator a huge number is still huge, and the others are what they were."""


class Use(NamedTuple):
    """Where a constant is read, or the node that fills its output with one."""

    node: ir.Node
    place: int | None


@dataclass(frozen=True)
class Stabilize(Pass):
    """Replace masks of -1e9 or the lowest float32 by ones that half precision can add to a score."""

    def call(self, model: ir.Model) -> Outcome:
        """Rewrite the constants that end in a Softmax and nowhere else; what else they reach is a refusal."""
        decisions = soften(model)
        return Outcome(model, any(decision.action == "softened" for decision in decisions), decisions)


def soften(model: ir.Model) -> tuple[Decision, ...]:
    """Rewrite every mask, and say which. A constant with other readers is copied for those that hide by it."""
    uses, known = list(_uses(model)), _Indicators()
    ends = _follow(model, uses, known)
    found = {use: _endings(use, ends, known) for use in uses}
    masks = [use for use, endings in found.items() if endings == _SOFTMAX]
    decisions = [Decision(use.node.name or "", use.node.op_type, *_verdict(ends)) for use, ends in found.items()]
    _rewrite(masks)
    for value in ends if masks else ():
        value.meta.pop(EXTREME_KEY, None)  # it was observed with the old mask
    return tuple(decision for decision in decisions if decision.reason)


def _verdict(endings: frozenset[str]) -> tuple[str, str]:
    if not endings & _SOFTMAX:  # not a mask
        return "skipped", ""
    others = sorted(endings - _SOFTMAX)
    return (
        ("skipped", f"a mask reaches {others[0]} as well") if others else ("softened", "a mask beyond half precision")
    )


def _uses(model: ir.Model) -> Iterator[Use]:
    """Where huge constants enter the graphs."""
    huge: dict[ir.Value, bool] = {}
    for node in model.graph.all_nodes():
        if node.op_type == _FILLS and _is_huge(node.attributes.get_tensor("value", None)):
            yield Use(node, None)
        for index, value in enumerate(node.inputs):
            if value is not None and huge.setdefault(value, _is_huge(constant(value))):
                yield Use(node, index)


def _is_huge(tensor: ir.TensorProtocol | None) -> bool:
    """Whether some elements are finite and too large for a mask; infinity is the same in every format."""
    if tensor is None or tensor.dtype not in _FLOATS:
        return False
    sizes = np.abs(tensor.numpy())
    return bool(((sizes > HIDDEN) & (sizes < np.inf)).any())


def _follow(model: ir.Model, uses: list[Use], known: _Indicators) -> dict[ir.Value, frozenset[str]]:
    """The values that hold huge numbers, each with what they end in: operators that do not just carry them on."""
    reached, todo = set[ir.Value](), [*uses]
    while todo:
        value = _carried(todo.pop(), known)
        if value is not None and value not in reached:
            reached.add(value)
            todo.extend(Use(*use) for use in value.uses())
    ends: dict[ir.Value, frozenset[str]] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph, reverse=True) if reached else ():
        for value in reached.intersection(node.outputs):
            behind = (_endings(Use(*use), ends, known) for use in value.uses())
            ends[value] = frozenset({"an output"} if value.is_graph_output() else ()).union(*behind)
    return ends


def _endings(use: Use, ends: dict[ir.Value, frozenset[str]], known: _Indicators) -> frozenset[str]:
    """What a huge number ends in that enters by ``use``."""
    value = _carried(use, known)
    if value is not None:
        return ends[value]
    return _SOFTMAX if use.node.op_type == "Attention" and use.place == 3 else frozenset({use.node.op_type})


def _carried(use: Use, known: _Indicators) -> ir.Value | None:
    """The value that is still huge behind ``use``, if one is."""
    node, index = use
    hides = node.op_type == "Mul" and index is not None and known.holds(node.inputs[1 - index])
    return node.outputs[0] if index is None or hides or index in _CARRIES.get(node.op_type, ()) else None


class _Indicators:
    """Which values say 0 or 1: made of integers or truth values, or taken from 1, by nothing that is learned."""

    def __init__(self) -> None:
        self._known: dict[ir.Value | None, bool] = {None: False}

    def holds(self, value: ir.Value | None) -> bool:
        """Whether ``value`` is one; what it is made of is looked at once."""
        todo = [value]
        while todo:
            found = _indicates(todo[-1]) if todo[-1] not in self._known else self._known[todo[-1]]
            missing = [] if isinstance(found, bool) else [v for v in found if v not in self._known]
            if not missing:
                made_of = [found] if isinstance(found, bool) else map(self._known.__getitem__, found)
                self._known[todo.pop()] = all(made_of)
            todo.extend(missing)
        return self._known[value]


def _indicates(value: ir.Value | None) -> bool | list[ir.Value | None]:
    """Whether ``value`` says 0 or 1, or the values that have to do so for it."""
    if value is None or value.dtype in _WHOLE:
        return value is not None
    if constant(value) is not None:
        return _is_unit(value)
    node = value.producer()
    if node is None:
        return False
    if node.op_type == "Sub" and any(map(_is_unit, node.inputs)) and any(v and v.is_graph_input() for v in node.inputs):
        return True
    read = range(2) if node.op_type == "Mul" else _CARRIES.get(node.op_type, ())
    return [v for index, v in enumerate(node.inputs) if index in read] if read else False


def _is_unit(value: ir.Value | None) -> bool:
    tensor = constant(value)
    return tensor is not None and bool(np.isin(tensor.numpy(), (-1, 0, 1)).all())


def _rewrite(masks: list[Use]) -> None:
    made: dict[tuple[ir.Value, object], ir.Value] = {}
    for node, place in masks:
        if place is None:
            filling = node.attributes.get_tensor("value", None)
            if filling is not None:
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(_softened(filling.numpy())))
            continue
        value = node.inputs[place]
        tensor = constant(value)
        if value is None or tensor is None:
            continue
        if (value, node.graph) not in made:
            made[value, node.graph] = add_constant(node, f"{value.name}/softened", _softened(tensor.numpy()))
        node.replace_input_with(place, made[value, node.graph])
    sweep([value for value, _ in made])


def _softened(numbers: NDArray[Any]) -> NDArray[Any]:
    huge = (np.abs(numbers) > HIDDEN) & (np.abs(numbers) < np.inf)
    return np.asarray(np.where(huge, np.sign(numbers) * numbers.dtype.type(HIDDEN), numbers), numbers.dtype)
