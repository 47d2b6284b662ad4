"""Find what must be removed together with units of one value, and remove it.

Units (heads, neurons, channels) are followed from one value to every other that has a part of them, through whatever
keeps them apart, until constants hold them all: what makes a unit, and what reads it. Removing those leaves a smaller
model that computes what the old one does where nothing reads the removed units.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.folding.activation import ACTIVATION_KEY
from qexport.passes.folding.axes import FREE, Ids, tied
from qexport.passes.match import array, constant, dims, is_cache
from qexport.passes.numbers.notes import forget_layer, forget_range
from qexport.passes.pruning.labels import Blocked, Port, Tie, compact, varying
from qexport.passes.pruning.operators import ROWS, spec_of
from qexport.passes.pruning.relations import relate
from qexport.passes.pruning.reorder import moved, order_refusal
from qexport.passes.pruning.sizes import Kept, Number, along, demand_traced, numbers
from qexport.passes.pruning.write import Writer

__all__ = ["Blocked", "Cut", "Slot", "find_cut"]

Keep = NDArray[np.bool_]  # [units], True where one stays


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One constant input that gets smaller, along some of its axes; an input may be in two slots, one for each axis.

    Attributes:
        node: Who reads the constant.
        index: At which input.
        ids: Unit of each of its elements, size 1 along axes where nothing changes; ``FREE`` for none.
        role: ``consumer`` where it is a weight that sums over the units, ``producer`` where it is one that makes them,
            ``parameter`` for all else: biases, norms, masks.
    """

    node: ir.Node
    index: int
    ids: Ids
    role: str

    @property
    def constant(self) -> ir.Value:
        """The value that holds the numbers."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes along which units run."""
        return varying(self.ids)


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """Everything that gets smaller when units are removed; it is good for as long as the model is not changed.

    Attributes:
        count: Number of units.
        ties: For each unit the first one that must go or stay with it, ``[units]``.
        slots: All constants.
        values: All computed values, with the unit of each element.
        numbers: Sizes that are stored in constants and attributes.
    """

    count: int
    ties: NDArray[np.int64]
    slots: tuple[Slot, ...]
    values: Mapping[ir.Value, Ids]
    numbers: tuple[Number, ...]

    @property
    def consumers(self) -> tuple[Slot, ...]:
        """The weights that sum over the units: what a repair refits."""
        return tuple(slot for slot in self.slots if slot.role == "consumer")

    @property
    def producers(self) -> tuple[Slot, ...]:
        """The weights that make the units."""
        return tuple(slot for slot in self.slots if slot.role == "producer")

    def parameters(self) -> NDArray[np.int64]:
        """How many stored numbers each unit holds, ``[units]``; a constant that several nodes read counts once."""
        once = {(slot.constant, slot.ids.tobytes(), slot.ids.shape): slot for slot in self.slots}
        return sum((self._elements(slot) for slot in once.values()), np.zeros(self.count, np.int64))

    def work(self) -> NDArray[np.float64]:
        """Multiplications that each unit costs, ``[units]``: for each image of a convolution, position of a product.

        Pixels that are not known count as one.
        """
        total = np.zeros(self.count)
        for slot in self.slots:
            if slot.role != "parameter" or (slot.node.op_type == "Conv" and slot.index == 1):
                total += self._elements(slot) * _pixels(slot.node)
        return total

    def _smaller(self, node: ir.Node, index: int, kept: Kept) -> tuple[NDArray[np.generic], bytes]:
        """What is left of a constant, and what tells it from what is left of it elsewhere."""
        slots = [slot for slot in self.slots if slot.node is node and slot.index == index]
        numbers_ = array(slots[0].constant)
        assert numbers_ is not None
        masks: dict[int, Keep] = {}
        for slot in slots:
            for axis in slot.axes:
                stay = along(kept.mask, slot.ids, axis)
                masks[axis] = masks[axis] & stay if axis in masks else stay
        for axis, mask in masks.items():
            numbers_ = numbers_.compress(mask, axis)
        return numbers_, repr([(axis, mask.tobytes()) for axis, mask in sorted(masks.items())]).encode()

    def _elements(self, slot: Slot) -> NDArray[np.int64]:
        tensor = constant(slot.constant)
        assert tensor is not None
        return np.bincount(slot.ids[slot.ids != FREE], minlength=self.count) * (tensor.size // slot.ids.size)

    def refusal(self, keep: Keep) -> str | None:
        """Why just the units of ``keep`` cannot stay; ``None`` if they can."""
        if keep.shape != (self.count,) or keep.dtype != np.bool_:
            return f"{self.count} units need as many choices"
        if not keep.any():
            return "nothing would be left"
        if not np.array_equal(keep, keep[self.ties]):
            return "units that go together would be parted"
        if keep.all():
            return None
        padded = np.append(keep, True)
        if reason := self._changed():
            return reason
        for ids in (*(slot.ids for slot in self.slots), *self.values.values()):
            reason = _uneven(padded[ids])
            if reason is not None:
                return reason
        return None

    def _changed(self) -> str | None:
        """Why the cut is good no longer, if it is not."""
        for slot in self.slots:
            if any(slot.constant.shape is None or slot.constant.shape[a] != slot.ids.shape[a] for a in slot.axes):
                return "the model was changed since"
        return None

    def apply(self, keep: Keep) -> None:
        """Remove the units that are not in ``keep``, ``[units]``; what was noted of the tensors is void.

        Raises:
            Blocked: They cannot be removed; the model is as it was. ``refusal`` tells beforehand.
        """
        reason = self.refusal(keep)
        if reason is not None:
            raise Blocked(reason)
        if keep.all():
            return
        kept = Kept(self.values, keep)
        told = [(number, number.count(kept)) for number in self.numbers]
        writer = Writer()
        for node, index in dict.fromkeys((slot.node, slot.index) for slot in self.slots):
            writer.constant(node, index, *self._smaller(node, index, kept))
            forget_layer(node)
        writer.numbers(told)
        writer.close()
        for value, ids in self.values.items():
            _shrink(value, ids, kept)

    def reorder(self, order: NDArray[np.int64]) -> None:
        """Let unit ``order[i]`` take the place of unit ``i`` in all constants; the model computes the same.

        Raises:
            Blocked: The units cannot change places, or that is not proven; the model is as it was.
        """
        reason = self._changed() or order_refusal(self, order)
        if reason is not None:
            raise Blocked(reason)
        if np.array_equal(order, np.arange(self.count)):
            return
        writer = Writer()
        for node, index in dict.fromkeys((slot.node, slot.index) for slot in self.slots):
            slots = [slot for slot in self.slots if slot.node is node and slot.index == index]
            numbers_ = array(slots[0].constant)
            assert numbers_ is not None
            for slot in slots:
                numbers_ = moved(numbers_, slot.ids, order)
            writer.constant(node, index, numbers_, repr([(slot.axes, slot.ids.tobytes()) for slot in slots]).encode())
            forget_layer(node)
        writer.close()
        for value in self.values:
            value.meta.pop(ACTIVATION_KEY, None)


def find_cut(value: ir.Value, ids: Ids, count: int) -> Cut | str:
    """Find what goes with the units of ``value``.

    Args:
        value: A computed value.
        ids: The unit of each element, of the value's rank, size 1 along axes where it does not change; ``FREE`` (-1)
            where it belongs to none.
        count: Number of units.

    Returns:
        The cut, or the reason why there is none.
    """
    if count < 2:
        return "there is one unit only"
    flood = _Flood(count)
    try:
        flood.visit(value, ids)
        flood.run()
        demand_traced(flood.values)
        found = [number for node in flood.nodes() for number in numbers(node, flood.values)]
        slots = [Slot(node, i, i_ids, _role(node, i, i_ids)) for (node, i, _), i_ids in flood.slots.items()]
    except Blocked as blocked:
        return str(blocked)
    return Cut(count, flood.tied(), tuple(slots), flood.values, tuple(found))


@dataclass
class _Flood:
    """Everything that has a part of the units, worked off one value at a time."""

    count: int
    values: dict[ir.Value, Ids] = field(default_factory=dict)
    slots: dict[tuple[ir.Node, int, tuple[int, ...]], Ids] = field(default_factory=dict)
    _ties: list[Tie] = field(default_factory=list)
    _mixed: dict[tuple[ir.Node, Port], bool] = field(default_factory=dict)
    _todo: list[ir.Value] = field(default_factory=list)

    def visit(self, value: ir.Value, ids: Ids) -> None:
        """Note the units of a computed value."""
        merged = self._merged(value, self.values.get(value), ids)
        if merged is not None:
            self.values[value] = merged
            self._todo.append(value)

    def run(self) -> None:
        """Follow everything to its end."""
        while self._todo:
            value = self._todo.pop()
            node = value.producer()
            cache = is_cache(value)
            if value.is_graph_output() and not cache:
                raise Blocked("it is an output of the model")
            if node is not None:
                self._relate(node, ("out", value.index() or 0), value)
            elif not cache:
                raise Blocked("it is an input of the model")
            for reader, index in tuple(value.uses()):
                if reader.graph is not value.graph:
                    raise Blocked("a control-flow branch reads it")
                if reader.op_type != "Shape" or reader.domain != "":
                    self._relate(reader, ("in", index), value)
        if any(self._mixed.values()):
            raise Blocked("units share a place with what stays")

    def nodes(self) -> Iterable[ir.Node]:
        """All nodes that make or read one of the values, each once."""
        made = (value.producer() for value in self.values)
        read = (node for value in self.values for node in value.consumers() if node.op_type != "Shape")
        return dict.fromkeys(node for node in (*made, *read) if node is not None)

    def tied(self) -> NDArray[np.int64]:
        """For each unit the smallest one it is tied to."""
        return tied(self.count, self._ties)

    def _relate(self, node: ir.Node, port: Port, value: ir.Value) -> None:
        relation = relate(node, port, self.values[value])
        self._mixed[node, port] = relation.mixed
        for one, other in relation.ties:
            self._tie(one, other)
        for (side, index), ids in relation.ports.items():
            ends = node.inputs if side == "in" else node.outputs
            end = ends[index]
            if end is None or (end.shape is None and not end.uses() and not end.is_graph_output()):
                continue
            if side == "in" and constant(end) is not None:
                if end.graph is not None and end.graph is not node.graph:
                    raise Blocked("a constant of an outer graph has a part of it")
                key = (node, index, varying(ids))
                merged = self._merged(end, self.slots.get(key), ids)
                if merged is not None:
                    self.slots[key] = merged
            else:
                self.visit(end, ids)

    def _merged(self, value: ir.Value, known: Ids | None, ids: Ids) -> Ids | None:
        """What is known of a value together with what was learnt; ``None`` where that is nothing new."""
        shape, ids = dims(value), compact(ids)
        if (ids == FREE).all():
            return None
        if ids.size == 1:
            raise Blocked("a value would be removed as a whole")
        if shape is None or len(shape) != ids.ndim:
            raise Blocked("a rank is not known, or not as expected")
        if any(size not in (1, told) for size, told in zip(ids.shape, shape, strict=True)):
            raise Blocked("a size is not known, or not as expected")
        if known is None:
            return ids
        old, new = np.broadcast_arrays(known, ids)
        self._tie(old.reshape(-1), new.reshape(-1))
        merged = compact(np.where(old == FREE, new, old))
        return None if merged.shape == known.shape and np.array_equal(merged, known) else merged

    def _tie(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> None:
        differ = (one != other) & (one != FREE) & (other != FREE)
        if differ.any():
            self._ties.append((one[differ], other[differ]))


def _role(node: ir.Node, index: int, ids: Ids) -> str:
    """Whether a constant makes units, sums over them, or neither."""
    if (node.domain, node.op_type) not in ROWS:
        return "parameter"
    spec, port = spec_of(node), ("in", index)
    axes = spec.ports[port]
    runs = {label for axis in varying(ids) for label in axes[axis] if spec.sizes.get(label, 2) > 1}
    results = {label for other in spec.ports if other[0] == "out" for label in spec.labels(other)}
    others = (other for other in spec.ports if other[0] == "in" and constant(node.inputs[other[1]]) is None)
    computed = {label for other in others for label in spec.labels(other)}
    if runs - results:
        return "consumer"
    sums = spec.labels(port) - results
    return "producer" if sums and not runs & computed else "parameter"


def _uneven(mask: Keep) -> str | None:
    """Why the elements that stay are no smaller tensor: not the same positions in every row, or none."""
    if not mask.any():
        return "nothing would be left"
    even = np.ones([1] * mask.ndim, np.bool_)
    for axis in range(mask.ndim):
        even = even & mask.any(axis=tuple(i for i in range(mask.ndim) if i != axis), keepdims=True)
    return None if np.array_equal(np.broadcast_to(even, mask.shape), mask) else "rows would lose different places"


def _pixels(node: ir.Node) -> int:
    """Pixels of what a convolution makes."""
    shape = dims(node.outputs[0]) if node.op_type in ("Conv", "ConvTranspose") else None
    return int(np.prod([size for size in (shape or ())[2:] if isinstance(size, int)]))


def _shrink(value: ir.Value, ids: Ids, kept: Kept) -> None:
    """Note the new shape of a value, and that what was measured of it is void."""
    assert value.shape is not None
    sizes = {axis: kept.count(value, axis) for axis in varying(ids)}
    value.shape = ir.Shape([sizes.get(axis, size) for axis, size in enumerate(value.shape)])
    forget_range(value)
    value.meta.pop(ACTIVATION_KEY, None)
