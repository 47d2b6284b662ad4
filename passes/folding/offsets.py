"""Fold an offset for each channel of a value into the biases around it: which biases those are, or why not.

``find_offset(value, axis)`` answers for a value from which ``c`` is to be subtracted, channel by channel, without a
change of what the model computes. Sources take it in (the bias of a norm, a product or a convolution, a constant that
is added, a table); products that read the value get ``c W`` added to their bias; a residual sum gets it back through
the bias of its other branch. Between source and reader it goes through reshapes, transposes and splits, and from the
result of an attention to its values, because attention weights sum to one. (A position that may look at nothing at all
is padding; a fused Attention has zeros there, which become others.)

Source: Wei et al. 2023, "Outlier Suppression+", section 4.1 (channel-wise shifting).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.folding import channel_rules
from qexport.passes.folding.axes import Ids, channel_ids, only_along, spread
from qexport.passes.folding.flood import Blocked, Flood
from qexport.passes.match import Dims, add_constant, array, consumer, dims, producer, sweep
from qexport.passes.numbers.notes import forget_range
from qexport.passes.numbers.range import SQNR_KEY

NO_BIAS = "a product without a bias reads it"
NO_READER = "no product or convolution that could take the offset in reads it"
NO_BRANCH = "a residual sum reads it whose other branch has no bias"


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


Cause = tuple[ir.Node, int]
"""A node that makes (index -1) or reads (index of its input) what is shifted: one bias may have to change for more."""


@dataclass(frozen=True, slots=True, eq=False)
class Offset:
    """A way to subtract an offset from a value without changing the model's function.

    Attributes:
        terms: The constants that change.
        ties: For each channel the first channel that must have the same offset, ``[channels]``.
        values: All values that are shifted, with the channels of their elements.
        beside: The values that become others between a reader and the constant that makes up for it.
    """

    terms: tuple[Term, ...]
    ties: NDArray[np.int64]
    values: Mapping[ir.Value, Ids]
    beside: tuple[ir.Value, ...]

    def apply(self, offset: NDArray[np.floating]) -> None:
        """Subtract ``offset`` (equal for tied channels) from the value, and undo it where the value is read.

        What was noted of the readers' outputs is void; their kernels are the same.
        """
        changes: dict[tuple[ir.Node, int], NDArray[np.float64]] = {}
        padded = np.append(np.asarray(offset, np.float64), 0.0)  # FREE is -1, the last one
        for term in self.terms:
            change = np.asarray(padded[term.ids]) if term.reader is None else _through(term.reader, padded[term.ids])
            known = changes.get((term.node, term.index), np.float64(0.0))
            changes[term.node, term.index] = known + term.sign * change
        for (node, index), change in changes.items():
            _add(node, index, change)
        for value in self.beside:
            forget_range(value)
        for term in self.terms:
            if term.reader is not None:
                term.reader.meta.pop(SQNR_KEY, None)


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
    return flood.offset()


def find_readers(value: ir.Value, axis: int, count: int) -> Offset | str:
    """The terms of the products alone that read ``value``, for an offset that a node of its own takes off.

    Returns:
        At least one term, each with its product, or the reason why there is none. (What a transposed convolution makes
        of an offset differs from position to position, so no bias undoes it.)
    """
    shape = dims(value)
    if shape is None:
        return "the rank of its input is not known"
    flood, ids = _Offsets(count, {}), channel_ids(len(shape), axis, count)
    try:
        for node, index in list(value.uses()):
            product = node.op_type in ("MatMul", "Gemm", "Conv") and node.domain == ""
            if product and index == 0 and node.graph is value.graph and array(node.inputs[1]) is not None:
                CONSUME[node.op_type](flood, node, index, ids)
    except Blocked as blocked:
        return str(blocked)
    return flood.offset() if flood.terms else NO_READER


@dataclass
class _Offsets(Flood):
    """What must be shifted once one value is."""

    terms: dict[tuple[ir.Node, int, Cause], Term] = field(default_factory=dict)

    def term(self, cause: Cause, term: Term) -> None:
        """Note that the constant at one input of a node changes."""
        node, index = term.node, term.index
        value = node.inputs[index] if index < len(node.inputs) else None
        numbers = array(value if value is not None else node.inputs[1])  # a new bias takes the type of its kernel
        ids = None if numbers is None else term.ids
        if value is not None and term.reader is None and numbers is not None:
            ids = spread(term.ids, numbers.shape)
        if ids is None:
            raise Blocked(f"a parameter of {node.op_type} is computed, or of another shape")
        self.terms[node, index, cause] = replace(term, ids=ids)

    def offset(self) -> Offset:
        """What was found."""
        beside = [term.node if term.reader is None else term.reader for term in self._elsewhere()]
        return Offset(tuple(self.terms.values()), self.ties(), self.known, tuple(node.outputs[0] for node in beside))

    def _elsewhere(self) -> Iterator[Term]:
        """The terms in other nodes than those that ask for them: behind a product, in the other branch of a sum."""
        return (term for (node, _, (asks, _)), term in self.terms.items() if node is not asks)


def _produce(flood: Flood, value: ir.Value, ids: Ids) -> None:
    node = value.producer()
    rule = None if node is None else channel_rules.find_rule(PRODUCE, node)
    if node is None or rule is None:
        raise Blocked("it is an input of the model" if node is None else f"{node.op_type} makes it, which has no bias")
    rule(flood, node, value.index() or 0, ids)


def _consume(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    rule = channel_rules.find_rule(CONSUME, node)
    if rule is None:
        raise Blocked(f"{node.op_type} reads it, which no offset goes through")
    rule(flood, node, index, ids)


def _bias_up(index: int, axis: int) -> channel_rules.Rule:
    """A source whose input ``index`` is a bias along ``axis`` of its output."""

    def rule(flood: Flood, node: ir.Node, output: int, ids: Ids) -> None:
        assert isinstance(flood, _Offsets)
        along = only_along(ids, axis)
        whole = node.op_type == "LayerNormalization" and node.attributes.get_int("axis", -1) not in (-1, ids.ndim - 1)
        if along is None or output != 0 or whole:
            raise Blocked(f"the bias of {node.op_type} does not run along the channels")
        if node.op_type == "Gemm":
            _demand_plain(node)
        flood.term((node, -1), Term(node, index, along, -1))

    return rule


def _sum_up(flood: Flood, node: ir.Node, _: int, ids: Ids) -> None:
    assert isinstance(flood, _Offsets)
    for index, value in enumerate(node.inputs):
        if array(value) is not None:
            flood.term((node, -1), Term(node, index, ids, 1 if node.op_type == "Sub" and index == 1 else -1))
            return
    raise Blocked("a sum of computed values makes it")


def _gather_up(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    assert isinstance(flood, _Offsets)
    table, along = array(node.inputs[0]), only_along(ids, -1)
    if table is None:
        channel_rules.PRODUCE["Gather"](flood, node, index, ids)
    elif node.attributes.get_int("axis", 0) == 0 and table.ndim > 1 and along is not None:
        flood.term((node, -1), Term(node, 0, along, -1))
    else:
        raise Blocked("a table is read across its channels")


def _attention_product_up(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    if not _sums_to_one(node.inputs[0]) or array(node.inputs[1]) is not None:
        raise Blocked(f"{node.op_type} makes it, which has no bias")
    channel_rules.PRODUCE["MatMul"](flood, node, index, ids)


def _sums_to_one(value: ir.Value | None) -> bool:
    """Whether the last axis holds the result of a Softmax over it; before opset 13 it may be over more than that."""
    node = producer(value, "Softmax")
    shape = dims(value)
    if node is None or shape is None or node.graph is None:
        return False
    axis = node.attributes.get_int("axis", -1 if node.graph.opset_imports.get("", 1) >= 13 else 1)
    return axis in (-1, len(shape) - 1)


def _dropout_down(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        raise Blocked("a Dropout in training reads it")
    channel_rules.CONSUME["Dropout"](flood, node, index, ids)


def _sum_down(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    """A sum gets the offset back: in its constant, or in the bias of its other branch."""
    assert isinstance(flood, _Offsets)
    cause, other = (node, index), node.inputs[1 - index]
    if array(other) is not None:
        flood.term(cause, Term(node, 1 - index, ids, 1))
        return
    branch = None if other is None or len(other.uses()) != 1 or other.is_graph_output() else other.producer()
    if branch is None or branch.domain != "" or branch.op_type not in ("Add", "Gemm", "Conv"):
        raise Blocked(NO_BRANCH)
    if not _covers(dims(other), ids):
        raise Blocked("a residual sum reads it whose other branch is smaller")
    if branch.op_type == "Add":
        bias = next((i for i, value in enumerate(branch.inputs) if array(value) is not None), None)
        along: Ids | None = ids
    else:
        bias, along = 2, only_along(ids, 1)
    if branch.op_type == "Gemm":
        _demand_plain(branch)
    if bias is None or along is None:
        raise Blocked(NO_BRANCH)
    flood.term(cause, Term(branch, bias, along, 1))


def _covers(shape: Dims | None, ids: Ids) -> bool:
    """Whether ids broadcast to a value of ``shape`` and leave its shape as it is."""
    return (
        shape is not None
        and len(shape) >= ids.ndim
        and all(size in (1, known) for size, known in zip(ids.shape[::-1], shape[::-1], strict=False))
    )


def _matmul_down(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    assert isinstance(flood, _Offsets)
    along, kernel = only_along(ids, -1), array(node.inputs[1])
    if index == 1 and _sums_to_one(node.inputs[0]):
        channel_rules.CONSUME["MatMul"](flood, node, index, ids)
        return
    if index != 0 or along is None or kernel is None or kernel.ndim != 2:
        raise Blocked("an attention product reads it")
    add = consumer(node.outputs[0], "Add")
    place = next((i for i, value in enumerate(add.inputs) if array(value) is not None), None) if add else None
    if add is None or place is None or add.graph is not node.graph:
        raise Blocked(NO_BIAS)
    flood.term((node, 0), Term(add, place, along, 1, node))


def _gemm_down(flood: Flood, node: ir.Node, index: int, ids: Ids) -> None:
    assert isinstance(flood, _Offsets)
    along = only_along(ids, 0 if node.attributes.get_int("transA", 0) != 0 else 1)
    if index != 0 or along is None or array(node.inputs[1]) is None:
        raise Blocked("Gemm reads it as a weight or bias")
    _demand_plain(node)
    flood.term((node, 0), Term(node, 2, along, 1, node))


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
    flood.term((node, 0), Term(node, 2, along, 1, node))


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
        w = w.sum(axis=tuple(range(2, w.ndim)))
        made = w @ np.broadcast_to(offset, w.shape[1:])
    else:
        turned = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0
        w = w.T if turned else w
        made = np.broadcast_to(offset, w.shape[:1]) @ w
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


_LAYOUT = (*channel_rules.LAYOUT, "Expand", "Identity", "Dropout", "Attention", "MultiHeadAttention")

PRODUCE: dict[str, channel_rules.Rule] = {
    **{op: channel_rules.PRODUCE[op] for op in _LAYOUT},
    "LayerNormalization": _bias_up(2, -1),
    "Gemm": _bias_up(2, -1),
    "Conv": _bias_up(2, 1),
    "Add": _sum_up,
    "Sub": _sum_up,
    "Gather": _gather_up,
    "MatMul": _attention_product_up,
}

CONSUME: dict[str, channel_rules.Rule] = {
    **{op: channel_rules.CONSUME[op] for op in (*_LAYOUT, "Gather", "Shape", "Size")},
    "Dropout": _dropout_down,
    "Add": _sum_down,
    "MatMul": _matmul_down,
    "Gemm": _gemm_down,
    "Conv": _conv_down,
}
