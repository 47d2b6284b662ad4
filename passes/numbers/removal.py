"""In which order units of a product's input are best removed, and what each of them costs.

A unit is some inputs of ``y = x W`` that go together: one neuron, the numbers of a head, the kernel positions of a
channel. With ``H = X^T X`` and everything that stays making up for what goes, removing unit g costs
``tr(W_g^T ((H^-1)_gg)^-1 W_g)`` and changes the others by ``-(H^-1)_:g ((H^-1)_gg)^-1 W_g``: optimal brain surgery for
groups (Kurtic et al. 2023, "ZipLM", equation 3). Two units that say the same are seen to: one of them costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qexport.passes.numbers.gptq import Square
from qexport.passes.numbers.masks import Scores
from qexport.passes.numbers.refit import RIDGE, damped_hessian

ROUNDS = 256  # at most: of many units, some go before all others are looked at again
NEAR = 4  # times as many are looked at after each of them
Units = NDArray[np.int64]  # [K], the unit of each input; negative for what always stays


@dataclass(slots=True)
class System:
    """One product that reads the units.

    Attributes:
        weight: ``[K, N]``; updated as units go. Rows of zeros behind it stand for inputs that a unit lacks.
        inverse: ``H^-1``, ``[K, K]``; likewise, with ones behind it.
        inputs: Inputs of each unit, ``[units, size]``.
        total: What its cost is a share of.
    """

    weight: NDArray[np.float64]
    inverse: Square
    inputs: NDArray[np.intp]
    total: float

    @classmethod
    def of(cls, weight: Scores, hessian: Square, units: Units, count: int, ridge: float = RIDGE) -> System:
        """The system of a weight ``[K, N]``, its Hessian up to a factor, and the unit of each of its inputs.

        Units may have different numbers of inputs, or none: those cost nothing here. So does what nothing went
        through.
        """
        dense = np.array(weight, np.float64)
        energy = float(np.sum(dense * (np.asarray(hessian, np.float64) @ dense)))
        dense[np.diag(hessian) <= 0] = 0
        inputs = inputs_of(units, count)
        lacking = int(inputs.max(initial=-1)) + 1 - len(dense)
        if lacking > 0:
            dense = np.vstack([dense, np.zeros((lacking, dense.shape[1]))])
        inverse = np.eye(len(dense))
        inverse[: len(units), : len(units)] = np.linalg.inv(damped_hessian(hessian, ridge))
        return cls(dense, inverse, inputs, max(energy, 1e-30))

    def costs(self) -> NDArray[np.float64]:
        """What removing each unit would cost now, as a share of the output's energy, ``[units]``."""
        rows = self.weight[self.inputs]
        if self.inputs.shape[1] == 1:
            of = np.square(rows[:, 0]).sum(axis=1) / np.diag(self.inverse)[self.inputs[:, 0]]
        else:
            block = self.inverse[self.inputs[:, :, None], self.inputs[:, None, :]]
            of = np.sum(rows * np.linalg.solve(block, rows), axis=(1, 2))
        return np.asarray(of / self.total)

    def remove(self, units: NDArray[np.intp]) -> None:
        """Take units out and let the others make up for them."""
        gone = np.unique(self.inputs[units])
        move = np.linalg.solve(self.inverse[np.ix_(gone, gone)], self.inverse[gone]).T
        self.weight -= move @ self.weight[gone]
        self.inverse -= move @ self.inverse[gone]
        self.weight[gone] = 0
        self.inverse[gone] = self.inverse[:, gone] = 0
        self.inverse[gone, gone] = 1  # nothing of theirs is left, and nothing divides by zero

    def part(self, units: NDArray[np.intp]) -> System:
        """What is known of a few units alone: all that their costs come from, also as some of them go."""
        places, inputs = np.unique(self.inputs[units], return_inverse=True)
        shape = (len(units), self.inputs.shape[1])
        return System(self.weight[places], self.inverse[np.ix_(places, places)], inputs.reshape(shape), self.total)


def inputs_of(units: Units, count: int) -> NDArray[np.intp]:
    """Inputs of each unit in their order, ``[count, size]``; ``K`` and above for those that a unit lacks."""
    sizes = np.bincount(units[units >= 0], minlength=count)
    order = np.argsort(units, kind="stable")[int(np.sum(units < 0)) :]
    found = np.tile(len(units) + np.arange(int(sizes.max(initial=0))), (count, 1))
    found[np.arange(found.shape[1]) < sizes[:, None]] = order
    return found


