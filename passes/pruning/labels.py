"""Where units go in an operator whose axes have names: the same label on two ports is the same axis.

An operator is told by the labels of the axes of its inputs and outputs, much as in an einsum. An axis may be made of
several labels (heads and what is in a head), the last one fastest, or of none where it is broadcast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qexport.passes.folding.axes import FREE, Ids

Port = tuple[str, int]
"""``("in", index)`` or ``("out", index)``."""
Axis = tuple[str, ...]
Tie = tuple[NDArray[np.int64], NDArray[np.int64]]


class Blocked(Exception):
    """The cut cannot be made; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Spec:
    """The axes of an operator.

    Attributes:
        ports: Labels of each axis of each port that takes part.
        closed: Labels along which nothing may be cut, and why.
        sizes: Sizes of the labels that share an axis with others.
        counts: Attributes that tell the product of the sizes of some labels.
    """

    ports: Mapping[Port, tuple[Axis, ...]]
    closed: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, Axis] = field(default_factory=dict)

    @property
    def order(self) -> tuple[str, ...]:
        """All labels, each once."""
        return tuple(dict.fromkeys(label for axes in self.ports.values() for axis in axes for label in axis))

    def labels(self, port: Port) -> set[str]:
        """The labels of one port."""
        return {label for axis in self.ports.get(port, ()) for label in axis}


@dataclass(slots=True)
class Relation:
    """What follows for the other ports of a node from the units of one.

    Attributes:
        ports: Units of each port that has some.
        ties: Units that share an element somewhere.
        mixed: Whether an element belongs to a unit and also to what always stays.
    """

    ports: dict[Port, Ids] = field(default_factory=dict)
    ties: list[Tie] = field(default_factory=list)
    mixed: bool = False


def compact(ids: Ids) -> Ids:
    """The ids with size 1 for every axis along which they do not change."""
    for axis, size in enumerate(ids.shape):
        first = ids.take([0], axis)
        if size > 1 and (ids == first).all():
            ids = first
    return ids


def varying(ids: Ids) -> tuple[int, ...]:
    """The axes along which ids change, of ids that are compact."""
    return tuple(axis for axis, size in enumerate(ids.shape) if size > 1)


def follow(spec: Spec, port: Port, ids: Ids) -> Relation:
    """What the units of one port mean for all others.

    Raises:
        Blocked: Units run along a label that is closed, or along an axis that is broadcast.
    """
    joint = lift(spec, port, ids)
    for label, size in zip(spec.order, joint.shape, strict=True):
        if size > 1 and label in spec.closed:
            raise Blocked(spec.closed[label])
    found = Relation()
    for other, axes in spec.ports.items():
        if other != port:
            lowered = _lower(spec, joint, axes, found)
            if lowered is not None:
                found.ports[other] = lowered
    return found


def lift(spec: Spec, port: Port, ids: Ids) -> Ids:
    """Ids of one port over all labels, ``[size of each label]``, 1 where nothing changes."""
    axes: tuple[Axis, ...] = spec.ports[port]
    shape: list[int] = []
    if len(axes) != ids.ndim:
        raise Blocked("a rank is not the one that its operator asks for")
    for axis, size in zip(axes, ids.shape, strict=True):
        if size == 1:
            shape += [1] * len(axis)
        elif len(axis) == 1:
            shape.append(size)
        else:
            shape += [spec.sizes[label] for label in axis]
            if int(np.prod([spec.sizes[label] for label in axis])) != size:
                raise Blocked("a size is not the one that its operator asks for")
    own = [label for axis in axes for label in axis]
    apart = ids.reshape(shape)
    order = [label for label in spec.order if label in own]
    apart = apart.transpose([own.index(label) for label in order])
    return compact(np.expand_dims(apart, [i for i, label in enumerate(spec.order) if label not in own]))


def _lower(spec: Spec, joint: Ids, axes: Sequence[Axis], found: Relation) -> Ids | None:
    """Ids of a port from those over all labels; units that fall together are tied in ``found``."""
    own = [label for axis in axes for label in axis]
    if not any(spec.order[axis] in own for axis in varying(joint)):
        return None
    for axis in varying(joint):
        if spec.order[axis] not in own:
            joint = _join(joint, axis, found)
    joint = compact(joint)
    order = [label for label in spec.order if label in own]
    kept = joint.reshape([size for label, size in zip(spec.order, joint.shape, strict=True) if label in own])
    kept = kept.transpose([order.index(label) for label in own])
    wide: list[int] = []
    made: list[int] = []
    for labels in axes:
        sizes = [kept.shape[own.index(label)] for label in labels]
        if len(sizes) > 1 and max(sizes) > 1:
            sizes = [spec.sizes[label] for label in labels]
        wide += sizes
        made.append(int(np.prod(sizes)))
    return compact(np.broadcast_to(kept, wide).reshape(made))


def _join(ids: Ids, axis: int, found: Relation) -> Ids:
    free = ids == FREE
    found.mixed |= bool((free.any(axis) & ~free.all(axis)).any())
    one: Ids = ids.min(axis=axis, keepdims=True)  # FREE is the smallest: what stays for one stays for all
    found.ties.append((np.broadcast_to(one, ids.shape).reshape(-1), ids.reshape(-1)))
    return one
