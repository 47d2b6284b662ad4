"""Fold an offset for each channel of a value into the biases around it: which biases those are, or why not.

``find_offset(value, axis)`` answers for a value from which ``c`` is to be subtracted, channel by channel, without a
change of what the model computes. Sources take it in (the bias of a norm, a product or a convolution, a constant that
is added, a table); products that read the value get ``c W`` added to their bias; a residual sum gets it back through
the bias of its other branch. Between source and reader it goes through reshapes, transposes and splits, and from the
result of an attention to its values, because attention weights sum to one.

Source: Wei et al. 2023, "Outlier Suppression+", section 4.1 (channel-wise shifting).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes import channel_rules
from qexport.passes.axes import Ids, channel_ids, only_along, spread
from qexport.passes.flood import Blocked, Flood
from qexport.passes.match import add_constant, array, consumer, dims, operands, producer, sweep

NO_BIAS = "a product without a bias reads it"


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """A constant that takes an offset in.

    Attributes:
        node: Who reads the constant.
        index: At which input; there may be none yet where the operator allows for it.
        ids: Channel of each of its elements.
        sign: -1 where the offset is subtracted, 1 where it is added.
        reader: The product whose kernel the offset goes through first; ``None`` where it is added as it is.
    """

    node: ir.Node
    index: int
    ids: Ids
    sign: int
    reader: ir.Node | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Offset:
    """A way to subtract an offset from a value without changing the model's function.

    Attributes:
        terms: The constants that change.
        ties: For each channel the first channel that must have the same offset, ``[channels]``.
        values: All values that are shifted, with the channels of their elements.
    """

    terms: tuple[Term, ...]
    ties: NDArray[np.int64]
    values: Mapping[ir.Value, Ids]

    def apply(self, offset: NDArray[np.floating]) -> None:
        """Subtract ``offset`` (equal for tied channels) from the value, and undo it where the value is read."""
        changes: dict[tuple[ir.Node, int], NDArray[np.float64]] = {}
        padded = np.append(np.asarray(offset, np.float64), 0.0)  # FREE is -1, the last one
        for term in self.terms:
            change = np.asarray(padded[term.ids]) if term.reader is None else _through(term.reader, padded[term.ids])
            known = changes.get((term.node, term.index), np.float64(0.0))
            changes[term.node, term.index] = known + term.sign * change
        for (node, index), change in changes.items():
            _add(node, index, change)


def find_offset(value: ir.Value, axis: int, count: int) -> Offset | str:
    """Find how to subtract an offset for each of the ``count`` channels along ``axis`` from ``value``.

    Returns:
        The fold, or the reason why there is none.
    """
    shape = dims(value)
    if shape is None:
        return "the rank of its input is not known"
    flood = _Offsets(count, {})
    try:
        flood.visit(value, channel_ids(len(shape), axis, count))
        flood.run(_produce, _consume)
    except Blocked as blocked:
        return str(blocked)
    return Offset(tuple(flood.terms.values()), flood.ties(), flood.known)


def find_readers(value: ir.Value, axis: int, count: int) -> Offset | str:
    """The terms of the products alone that read ``value``, for an offset that a node of its own takes off."""
    shape = dims(value)
    if shape is None:
        return "the rank of its input is not known"
    flood, ids = _Offsets(count, {}), channel_ids(len(shape), axis, count)
    try:
        for node, index in list(value.uses()):
            if index == 0 and node.op_type in ("MatMul", "Gemm", "Conv") and array(node.inputs[1]) is not None:
                CONSUME[node.op_type](flood, node, index, ids)
    except Blocked as blocked:
        return str(blocked)
    return Offset(tuple(flood.terms.values()), flood.ties(), flood.known)


@dataclass
class _Offsets(Flood):
    """What must be shifted once one value is."""

    terms: dict[tuple[ir.Node, int, int], Term] = field(default_factory=dict)

    def term(self, node: ir.Node, index: int, ids: Ids | None, sign: int, reader: ir.Node | None = None) -> None:
        """Note that the constant at one input of ``node`` changes."""
        value = node.inputs[index] if index < len(node.inputs) else None
        numbers = array(value)
        if value is not None and reader is None:
            ids = None if numbers is None or ids is None else spread(ids, numbers.shape)
        if ids is None or (value is not None and numbers is None):
            raise Blocked(f"a parameter of {node.op_type} is computed, or of another shape")
        self.terms[node, index, sign] = Term(node, index, ids, sign, reader)


def _produce(flood: Flood, value: ir.Value, ids: Ids) -> None:
    node = value.producer()
    rule = None if node is None else PRODUCE.get(node.op_type)
    if node is None or rule is None:
        raise Blocked("it is an input of the model" if node is None else f"{node.op_type} makes it, which has no bias")
    rule(flood, node, value.index() or 0, ids)


def _consume(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    rule = CONSUME.get(node.op_type)
    if rule is None:
        raise Blocked(f"{node.op_type} reads it, which no offset goes through")
    rule(flood, node, index, ids)


def _bias_up(index: int, axis: int) -> channel_rules.Rule:
    """A source whose input ``index`` is a bias along ``axis`` of its output."""

    def rule(flood: Flood, node: ir.Node, _: int, ids: Ids) -> None:
        assert isinstance(flood, _Offsets)
        along = only_along(ids, axis)
        if node.op_type == "LayerNormalization" and node.attributes.get_int("axis", -1) not in (-1, ids.ndim - 1):
            along = None
        if node.op_type == "Gemm":
            _demand_plain(node)
        flood.term(node, index, along, -1)

    return rule


def _sum_up(flood: Flood, node: ir.Node, _: int, ids: Ids) -> None:
    assert isinstance(flood, _Offsets)
    for index, value in enumerate(node.inputs):
        if array(value) is not None:
            flood.term(node, index, ids, 1 if node.op_type == "Sub" and index == 1 else -1)
            return
    raise Blocked("a sum of computed values makes it")


def _gather_up(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    assert isinstance(flood, _Offsets)
    if array(node.inputs[0]) is None:
        channel_rules.PRODUCE["Gather"](flood, node, index, ids)
    elif node.attributes.get_int("axis", 0) == 0:
        flood.term(node, 0, only_along(ids, -1), -1)
    else:
        raise Blocked("a table is read across its channels")


def _attention_product_up(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    if producer(node.inputs[0], "Softmax") is None or array(node.inputs[1]) is not None:
        raise Blocked(f"{node.op_type} makes it, which has no bias")
    channel_rules.PRODUCE["MatMul"](flood, node, index, ids)


def _sum_down(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    """A sum gets the offset back: in its constant, or in the bias of its other branch."""
    assert isinstance(flood, _Offsets)
    if node.op_type != "Add":
        raise Blocked(f"{node.op_type} reads it, which no offset goes through")
    other = node.inputs[1 - index]
    if array(other) is not None:
        flood.term(node, 1 - index, ids, 1)
        return
    branch = None if other is None or len(other.uses()) != 1 or other.is_graph_output() else other.producer()
    if branch is None or branch.op_type not in ("Add", "Gemm", "Conv"):
        raise Blocked("a residual sum reads it whose other branch has no bias")
    if branch.op_type == "Gemm":
        _demand_plain(branch)
        flood.term(branch, 2, only_along(ids, -1), 1)
    elif branch.op_type == "Conv":
        flood.term(branch, 2, only_along(ids, 1), 1)
    else:
        bias = next((i for i, value in enumerate(branch.inputs) if array(value) is not None), None)
        if bias is None:
            raise Blocked("a residual sum reads it whose other branch has no bias")
        flood.term(branch, bias, ids, 1)


def _matmul_down(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    assert isinstance(flood, _Offsets)
    along = only_along(ids, -1)
    if index == 1 and producer(node.inputs[0], "Softmax") is not None:
        channel_rules.CONSUME["MatMul"](flood, node, index, ids)
        return
    if index != 0 or along is None or array(node.inputs[1]) is None:
        raise Blocked("an attention product reads it")
    add = consumer(node.outputs[0], "Add")
    place = next((i for i, (_, other) in enumerate(operands(add)) if array(other) is not None), None)
    if add is None or place is None:
        raise Blocked(NO_BIAS)
    flood.term(add, list(add.inputs).index(operands(add)[place][1]), along, 1, node)


def _gemm_down(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    assert isinstance(flood, _Offsets)
    along = only_along(ids, 0 if node.attributes.get_int("transA", 0) != 0 else 1)
    if index != 0 or along is None or array(node.inputs[1]) is None:
        raise Blocked("Gemm reads it as a weight or bias")
    _demand_plain(node)
    flood.term(node, 2, along, 1, node)


def _conv_down(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    assert isinstance(flood, _Offsets)
    padded = any(node.attributes.get_ints("pads", ())) or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
    along = only_along(ids, 1)
    if index != 0 or along is None or array(node.inputs[1]) is None:
        raise Blocked("the kernel of a convolution is computed")
    if padded:
        raise Blocked("a padded convolution reads it")
    if node.attributes.get_int("group", 1) != 1:
        raise Blocked("a grouped convolution reads it")
    flood.term(node, 2, along, 1, node)


def _demand_plain(node: ir.Node) -> None:
    """Raise ``Blocked`` unless a Gemm adds its bias and its product as they are."""
    if node.attributes.get_float("alpha", 1.0) != 1.0 or node.attributes.get_float("beta", 1.0) != 1.0:
        raise Blocked("Gemm scales its product or its bias")


def _through(node: ir.Node, offset: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the kernel of ``node`` makes of an offset of its input, ``[output channels]``."""
    kernel = array(node.inputs[1])
    assert kernel is not None
    w: NDArray[np.float64] = kernel.astype(np.float64)
    made: NDArray[np.float64]
    if node.op_type == "Conv":
        made = w.sum(axis=tuple(range(2, w.ndim))) @ offset
    else:
        turned = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0
        made = offset @ (w.T if turned else w)
    return np.asarray(made, np.float64)