def removal_costs(systems: Sequence[System], rounds: int = ROUNDS) -> NDArray[np.float64]:
    """What it costs to remove units one after the other, the cheapest first, ``[units]``.

    The cost of a unit is what it adds when its turn comes, above that of all before it, so that those with the
    smallest numbers are what should go together.

    Args:
        systems: All products that read the units; their costs, as shares of their outputs, add up. They are used up.
        rounds: All units are looked at so many times at most; those that go in between are the cheapest of a few.
    """
    count = len(systems[0].inputs)
    found, alive = np.zeros(count), np.ones(count, bool)
    least, step = 0.0, max(-(-count // rounds), 1)
    while alive.any():
        near = _cheapest(systems, alive)[: NEAR * step]
        parts, inside = [system.part(near) for system in systems], np.ones(len(near), bool)
        for _ in range(min(step, len(near))):
            one = _cheapest(parts, inside)[:1]
            cost = float(sum(part.costs()[one[0]] for part in parts))
            least = max(cost, float(np.nextafter(least, np.inf)))
            found[near[one]] = least
            inside[one] = False
            for part in parts:
                part.remove(one)
        gone = near[~inside]
        alive[gone] = False
        for system in systems:
            system.remove(gone)
    return found


def _cheapest(systems: Sequence[System], alive: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Those that are there, the cheapest first."""
    costs = np.where(alive, np.sum([system.costs() for system in systems], axis=0), np.inf)
    return np.argsort(costs, kind="stable")[: int(alive.sum())]


def merge_costs(gram: Square, weight: Scores, units: Units, count: int) -> NDArray[np.float64]:
    """Which units are redundant: ``1 - |cosine|`` to the one most like it when its turn comes, ``[units]``.

    The pair with the largest |cosine| comes first; of two, the one with less output ``|x_j| |w_j|`` goes. Units whose
    numbers are all zero on the samples go before all others; the last of those that are not stays longest.

    Args:
        gram: ``X^T X``, ``[K, K]``.
        weight: ``[K, N]``.
        units: Unit of each input, ``[K]``.
        count: Number of units.

    Raises:
        ValueError: Units have different numbers of inputs.
    """
    square, places = _among_units(gram, units, count)
    norm = np.sqrt(np.diag(square))
    live = norm > 0
    energy = norm * np.sqrt(np.square(weight[places]).sum(axis=(1, 2)))
    likeness = np.abs(_cosines(square))
    likeness[~live], likeness[:, ~live] = -1, -1
    np.fill_diagonal(likeness, -1)
    found, least = np.zeros(count), 0.0
    nearest = likeness.argmax(axis=1)
    for _ in range(int(live.sum()) - 1):
        one = int(np.argmax(likeness[np.arange(count), nearest]))
        other = int(nearest[one])
        gone = one if energy[one] <= energy[other] else other
        least = max(1 - float(likeness[one, other]), float(np.nextafter(least, np.inf)))
        found[gone], live[gone] = least, False
        likeness[gone], likeness[:, gone] = -1, -1
        stale = nearest == gone
        nearest[stale] = likeness[stale].argmax(axis=1)
    found[live] = 2
    return found


def merge(gram: Square, weight: Scores, units: Units, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The weight ``[K, N]``, each unit that goes added to the one of those that stay that it is most like.

    That takes over its weights times ``x_i x_j / |x_i|^2``, the least-squares coefficient. Arguments and errors are
    those of :func:`merge_costs`, and ``keep``, ``[units]``, with one that stays at least.
    """
    square, places = _among_units(gram, units, len(keep))
    likeness = np.where(keep & (np.diag(square) > 0), np.abs(_cosines(square)), -1)
    found = np.array(weight, np.float64)
    for gone in np.flatnonzero(~keep):
        stays = int(likeness[gone].argmax())
        found[places[stays]] += square[gone, stays] / max(square[stays, stays], 1e-30) * weight[places[gone]]
        found[places[gone]] = 0
    return found


def _among_units(gram: Square, units: Units, count: int) -> tuple[Square, NDArray[np.intp]]:
    """Products of units with each other, summed over their inputs, ``[units, units]``, and those inputs."""
    places = inputs_of(units, count)
    if not places.size or places.max() >= len(units):
        raise ValueError("units have different numbers of inputs")
    return np.sum([gram[np.ix_(column, column)] for column in places.T], axis=0), places


def _cosines(square: Square) -> Square:
    size = np.sqrt(np.diag(square))
    size = np.where(size > 0, size, 1.0)
    return np.asarray(square / np.outer(size, size))
