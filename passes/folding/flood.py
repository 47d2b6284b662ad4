"""What must be scaled once one value is: the constants and values that a scale for each channel runs through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.folding.axes import FREE, Ids, spread, tied
from qexport.passes.match import Dims, add_constant, array, dims, is_cache, sweep
from qexport.passes.numbers.notes import forget_layer

FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}

Produce = Callable[["Flood", ir.Value, Ids], None]
"""Divides a value at its source: notes what else must be divided for that."""
Consume = Callable[["Flood", ir.Node, int, Ids], None]
"""Undoes or passes on the division of one input of a node."""


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One constant input that takes part.

    Attributes:
        node: Who reads the constant.
        index: At which input.
        ids: Channel of each of its elements, of the shape that the constant has afterwards; ``FREE`` for none.
        power: 1 where the constant is multiplied by the scale, -1 where it is divided.
        weight: Whether it is the kernel of a product or convolution that reads the scaled channels.
    """

    node: ir.Node
    index: int
    ids: Ids
    power: int
    weight: bool = False

    @property
    def constant(self) -> ir.Value:
        """The value that holds the numbers."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """A way to divide a value by a scale without changing the model's function.

    Attributes:
        slots: All constants that change.
        ties: For each channel the first channel that must have the same scale, ``[channels]``.
        values: All values that are divided, with the channels of their elements.
    """

    slots: tuple[Slot, ...]
    ties: NDArray[np.int64]
    values: Mapping[ir.Value, Ids]

    @property
    def readers(self) -> tuple[Slot, ...]:
        """The kernels that read the scaled channels."""
        return tuple(slot for slot in self.slots if slot.weight)

    def largest(self, numbers: NDArray[np.floating]) -> NDArray[np.float64]:
        """The largest of the numbers (none below zero) of each channel's ties, ``[channels]``."""
        return largest_of_ties(self.ties, numbers)

    def weight_reach(self) -> NDArray[np.float64]:
        """Largest magnitude of the weights that read each channel, ties together, ``[channels]``."""
        found = np.zeros(self.ties.size + 1)
        for slot in self.readers:
            numbers = array(slot.constant)
            assert numbers is not None
            np.maximum.at(found, np.broadcast_to(slot.ids, numbers.shape), np.abs(numbers.astype(np.float64)))
        return self.largest(found[:-1])

    def apply(self, scale: NDArray[np.floating]) -> None:
        """Divide the value by ``scale`` (positive, equal for tied channels) in all constants; others keep theirs.

        What was noted of the layers that the constants belong to is void.
        """
        factors: dict[tuple[ir.Node, int], NDArray[np.float64]] = {}
        padded = np.append(np.asarray(scale, np.float64), 1.0)  # FREE is -1, the last one
        for slot in self.slots:
            factor = padded[slot.ids] ** slot.power
            factors[slot.node, slot.index] = factors.get((slot.node, slot.index), np.float64(1.0)) * factor
        for (node, index), factor in factors.items():
            old = node.inputs[index]
            numbers = array(old)
            assert old is not None
            assert numbers is not None
            new = (numbers.astype(np.float64) * factor).astype(numbers.dtype)
            node.replace_input_with(index, add_constant(node, f"{old.name}/scaled", new))
            sweep([old])
            forget_layer(node)


def largest_of_ties(ties: NDArray[np.int64], numbers: NDArray[np.floating]) -> NDArray[np.float64]:
    """The largest number among the channels that each channel is tied to, ``[channels]``."""
    found = np.full(ties.size, -np.inf)
    np.maximum.at(found, ties, numbers)
    return found[ties]


class Blocked(Exception):
    """The scale cannot be folded; the message is the reason."""


class Fork(Exception):
    """A product of two computed values: either factor may take the scale."""

    def __init__(self, node: ir.Node) -> None:
        self.node = node


