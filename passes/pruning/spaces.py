"""Where units can be removed: heads of attentions, neurons between two products, channels of convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qexport.passes.folding.axes import Ids, channel_ids
from qexport.passes.match import array, dims, producer
from qexport.passes.pruning.cut import Cut, find_cut
from qexport.passes.pruning.labels import Blocked
from qexport.passes.pruning.operators import spec_of

ATTENTIONS = {"": ("Attention",), "com.microsoft": ("Attention", "MultiHeadAttention", "GroupQueryAttention")}
CONVOLUTIONS = ("Conv", "ConvTranspose")
PRODUCTS = ("MatMul", "Gemm")


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """Units of one place of which any may be removed, if ``cut.refusal`` has nothing against it.

    Attributes:
        name: The node that stands for it: the Softmax or attention operator of heads, the product or convolution that
            makes neurons or channels.
        kind: ``heads``, ``neurons`` or ``channels``.
        value: A value whose numbers are those of the units.
        ids: Unit of each of its elements, as ``Cut.values`` has them.
        cut: What goes with them, or the reason why they cannot be removed.
    """

    name: str
    kind: str
    value: ir.Value
    ids: Ids
    cut: Cut | str

    @property
    def found(self) -> Cut:
        """The cut; ``ValueError`` where there is a reason in its place."""
        if isinstance(self.cut, Cut):
            return self.cut
        raise ValueError(f"{self.kind} of {self.name!r} cannot be removed: {self.cut}")

    @property
    def count(self) -> int:
        """Number of units; 0 where they cannot be removed."""
        return self.cut.count if isinstance(self.cut, Cut) else 0


def find_spaces(model: ir.Model, kind: str) -> tuple[Space, ...]:
    """Find all spaces of a kind in the main graph, in its order, each once; also those that must stay, with a reason.

    Units that can only go together are one unit: query heads that share a key head, channels of a group.

    Raises:
        ValueError: ``kind`` is none of ``heads``, ``neurons``, ``channels``.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {sorted(KINDS)}")
    order = {node: place for place, node in enumerate(model.graph)}
    found = sorted(KINDS[kind](model.graph), key=lambda pair: order[pair[0]])
    return tuple(space for _, space in found)


def _united(value: ir.Value, ids: Ids, count: int) -> tuple[Ids, Cut | str]:
    """A cut whose units are independent of one another."""
    cut = find_cut(value, ids, count)
    if isinstance(cut, str):
        return ids, cut
    groups, places = np.unique(cut.ties, return_inverse=True)
    if groups.size < count:
        ids = np.append(places, -1)[ids]
        cut = find_cut(value, ids, groups.size)
    return ids, cut


def _heads(graph: ir.Graph) -> Iterator[tuple[ir.Node, Space]]:
    for node in graph:
        value = node.outputs[0] if node.outputs else None
        if value is None or not attends(node):
            continue
        start = _head_ids(node)
        ids, cut = (np.zeros(0, np.int64), start) if isinstance(start, str) else _united(value, *start)
        yield node, Space(node.name or str(value.name), "heads", value, ids, cut)


def attends(node: ir.Node) -> bool:
    """Whether a node is an attention, or the Softmax whose chances weigh computed values."""
    if node.domain == "" and node.op_type == "Softmax":
        return _weighs(node.outputs[0])
    return node.op_type in ATTENTIONS.get(node.domain, ())


def _weighs(value: ir.Value) -> bool:
    for reader, index in value.uses():
        other = reader.inputs[1 - index] if len(reader.inputs) == 2 else None
        if reader.op_type in ("MatMul", "Einsum") and index == 0 and array(other) is None:
            return True
        if reader.op_type in ("Dropout", "Cast", "Where", "Reshape", "Mul") and _weighs(reader.outputs[0]):
            return True
    return False


