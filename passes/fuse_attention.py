"""Find scaled dot-product attention that an exporter spelt in small operators, and say it in one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import onnx_ir as ir

from qexport.passes import match
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.match import Dims
from qexport.passes.target import find_target

OPSET = 23
HEADS_SECOND = (0, 2, 1, 3)
"""The permutation between [batch, sequence, heads, size] and [batch, heads, sequence, size]; its own inverse."""

Known = dict[tuple[ir.Value, Dims], ir.Value]
"""Masks that were expanded already, by mask and sizes."""


@dataclass
class Found:
    """One attention, as it is matched.

    Attributes:
        q: Queries [batch, heads, sequence, size].
        k: Keys, laid out as ``k_perm`` says.
        k_perm: The permutation that brings ``k`` to [batch, heads, sequence, size], or empty.
        v: Values [batch, heads, sequence, size].
        mask: What is added to the scaled scores.
        scale: What the scores are multiplied with in all.
        output: The last value.
        nodes: The nodes that the fused one stands for.
    """

    q: ir.Value
    k: ir.Value
    k_perm: tuple[int, ...]
    v: ir.Value
    mask: ir.Value | None
    scale: float
    output: ir.Value
    nodes: set[ir.Node] = field(default_factory=set)


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Fuse decomposed attention (Vaswani et al. 2017, equation 1) into Attention.

    1. MatMul of q and transposed k, scaled by constants before (on q, on k) or after;
    2. optionally plus a float mask; Softmax over the last axis;
    3. optionally zero where Softmax gave NaN, which Attention does by itself;
    4. MatMul with v.

    Where q, k, v come from and the result goes to [batch, sequence, heads * size] by Reshape and Transpose, those
    disappear too. A mask that leaves the query axis to broadcasting is expanded, because onnxruntime asks for it.
    Attention gives a row of zeros where every key is masked by -inf or the lowest float; Softmax gives NaN or the mean.
    """

    target: str = "ort-cpu"

    def call(self, model: ir.Model) -> Outcome:
        """Fuse every match, for targets that gain from the operator.

        Needs opset 23 (``raise_opset`` gets there) and inferred shapes (``cleanup`` does it).
        """
        if not find_target(self.target).attention:
            return Outcome(model, False)
        known: Known = {}
        decisions = [
            _fuse(found, opset, known)
            for node, opset in match.visit(model, "Softmax")
            if (found := _find(node)) is not None
        ]
        return Outcome(model, any(d.action == "fused" for d in decisions), tuple(decisions))


def _find(softmax: ir.Node) -> Found | None:
    """Match around a Softmax; ``None`` where this is no attention at all."""
    last = _weighted(softmax)
    if last is None or softmax.inputs[0] is None or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    output, nodes = last
    v = match.maker(output).inputs[1]
    for scores, mask, add in _unmasked(softmax.inputs[0]):
        scores, scale, scaled = _unscaled(scores)
        product = match.producer(scores, "MatMul")
        if product is None or product.inputs[0] is None or product.inputs[1] is None or v is None:
            continue
        q, q_scale, _ = _unscaled(product.inputs[0])
        k, k_scale, _ = _unscaled(product.inputs[1])
        keys = _untransposed(k)
        if keys is not None:
            k, more, _ = _unscaled(keys[0])
            total = scale * q_scale * k_scale * more
            return Found(q, k, keys[1], v, mask, total, output, {*nodes, *add, *scaled, product, softmax})
    return None


def _weighted(softmax: ir.Node) -> tuple[ir.Value, list[ir.Node]] | None:
    """Follow the weights to their product with v; return it and the nodes in between."""
    weights, nodes = softmax.outputs[0], []
    guards = [match.producer(node.outputs[0], "Where") for node in weights.consumers()]
    guard = next((node for node in guards if node is not None), None)
    test = match.producer(guard.inputs[0], "IsNaN") if guard is not None else None
    if guard is not None and test is not None and test.inputs[0] is weights and guard.inputs[2] is weights:
        if match.scalar(guard.inputs[1]) != 0.0:
            return None
        weights, nodes = guard.outputs[0], [guard, test]
    users = [node for node in weights.consumers() if match.producer(node.outputs[0], "MatMul")]
    if len(users) != 1 or users[0].inputs[1] is weights:
        return None
    return users[0].outputs[0], [*nodes, users[0]]