@dataclass
class Flood:
    """Everything that must be divided once one value is, worked off one value at a time.

    Attributes:
        count: Number of channels.
        choices: The factor that takes the scale, for each product of two computed values.
        known: The values that are divided, with their ids.
        slots: The constants found so far.
    """

    count: int
    choices: dict[ir.Node, int]
    known: dict[ir.Value, Ids] = field(default_factory=dict)
    slots: dict[tuple[ir.Node, int, int], Slot] = field(default_factory=dict)
    _todo: list[ir.Value] = field(default_factory=list)
    _ties: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=list)

    def visit(self, value: ir.Value | None, ids: Ids | None) -> None:
        """Note that ``value`` is divided by ``s[ids]`` too."""
        if value is None or ids is None:
            raise Blocked("a reshape mixes channels with other axes")
        if (ids == FREE).all():
            return
        if value.dtype is not None and value.dtype not in FLOATS:
            raise Blocked("its channels become integers")
        if not _fits(ids, dims(value)):
            raise Blocked("its channels are not those that its shape tells")
        before = self.known.get(value)
        if before is not None:
            old, new = np.broadcast_arrays(before, ids)
            both = (old != FREE) & (new != FREE)
            self.tie(old[both], new[both])
            ids = np.where(old == FREE, new, old)
            if np.array_equal(ids, old):
                return
        self.known[value] = ids
        self._todo.append(value)

    def run(self, produce: Produce, consume: Consume) -> None:
        """Follow everything to its end by the rules of the operators; ``Blocked`` where that is not possible."""
        while self._todo:
            value = self._todo.pop()
            if value.is_graph_output() and not is_cache(value):
                raise Blocked("it is an output of the model")
            ids = self.known[value]
            produce(self, value, ids)
            for node, index in list(value.uses()):
                if node.graph is not value.graph:
                    raise Blocked("a control-flow branch reads it")
                consume(self, node, index, ids)

    def slot(self, node: ir.Node, index: int, ids: Ids | None, power: int, *, weight: bool = False) -> None:
        """Note that the constant at one input of ``node`` is multiplied or divided; ``ids`` broadcast against it."""
        value = node.inputs[index] if index < len(node.inputs) else None
        numbers = array(value)
        wide = None if numbers is None or ids is None else spread(ids, numbers.shape)
        if wide is None or value is None or value.dtype not in FLOATS:
            raise Blocked(f"a parameter of {node.op_type} is computed, or of another shape")
        self.slots[node, index, power] = Slot(node, index, wide, power, weight)

    def tie(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> None:
        """Note that pairs of channels need the same scale; what is free takes part in none."""
        differ = (one != other) & (one != FREE) & (other != FREE)
        if differ.any():
            self._ties.append((one[differ], other[differ]))

    def narrow(self, ids: Ids, value: ir.Value | None) -> Ids | None:
        """Ids of an operand from those of what it is broadcast to; channels that share an element are tied."""
        shape = dims(value)
        if shape is None or len(shape) > ids.ndim:
            return None
        for axis in range(ids.ndim):
            place = axis - (ids.ndim - len(shape))
            if ids.shape[axis] == 1:
                continue
            if place < 0 or shape[place] == 1:
                ids = self.join(ids, axis)
            elif shape[place] != ids.shape[axis]:  # not known, so it may be broadcast
                return None
        return ids.reshape(ids.shape[ids.ndim - len(shape) :])

    def join(self, ids: Ids, axis: int) -> Ids:
        """Ids of what all positions along ``axis`` share, one position left; their channels are tied."""
        one: Ids = ids.max(axis=axis, keepdims=True)  # FREE is the smallest: one channel divides what all share
        self.tie(np.broadcast_to(one, ids.shape).reshape(-1), ids.reshape(-1))
        return one

    def ties(self) -> NDArray[np.int64]:
        """For each channel the smallest one it is tied to."""
        return tied(self.count, self._ties)


def _fits(ids: Ids, shape: Dims | None) -> bool:
    """Whether ids can broadcast against a shape as far as it is known."""
    return shape is None or (
        ids.ndim == len(shape)
        and all(size in (1, known) or not isinstance(known, int) for size, known in zip(ids.shape, shape, strict=True))
    )