def _head_ids(node: ir.Node) -> tuple[Ids, int] | str:
    """The head of each element of what an attention makes, and their number."""
    shape = dims(node.outputs[0])
    if shape is None or len(shape) < 3:
        return "the shape of an attention is not known"
    if node.op_type == "Softmax" or len(shape) == 4:
        heads = shape[-3]
        if len(shape) != 4 or not isinstance(heads, int):
            return "the heads of an attention have no axis of a known size"
        return channel_ids(4, 1, heads), heads
    try:
        spec = spec_of(node)
    except Blocked as blocked:
        return str(blocked)
    count, width = spec.sizes["kv"] * spec.sizes.get("r", 1), shape[2]
    if not isinstance(width, int) or width % count:
        return "the heads of an attention are not known"
    return np.repeat(np.arange(count), width // count).reshape(1, 1, -1), count


def _neurons(graph: ir.Graph) -> Iterator[tuple[ir.Node, Space]]:
    seen: set[ir.Value] = set()
    for node in graph:
        value = node.inputs[0] if node.op_type in PRODUCTS and node.domain == "" else None
        if value is None or value in seen or array(value) is not None or array(node.inputs[1]) is None:
            continue
        seen.add(value)
        ids, cut = _along(value, -1)
        if isinstance(cut, str):
            yield node, Space(node.name or str(value.name), "neurons", value, ids, cut)
        elif _between_products(cut):
            seen.update(slot.node.inputs[0] for slot in cut.consumers if slot.node.inputs[0] is not None)
            first = min((slot.node for slot in cut.producers), key=list(graph).index)
            yield first, Space(first.name or str(value.name), "neurons", value, ids, cut)


def _along(value: ir.Value, axis: int) -> tuple[Ids, Cut | str]:
    """A cut along one axis of a value."""
    shape = dims(value)
    size = shape[axis] if shape is not None and len(shape) > max(axis, 0) else None
    if shape is None or not isinstance(size, int):
        return np.zeros(0, np.int64), "the size of a value is not known"
    return _united(value, channel_ids(len(shape), axis, size), size)


def _between_products(cut: Cut) -> bool:
    """Whether all that is cut lies between products with weights, no convolution or attention among them."""
    nodes = {node for value in cut.values for node in (*value.consumers(), value.producer()) if node is not None}
    computed = (n for n in nodes if n.op_type in PRODUCTS and all(array(value) is None for value in n.inputs[:2]))
    ends = (*cut.producers, *cut.consumers)
    return (
        bool(cut.producers)
        and all(slot.node.op_type in PRODUCTS for slot in ends)
        and not any(True for _ in computed)
        and not any(attends(node) for node in nodes)
    )


def _channels(graph: ir.Graph) -> Iterator[tuple[ir.Node, Space]]:
    """From the widest convolution to the narrowest: a shortcut may add channels, of which the widest has all."""
    covered: set[tuple[ir.Node, int, tuple[int, ...]]] = set()
    sizes = {node: (dims(node.inputs[1]) or (0,)) for node in graph if producer(node.outputs[0], *CONVOLUTIONS)}
    for node in sorted(sizes, key=lambda n: -_channels_of(n)):
        value = node.outputs[0]
        makes = (0,) if node.op_type == "Conv" else (1,)
        if (node, 1, makes) in covered or array(node.inputs[1]) is None:
            continue
        ids, cut = _along(value, 1)
        if isinstance(cut, Cut):
            covered.update((slot.node, slot.index, slot.axes) for slot in cut.slots)
        yield node, Space(node.name or str(value.name), "channels", value, ids, cut)


def _channels_of(node: ir.Node) -> int:
    shape = dims(node.outputs[0])
    size = shape[1] if shape is not None and len(shape) > 1 else 0
    return size if isinstance(size, int) else 0


KINDS: dict[str, Callable[[ir.Graph], Iterator[tuple[ir.Node, Space]]]] = {
    "heads": _heads,
    "neurons": _neurons,
    "channels": _channels,
}
