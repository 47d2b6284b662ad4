"""Where 16 bits lose what matters though everything fits: sums of squares, and numbers that count positions."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from qexport.passes.casting.rules import MOVES, Format, is_float
from qexport.passes.match import constant, scalar
from qexport.passes.numbers.extreme import extreme_of

_WHOLE = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.UINT64, ir.DataType.UINT32, ir.DataType.INT16)
_ARITHMETIC = frozenset(
    [
        *("Abs", "Add", "Cast", "Clip", "Div", "Exp", "Log", "Max", "Min", "Mod", "Mul", "Neg", "Pow", "Reciprocal"),
        *("Sqrt", "Sub"),
    ]
)
_ROOTS = ("Sqrt", "Pow")
_COMPUTE = MOVES | _ARITHMETIC | frozenset(["Ceil", "Concat", "Einsum", "Floor", "Gather", "MatMul", "Round", "Where"])
"""What computes numbers for positions from positions."""
_PRECISE = frozenset(["Ceil", "Cos", "Floor", "Mod", "Round", "Sin", "Tan"])
"""What tells a number from one that is larger by a little."""
_COUNTERS = ("Range", "CumSum")


def squares(graph: ir.Graph, sums: Collection[str]) -> set[ir.Node]:
    """The nodes of norms in small operators: what squares for one of ``sums``, and what follows up to the root.

    Squares reach 65504 at 256, and so does their mean; behind the root everything is as large as it was.
    """
    found, region = set[ir.Node](), set[ir.Value]()
    for node in graph:
        if _is_square(node) and any(user.op_type in sums for user in node.outputs[0].consumers()):
            found.add(node)
            region.update(node.outputs)
        elif node.op_type in sums and (node.inputs[0] in region or node.op_type == "ReduceSumSquare"):
            region.update(node.outputs)
        elif node.op_type in _ARITHMETIC and _inside(node, region):
            found.add(node)
            region.update(() if node.op_type in _ROOTS else node.outputs)
    return found


def _is_square(node: ir.Node) -> bool:
    if node.op_type == "Pow":
        exponent = scalar(node.inputs[1])
        return exponent is not None and exponent > 1
    return node.op_type == "Mul" and node.inputs[0] is node.inputs[1]


def _inside(node: ir.Node, region: set[ir.Value]) -> bool:
    """Whether the node reads the region, and constants at most beside it."""
    read = [value for value in node.inputs if value is not None]
    return any(value in region for value in read) and all(v in region or constant(v) is not None for v in read)


def positions(graph: ir.Graph, form: Format) -> set[ir.Node]:
    """The nodes that compute with whole numbers beyond those that ``form`` holds, or with fine steps of any.

    1. Positions (from Range or CumSum) and integers that were observed to be large, and all that is computed from
       them and constants alone: the angles of rotary embeddings, logarithms of distances.
    2. What is computed from any integers and constants alone and ends in a sine, a rounding or a cast to integers.
    """
    counts = dict[ir.Value, bool]()  # made from whole numbers and constants -> whether those are beyond the format
    found = set[ir.Node]()
    for node in graph:
        floats = [value for value in node.inputs if is_float(value)]
        known = [counts[value] for value in floats if value in counts]
        only = len(known) > 0 and all(value in counts or constant(value) is not None for value in floats)
        if _is_root(node):
            _note(node, counts, _counts_positions(node) or _is_large(node.outputs[0], form))
        elif only and node.op_type in _COMPUTE | _PRECISE:
            _note(node, counts, any(known))
        if any(counts.get(value, False) for value in node.outputs) or (
            any(known) and only and node.op_type in _PRECISE
        ):
            found.add(node)
        if only and (node.op_type in _PRECISE or _becomes_whole(node)):
            found.add(node)
            found.update(_behind(floats, counts))
    return found


def _note(node: ir.Node, counts: dict[ir.Value, bool], large: bool) -> None:
    if node.op_type not in ("Sin", "Cos", "Tan"):  # these end between -1 and 1
        counts.update((value, large) for value in node.outputs if is_float(value))


def _is_root(node: ir.Node) -> bool:
    """Whether the node makes floats from whole numbers."""
    source = node.inputs[0] if node.inputs else None
    if source is None or not is_float(node.outputs[0]):
        return False
    return node.op_type == "Range" or (node.op_type == "Cast" and source.dtype in _WHOLE)


def _becomes_whole(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.outputs[0].dtype in _WHOLE


def _is_large(value: ir.Value, form: Format) -> bool:
    peak = extreme_of(value)
    return peak is not None and peak > form.whole


def _counts_positions(node: ir.Node) -> bool:
    """Whether the integers of ``node`` come from a counter."""
    return any(above.op_type in _COUNTERS for above in (node, *_above(node.inputs)))


def _above(values: Collection[ir.Value | None]) -> Iterator[ir.Node]:
    """The nodes above ``values``, through whole numbers."""
    todo, seen = list(values), set[ir.Node]()
    while todo:
        value = todo.pop()
        node = None if value is None else value.producer()
        if value is not None and value.dtype in _WHOLE and node is not None and node not in seen:
            seen.add(node)
            todo.extend(node.inputs if node.op_type not in ("Shape", "Size") else ())
            yield node


def _behind(values: Collection[ir.Value | None], counts: dict[ir.Value, bool]) -> Iterator[ir.Node]:
    """The nodes that made ``values`` from whole numbers."""
    todo, seen = list(values), set[ir.Node]()
    while todo:
        value = todo.pop()
        node = None if value is None else value.producer()
        if value is not None and value in counts and node is not None and node not in seen:
            seen.add(node)
            todo.extend(node.inputs)
            yield node
