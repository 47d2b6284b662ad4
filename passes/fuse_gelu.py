"""Find the Gaussian error linear unit that an exporter spelt in small operators, and say it in one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from qexport.passes import match
from qexport.passes.base import Decision, Outcome, Pass

OPSET = 20
DEPTH = 8
"""How many operators deep an expression may be."""

Poly = dict[tuple[int, int], float]
"""Powers of x and of the inner Erf or Tanh, to coefficient."""

_CUBE = math.sqrt(2 / math.pi)
INNER: Mapping[str, tuple[Poly, str]] = {
    "Erf": ({(1, 0): math.sqrt(0.5)}, "none"),
    "Tanh": ({(1, 0): _CUBE, (3, 0): 0.044715 * _CUBE}, "tanh"),
}
"""What stands inside the function (Hendrycks and Gimpel 2016, section 2), and the operator's name for it."""
OUTER: Poly = {(1, 0): 0.5, (1, 1): 0.5}
"""x / 2 + x f / 2, however it is multiplied out."""


@dataclass(frozen=True)
class FuseGelu(Pass):
    """Fuse decomposed GELU into Gelu: the exact one through Erf, the approximation through Tanh.

    Both are compared as polynomials, so the order, the association and the place of the constants do not matter.
    ``x * sigmoid(1.702 x)`` is another function and stays.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Fuse every match; needs opset 20 (``raise_opset`` gets there)."""
        decisions = [
            _fuse(node, x, opset) for node, opset in match.visit(model, *INNER) if (x := _argument(node)) is not None
        ]
        return Outcome(model, any(d.action == "fused" for d in decisions), tuple(decisions))


def _fuse(node: ir.Node, x: ir.Value, opset: int) -> Decision:
    if opset < OPSET:
        return match.too_old(node, "Gelu", OPSET, opset)
    region = {node}
    output, complete = _outer(node, x, region)
    if not complete or not match.closed(region, output):
        shared = complete or len(set(output.consumers())) + output.is_graph_output() > 1
        return Decision(node.name or "", "Gelu", "skipped", match.SHARED if shared else "not the rest of a GELU")
    fused = ir.node("Gelu", [x], {"approximate": INNER[node.op_type][1]})
    match.replace(region, output, [fused])
    return Decision(fused.name or "", "Gelu", "fused", f"{node.op_type} spelling")


def _argument(node: ir.Node) -> ir.Value | None:
    """Return x where ``node`` computes Erf or Tanh of the polynomial in x that a GELU has there."""
    inside = node.inputs[0]
    candidates, seen = [inside], set[ir.Value | None]()
    for value in candidates:
        parent = match.producer(value, "Add", "Mul", "Div", "Pow")
        if value is not None and value not in seen and len(seen) < 2 * DEPTH:
            seen.add(value)
            if _close(_polynomial(inside, {value: (1, 0)}, set()), INNER[node.op_type][0], value):
                return value
            candidates.extend(parent.inputs if parent is not None else ())
    return None


def _outer(node: ir.Node, x: ir.Value, region: set[ir.Node]) -> tuple[ir.Value, bool]:
    """Walk from the function down to the value that is the GELU of x; ``region`` gets the nodes on the way.

    Returns:
        The last value that was reached and whether it is that one.
    """
    value = node.outputs[0]
    for _ in range(DEPTH):
        user = match.consumer(value, "Add", "Mul", "Div")
        if user is None:
            break
        value = user.outputs[0]
        visited: set[ir.Node] = set()
        if _close(_polynomial(value, {x: (1, 0), node.outputs[0]: (0, 1)}, visited), OUTER, x):
            _polynomial(node.inputs[0], {x: (1, 0)}, visited)
            region |= visited
            return value, match.dims(x) == match.dims(value) or None in (match.dims(x), match.dims(value))
    return value, False


def _close(found: Poly | None, expected: Poly, x: ir.Value) -> bool:
    # Constants are stored in the type of x: 1.4142 in float16 is off by 1e-4.
    tolerance = 1e-3 if x.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) else 2e-6
    return (
        found is not None
        and found.keys() == expected.keys()
        and all(abs(found[key] - number) <= tolerance * number for key, number in expected.items())
    )


def _polynomial(
    value: ir.Value | None, symbols: Mapping[ir.Value, tuple[int, int]], visited: set[ir.Node], depth: int = DEPTH
) -> Poly | None:
    """Return ``value`` as a polynomial in the symbols, or ``None``; ``visited`` gets the nodes that compute it."""
    if value is not None and value in symbols:
        return {symbols[value]: 1.0}
    if (number := match.scalar(value)) is not None:
        return {(0, 0): number}
    node = match.producer(value, "Add", "Mul", "Div", "Pow")
    if node is None or depth == 0:
        return None
    visited.add(node)
    left, right = (_polynomial(given, symbols, visited, depth - 1) for given in node.inputs)
    if left is None or right is None:
        return None
    return _combine(node.op_type, left, right)


def _combine(op: str, left: Poly, right: Poly) -> Poly | None:
    alone = right.get((0, 0), 0.0) if len(right) == 1 else 0.0
    if op == "Add":
        return {key: left.get(key, 0.0) + right.get(key, 0.0) for key in {*left, *right}}
    if op == "Div":
        return {key: number / alone for key, number in left.items()} if alone else None
    if op == "Pow":
        square = _product(left, left) if alone in (2.0, 3.0) else None
        return _product(square, left) if square is not None and alone == 3.0 else square
    return _product(left, right)


def _product(left: Poly, right: Poly) -> Poly:
    total: Poly = defaultdict(float)
    for (i, j), a in left.items():
        for (k, m), b in right.items():
            total[i + k, j + m] += a * b
    return dict(total)