def _unmasked(scores: ir.Value) -> list[tuple[ir.Value, ir.Value | None, list[ir.Node]]]:
    add = match.producer(scores, "Add")
    return [*((left, right, [match.maker(scores)]) for left, right in match.operands(add)), (scores, None, [])]


def _unscaled(value: ir.Value) -> tuple[ir.Value, float, list[ir.Node]]:
    """Take off one multiplication or division by a constant."""
    node = match.producer(value, "Mul", "Div")
    for other, factor in match.operands(node):
        number = match.scalar(factor)
        if number and node is not None:
            return other, number if node.op_type == "Mul" else 1 / number, [node]
    return value, 1.0, []


def _untransposed(keys: ir.Value) -> tuple[ir.Value, tuple[int, ...]] | None:
    """Return what the transposed keys are made of, and how to bring that to [batch, heads, sequence, size]."""
    node = match.producer(keys, "Transpose", "Reshape")
    if node is None or node.inputs[0] is None:
        return None
    if node.op_type == "Transpose":
        layouts: dict[tuple[int, ...], tuple[int, ...]] = {(0, 1, 3, 2): (), (0, 2, 3, 1): HEADS_SECOND}
        layout = layouts.get(match.perm(node))
        return None if layout is None else (node.inputs[0], layout)
    # torch writes Reshape to three axes, Transpose of the last two, Reshape back to four.
    swap = match.producer(node.inputs[0], "Transpose")
    flat = match.producer(swap.inputs[0], "Reshape") if swap is not None and match.perm(swap) == (0, 2, 1) else None
    source = flat.inputs[0] if flat is not None else None
    before, middle, after = match.dims(source), match.dims(swap.inputs[0] if swap else None), match.dims(keys)
    if source is None or before is None or middle is None or after is None or len(before) != 4:
        return None
    whole = match.same_dims(before[2:], middle[1:]) and match.same_dims(after, (*before[:2], before[3], before[2]))
    return (source, ()) if whole else None


def _fuse(found: Found, opset: int, known: Known) -> Decision:
    last = match.maker(found.output)
    if opset < OPSET:
        return match.too_old(last, "Attention", OPSET, opset)
    reason = _refusal(found)
    if reason is not None:
        return Decision(last.name or "", "Attention", "skipped", reason)
    attributes: dict[str, int | float] = {"scale": found.scale}
    inputs, heads, output, nodes = _flat(found)
    if heads:
        attributes |= {"q_num_heads": heads, "kv_num_heads": heads}
    mask, made = _expanded(found, inputs if heads else None, known)
    if not heads and found.k_perm:
        made.append(ir.node("Transpose", [found.k], {"perm": found.k_perm}, name=f"{found.output.name}_keys"))
        inputs[1] = made[-1].outputs[0]
        inputs[1].name = made[-1].name
    fused = ir.node("Attention", [*inputs, *([mask] if mask is not None else [])], attributes)
    match.replace(nodes, output, [*made, fused])
    return Decision(fused.name or "", "Attention", "fused", f"{3 if heads else 4}-D inputs")