def _add(node: ir.Node, index: int, change: NDArray[np.float64]) -> None:
    """Add to a constant input, or make it."""
    old = node.inputs[index] if index < len(node.inputs) else None
    numbers = array(old)
    if old is None or numbers is None:
        kernel = array(node.inputs[1])
        assert kernel is not None
        name, new = f"{node.name}/offset", change.astype(kernel.dtype)
        node.resize_inputs(max(index + 1, len(node.inputs)))
    else:
        name, new = f"{old.name}/shifted", (numbers.astype(np.float64) + change).astype(numbers.dtype)
    node.replace_input_with(index, add_constant(node, name, new))
    sweep([old])


_LAYOUT = ("Reshape", "Flatten", "Transpose", "Unsqueeze", "Squeeze", "Split", "Expand", "Identity", "Dropout")

PRODUCE: dict[str, channel_rules.Rule] = {
    **{op: channel_rules.PRODUCE[op] for op in (*_LAYOUT, "Concat", "Attention", "MultiHeadAttention")},
    "LayerNormalization": _bias_up(2, -1),
    "Gemm": _bias_up(2, -1),
    "Conv": _bias_up(2, 1),
    "Add": _sum_up,
    "Sub": _sum_up,
    "Gather": _gather_up,
    "MatMul": _attention_product_up,
}

CONSUME: dict[str, channel_rules.Rule] = {
    **{op: channel_rules.CONSUME[op] for op in (*_LAYOUT, "Attention", "MultiHeadAttention", "Shape", "Size")},
    "Add": _sum_down,
    "MatMul": _matmul_down,
    "Gemm": _gemm_down,
    "Conv": _conv_down,
}
