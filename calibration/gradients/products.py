"""Gradients of products of matrices, and of attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from qexport.calibration.gradients.tape import Rule, Tape, Value, operand, optional, rank_of, refuse
from qexport.passes.match import dims

HEADS_SECOND = (0, 2, 1, 3)


def _turned(t: Tape, a: Value, rank: int) -> Value:
    """The last two axes swapped."""
    return t.transpose(a, (*range(rank - 2), rank - 1, rank - 2))


def _matmul(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    """``dA = g B^T`` and ``dB = A^T g``, summed over the batch axes along which a factor was repeated."""
    a, b = operand(node, 0), operand(node, 1)
    ranks = rank_of(node, a), rank_of(node, b)
    if ranks[1] == 2 and ranks[0] > 1:  # rows of all batches at once
        flat, rows = (t.op("Flatten", x, attributes={"axis": -1}) for x in (a, g))
        return [t.op("MatMul", g, _turned(t, b, 2)), t.op("Gemm", flat, rows, attributes={"transA": 1})]
    wide_a = a if ranks[0] > 1 else t.op("Unsqueeze", a, t.constant([0]))
    wide_b = b if ranks[1] > 1 else t.op("Unsqueeze", b, t.constant([1]))
    g = g if ranks[1] > 1 else t.op("Unsqueeze", g, t.constant([-1]))
    g = g if ranks[0] > 1 else t.op("Unsqueeze", g, t.constant([-2]))
    one = t.op("MatMul", g, _turned(t, wide_b, max(2, ranks[1])))
    other = t.op("MatMul", _turned(t, wide_a, max(2, ranks[0])), g)
    shape = dims(node.outputs[0]) if min(ranks) > 1 else None
    found = []
    for part, wide, own in ((one, wide_a, a), (other, wide_b, b)):
        whole = None if shape is None else (*shape[:-2], *(dims(own) or ())[-2:])
        summed = t.sum_to(part, whole, wide)
        found.append(summed if wide is own else t.reshape(summed, t.shape(own)))
    return found


def _gemm(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    """``y = alpha A' B' + beta C``, where A' and B' may be transposed."""
    a, b, c = operand(node, 0), operand(node, 1), optional(node, 2)
    turned_a, turned_b = (node.attributes.get_int(name, 0) for name in ("transA", "transB"))
    alpha, beta = (node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))

    def product(one: Value, other: Value, turn_one: int, turn_other: int) -> Value:
        return t.op("Gemm", one, other, attributes={"alpha": alpha, "transA": turn_one, "transB": turn_other})

    left = product(b, g, turned_b, 1) if turned_a else product(g, b, 0, 1 - turned_b)
    right = product(g, a, 1, turned_a) if turned_b else product(a, g, 1 - turned_a, 0)
    scaled = g if beta == 1 else t.mul(g, beta)
    return [left, right, None if c is None else t.sum_to(scaled, dims(node.outputs[0]), c)]


def _einsum(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    """Each factor from the others and the gradient, where every one of its axes is found in them."""
    told = node.attributes.get_string("equation", "").replace(" ", "")
    sides, _, result = told.partition("->")
    terms = sides.split(",")
    if "." in told or "->" not in told or any(len(set(term)) < len(term) for term in (*terms, result)):
        raise refuse(node, f"the equation {told!r} leaves axes out or names them twice")
    found = []
    for index, term in enumerate(terms):
        others = [i for i in range(len(terms)) if i != index]
        if not set(term) <= set(result).union(*(terms[i] for i in others)):
            raise refuse(node, f"the equation {told!r} sums over an axis of one factor")
        equation = f"{','.join([result, *(terms[i] for i in others)])}->{term}"
        found.append(t.op("Einsum", g, *(node.inputs[i] for i in others), attributes={"equation": equation}))
    return found


def _attention(t: Tape, node: ir.Node, g: Value) -> Sequence[Value | None]:
    """Attention without a cache: its probabilities are computed again (Vaswani et al. 2017, equation 1).

    With ``S = scale Q K^T + mask``, ``P = softmax(S)`` and ``Y = P V``: ``dV = P^T dY``, ``dP = dY V^T``,
    ``dS = P (dP - sum(P dP))``, ``dQ = scale dS K``, ``dK = scale dS^T Q``. Rows whose keys are all masked give zero.
    """
    if any(optional(node, index) is not None for index in (4, 5, 6)):
        raise refuse(node, "it reads a cache")
    if node.attributes.get_float("softcap", 0.0):
        raise refuse(node, "its scores are capped")
    plain = [operand(node, index) for index in range(3)]
    heads, groups, size = _heads(node, plain)
    q, k, v = (_split(t, node, x, count) for x, count in zip(plain, (heads, groups, groups), strict=True))
    dy = _split(t, node, g, heads, rank_of(node, plain[0]))
    if heads != groups:
        k, v = (_repeated(t, x, heads // groups, heads) for x in (k, v))
    scale = node.attributes.get_float("scale", 1 / math.sqrt(size))
    scores = t.mul(t.op("MatMul", q, _turned(t, k, 4)), scale)
    p = t.op("Softmax", _masked(t, node, scores, q, k), attributes={"axis": -1})
    p = t.where(t.op("Not", t.op("IsNaN", p)), p)
    dv = t.op("MatMul", _turned(t, p, 4), dy)
    dp = t.mul(p, t.op("MatMul", dy, _turned(t, v, 4)))
    ds = t.sub(dp, t.mul(p, t.sum(dp, [-1])))
    dq = t.mul(t.op("MatMul", ds, k), scale)
    dk = t.mul(t.op("MatMul", _turned(t, ds, 4), q), scale)
    if heads != groups:
        dk, dv = (_gathered(t, x, heads // groups, groups) for x in (dk, dv))
    mask = optional(node, 3)
    found = [_joined(t, x, own) for x, own in zip((dq, dk, dv), plain, strict=True)]
    return [*found, None if mask is None or mask.dtype == ir.DataType.BOOL else t.sum_to(ds, None, mask)]


def _heads(node: ir.Node, plain: Sequence[Value]) -> tuple[int, int, int]:
    """Heads of the queries, of keys and values, and the size of a head."""
    q, k = (dims(x) for x in plain[:2])
    if q is None or k is None:
        raise refuse(node, "the shapes of what it reads are not known", "run cleanup first, which infers shapes")
    if len(q) == 4:
        heads, groups, size = q[1], k[1], q[3]
    else:
        heads, groups = (node.attributes.get_int(f"{name}_num_heads", 0) for name in ("q", "kv"))
        size = q[2] // heads if isinstance(q[2], int) and heads else None
    if not (isinstance(heads, int) and isinstance(groups, int) and isinstance(size, int) and heads and groups):
        raise refuse(node, "the number or size of its heads is not known", "run cleanup first, which infers shapes")
    return heads, groups, size


def _split(t: Tape, node: ir.Node, x: Value, heads: int, rank: int | None = None) -> Value:
    """As [batch, heads, sequence, size]."""
    if (rank or rank_of(node, x)) == 4:
        return x
    return t.transpose(t.reshape(x, [0, 0, heads, -1]), HEADS_SECOND)


def _joined(t: Tape, x: Value, own: Value) -> Value:
    """As the input is laid out."""
    if len(dims(own) or ()) == 4:
        return x
    return t.reshape(t.transpose(x, HEADS_SECOND), t.shape(own))


def _repeated(t: Tape, x: Value, times: int, heads: int) -> Value:
    """Every head of keys or values for all queries that share it."""
    wide = t.op("Expand", t.op("Unsqueeze", x, t.constant([2])), t.constant([1, 1, times, 1, 1]))
    shape = (t.sizes(x, 0, 1), t.constant([heads]), t.sizes(x, 2, 4))
    return t.reshape(wide, t.op("Concat", *shape, attributes={"axis": 0}))


def _gathered(t: Tape, x: Value, times: int, groups: int) -> Value:
    """The sum over the queries that share a head."""
    shape = (t.sizes(x, 0, 1), t.constant([groups, times]), t.sizes(x, 2, 4))
    return t.sum(t.reshape(x, t.op("Concat", *shape, attributes={"axis": 0})), [2], keep=False)


def _masked(t: Tape, node: ir.Node, scores: Value, q: Value, k: Value) -> Value:
    mask, hidden = optional(node, 3), t.number(-math.inf, scores)
    if mask is not None:
        scores = t.where(mask, scores, hidden) if mask.dtype == ir.DataType.BOOL else t.add(scores, mask)
    if node.attributes.get_int("is_causal", 0):
        square = t.op("Concat", t.sizes(q, 2, 3), t.sizes(k, 2, 3), attributes={"axis": 0})
        seen = t.op("Trilu", t.zeros(square, scores, 1.0), attributes={"upper": 0})
        scores = t.where(t.compare("Greater", seen), scores, hidden)
    return scores


RULES: dict[str, Rule] = {"MatMul": _matmul, "Gemm": _gemm, "Einsum": _einsum, "Attention": _attention}
