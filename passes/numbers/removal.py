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

ROUNDS = 256  # at most: of many units, some of the cheapest go together
Units = NDArray[np.int64]  # [K], the unit of each input; negative for what always stays


@dataclass(slots=True)
class System:
    """One product that reads the units.

    Attributes:
        weight: ``[K, N]``; updated as units go.
        inverse: ``H^-1``, ``[K, K]``; likewise.
        inputs: Inputs of each unit, ``[units, size]``.
        total: What its cost is a share of.
    """

    weight: NDArray[np.float64]
    inverse: Square
    inputs: NDArray[np.intp]
    total: float

    @classmethod
    def of(cls, weight: Scores, hessian: Square, units: Units, ridge: float = RIDGE) -> System:
        """The system of a weight ``[K, N]``, its Hessian up to a factor, and the unit of each of its inputs.

        Raises:
            ValueError: Units have different numbers of inputs.
        """
        dense = np.array(weight, np.float64)
        solid = damped_hessian(hessian, ridge)
        energy = float(np.sum(dense * (np.asarray(hessian, np.float64) @ dense)))
        return cls(dense, np.asarray(np.linalg.inv(solid), np.float64), inputs_of(units), max(energy, 1e-30))

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
        gone = self.inputs[units].ravel()
        move = np.linalg.solve(self.inverse[np.ix_(gone, gone)], self.inverse[gone]).T
        self.weight -= move @ self.weight[gone]
        self.inverse -= move @ self.inverse[gone]
        self.inverse[gone] = self.inverse[:, gone] = 0
        self.inverse[gone, gone] = 1  # nothing of theirs is left, and nothing divides by zero


def inputs_of(units: Units) -> NDArray[np.intp]:
    """Inputs of each unit, ``[units, size]``; ``ValueError`` where units have different numbers of them."""
    count = int(units.max(initial=-1)) + 1
    sizes = np.bincount(units[units >= 0], minlength=count)
    if count == 0 or sizes.min() != sizes.max():
        raise ValueError("units have different numbers of inputs")
    order = np.argsort(units, kind="stable")[int(np.sum(units < 0)) :]
    return order.reshape(count, -1)


def removal_costs(systems: Sequence[System], rounds: int = ROUNDS) -> NDArray[np.float64]:
    """What it costs to remove units one after the other, the cheapest first, ``[units]``.

    The cost of a unit is what it adds when its turn comes, never less than that of one before it, so that those with
    the smallest numbers are what should go together. The last one left is given twice the largest cost.

    Args:
        systems: All products that read the units; their costs, as shares of their outputs, add up. They are used up.
        rounds: Units go in at most so many rounds.
    """
    count = len(systems[0].inputs)
    found, alive = np.zeros(count), np.ones(count, bool)
    least, step = 0.0, max(-(-count // rounds), 1)
    while alive.sum() > 1:
        costs = np.where(alive, np.sum([system.costs() for system in systems], axis=0), np.inf)
        some = np.argsort(costs, kind="stable")[: min(step, int(alive.sum()) - 1)]
        found[some] = np.maximum(costs[some], least)
        least = float(found[some].max())
        alive[some] = False
        for system in systems:
            system.remove(some)
    found[alive] = 2 * least
    return found


def merge_costs(gram: Square, weight: Scores, units: Units) -> tuple[NDArray[np.float64], list[tuple[int, int, float]]]:
    """Which inputs are redundant: ``1 - |cosine|`` to the one that each is merged into, and the merges in order.

    The pair with the largest |cosine| merges first; of two, the one with less output ``|x_j| |w_j|`` goes, the other
    takes over its weights times ``x_i x_j / |x_i|^2``, the least-squares coefficient. Inputs whose numbers are all
    zero on the samples go before all others and move nobody.

    Args:
        gram: ``X^T X``, ``[K, K]``.
        weight: ``[K, N]``.
        units: Unit of each input, ``[K]``; one input for each.

    Returns:
        Costs ``[units]`` as for :func:`removal_costs`, and ``(unit that goes, unit that stays, coefficient)``.

    Raises:
        ValueError: A unit has more than one input.
    """
    places = inputs_of(units)
    if places.shape[1] != 1:
        raise ValueError("only units of one input can be merged")
    order = places[:, 0]
    norm = np.sqrt(np.diag(gram)[order])
    live = norm > 0
    size = np.where(live, norm, 1.0)
    cosine = gram[np.ix_(order, order)] / np.outer(size, size)
    likeness = np.where(live[:, None] & live, np.abs(cosine), -1.0)
    np.fill_diagonal(likeness, -1.0)
    energy = norm * np.linalg.norm(weight[order], axis=1)
    found, merges, least = np.zeros(len(order)), [], 0.0
    nearest = likeness.argmax(axis=1)
    for _ in range(int(live.sum()) - 1):
        one = int(np.argmax(likeness[np.arange(len(order)), nearest]))
        other = int(nearest[one])
        gone, stays = (one, other) if energy[one] <= energy[other] else (other, one)
        least = max(least, 1 - float(likeness[one, other]))
        merges.append((gone, stays, float(cosine[gone, stays] * norm[gone] / norm[stays])))
        found[gone] = least
        live[gone] = False
        likeness[gone], likeness[:, gone] = -1.0, -1.0
        stale = nearest == gone
        nearest[stale] = likeness[stale].argmax(axis=1)
    found[live] = 2 * max(least, 1.0)
    return found, merges