def _sizes(value: ir.Value | None, layout: tuple[int, ...] = ()) -> Dims | None:
    """Return [batch, heads, sequence, size]; heads are also known where they were split from a known width."""
    shape = match.dims(value)
    if shape is None or len(shape) != 4:
        return None
    if layout:
        shape = tuple(shape[axis] for axis in layout)
    merged = _merged(value, layout)
    width = (match.dims(merged) or (None,))[-1]
    if isinstance(width, int) and isinstance(shape[3], int):
        shape = (shape[0], width // shape[3], *shape[2:])
    return shape


def _refusal(found: Found) -> str | None:
    q, k, v, mask = _sizes(found.q), _sizes(found.k, found.k_perm), _sizes(found.v), match.dims(found.mask)
    if not match.closed(found.nodes, found.output):
        return match.SHARED
    if q is None or k is None or v is None:
        return "not four axes"
    if not (match.same_dims(q[:2], k[:2]) and match.same_dims(q[:2], v[:2])):
        return "batch and heads are not known to agree"
    if found.scale <= 0 or not math.isfinite(found.scale):
        return "the scale is not positive"
    if found.mask is not None and (mask is None or not 2 <= len(mask) <= 4):
        return "a mask of unknown or other rank"
    # A size that is not known here is checked by the operator when it runs.
    scores = (*q[:3], k[2])
    pairs = zip(mask or (), scores[-len(mask or ()) :], strict=False)
    larger = any(isinstance(m, int) and isinstance(n, int) and m not in (1, n) for m, n in pairs)
    return "the mask is larger than the scores" if larger else None


def _flat(found: Found) -> tuple[list[ir.Value], int, ir.Value, set[ir.Node]]:
    """Return the inputs, the number of heads (0: four axes), the output and the nodes of the smaller form."""
    sources = [_merged(found.q), _merged(found.k, found.k_perm), _merged(found.v)]
    back = match.consumer(found.output, "Transpose")
    merge = (
        match.consumer(back.outputs[0], "Reshape") if back is not None and match.perm(back) == HEADS_SECOND else None
    )
    q, three = _sizes(found.q), match.dims(merge.outputs[0]) if merge is not None else None
    flat = [source for source in sources if source is not None]
    if q is None or three is None or back is None or merge is None or len(flat) < 3 or not isinstance(q[1], int):
        return [found.q, found.k, found.v], 0, found.output, found.nodes
    if len(three) != 3 or not match.same_dims((q[0], q[2]), three[:2]):
        return [found.q, found.k, found.v], 0, found.output, found.nodes
    return flat, q[1], merge.outputs[0], found.nodes | {back, merge}


def _merged(value: ir.Value | None, layout: tuple[int, ...] = ()) -> ir.Value | None:
    """Return the [batch, sequence, heads * size] that ``value`` was split from; equal counts make the rest equal."""
    if not layout:
        node = match.producer(value, "Transpose")
        value = node.inputs[0] if node is not None and match.perm(node) == HEADS_SECOND else None
    split = match.producer(value, "Reshape")
    four, three = match.dims(value), match.dims(split.inputs[0] if split is not None else None)
    if split is None or four is None or three is None or len(four) != 4 or len(three) != 3:
        return None
    return split.inputs[0] if match.same_dims(four[:2], three[:2]) else None


def _expanded(found: Found, flat: list[ir.Value] | None, known: Known) -> tuple[ir.Value | None, list[ir.Node]]:
    """Return the mask with its query and key axes written out, and the nodes that do it."""
    q, k, mask = _sizes(found.q), _sizes(found.k, found.k_perm), match.dims(found.mask)
    assert q is not None
    assert k is not None
    sizes = (q[2], k[2])
    if found.mask is None or mask is None or match.same_dims(mask[-2:], sizes):
        return found.mask, []
    key = (found.mask, (*sizes, id(match.maker(found.output).graph)))
    if key in known and None not in sizes:
        return known[key], []
    rows = _size(flat[0], 1) if flat else _size(found.q, 2)
    columns = _size(flat[1], 1) if flat else _size(found.k, 1 if found.k_perm else 2)
    shape = ir.node("Concat", [rows.outputs[0], columns.outputs[0]], {"axis": 0})
    expand = ir.node("Expand", [found.mask, shape.outputs[0]])
    for node, part in ((rows, "rows"), (columns, "columns"), (shape, "sizes"), (expand, "mask")):
        node.outputs[0].name = node.name = f"{found.output.name}_{part}"
    expand.outputs[0].type = found.mask.type
    expand.outputs[0].shape = ir.Shape((*mask[:-2], *sizes))
    known[key] = expand.outputs[0]
    return expand.outputs[0], [rows, columns, shape, expand]


def _size(value: ir.Value, axis: int) -> ir.Node:
    return ir.node("Shape", [value], {"start": axis, "end": axis + 1})
