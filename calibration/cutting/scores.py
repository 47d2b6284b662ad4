"""What is lost without each unit, by criterion: the units with the smallest numbers go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.cutting.gates import gate_gradients, output_change
from qexport.calibration.cutting.readers import Reader, hessians, readers_of, sums_of, taps_of
from qexport.calibration.reading.data import Sample
from qexport.calibration.statistics.gram import BUDGET
from qexport.calibration.statistics.halves import measure_halves
from qexport.passes.folding.axes import FREE
from qexport.passes.match import array
from qexport.passes.numbers.gptq import Square
from qexport.passes.numbers.removal import System, inputs_of, merge_costs, removal_costs
from qexport.passes.pruning.cut import Cut
from qexport.passes.pruning.spaces import Space

Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What scores are made from.

    Attributes:
        model: The model as it is before any cut.
        samples: Makes a fresh run over the samples.
        ridge: For what makes up for a loss.
    """

    model: ir.Model
    samples: Callable[[], Iterator[Sample]]
    ridge: float


def by_magnitude(spaces: Sequence[Space], evidence: Evidence) -> list[Scores]:
    """Squared norm of a unit's weights, as a share of each weight's (Li et al. 2016, "Pruning Filters", with L2)."""
    return [_norms(space.found) for space in spaces]


def _norms(cut: Cut) -> Scores:
    total = np.zeros(cut.count)
    for slot in (*cut.producers, *cut.consumers):
        numbers = array(slot.constant)
        assert numbers is not None
        squares = np.square(np.asarray(numbers, np.float64))
        ids = np.broadcast_to(slot.ids, squares.shape)
        held = ids != FREE
        total += np.bincount(ids[held], squares[held], cut.count) / max(float(squares.sum()), 1e-30)
    return total


def by_activation(spaces: Sequence[Space], evidence: Evidence) -> list[Scores]:
    """Energy that a unit adds to the outputs of its readers, ``tr(W_g^T H_gg W_g)``: none for one that is never on."""
    return [
        np.sum([_energies(reader, h, space.count) for reader, h in zip(readers, squares, strict=True)], axis=0)
        for space, readers, squares in _measured(spaces, evidence)
    ]


def _energies(reader: Reader, hessian: Square, count: int) -> Scores:
    weight, units = reader.kernel.matrix(), reader.units
    parts = hessian * (weight @ weight.T)
    held = units != FREE
    own = np.where(units[:, None] == units, parts, 0).sum(axis=1)
    return np.bincount(units[held], own[held], count) / max(float(parts.sum()), 1e-30)


def by_surgery(spaces: Sequence[Space], evidence: Evidence) -> list[Scores]:
    """What the outputs of a unit's readers lose once all other units have made up for it."""
    return [
        removal_costs(
            [
                System.of(reader.kernel.matrix(), h, reader.units, space.count, evidence.ridge)
                for reader, h in zip(readers, squares, strict=True)
            ]
        )
        for space, readers, squares in _measured(spaces, evidence)
    ]


def by_likeness(spaces: Sequence[Space], evidence: Evidence) -> list[Scores]:
    """``1 - |cosine|`` to the unit that takes over for it; all readers of a space read the same value."""
    found = []
    for space, readers, squares in _measured(spaces, evidence):
        weight = np.hstack([reader.kernel.matrix() for reader in readers])
        found.append(merge_costs(squares[0], weight, readers[0].units, space.count))
    return found


def by_change(spaces: Sequence[Space], evidence: Evidence) -> list[Scores]:
    """Change of the model's outputs without the unit."""
    return output_change(evidence.model, spaces, evidence.samples())


def by_gradient(spaces: Sequence[Space], evidence: Evidence) -> list[Scores]:
    """``|dy / dgate|`` at an open gate: the change to first order."""
    return gate_gradients(evidence.model, spaces, evidence.samples())


CRITERIA: dict[str, Callable[[Sequence[Space], Evidence], list[Scores]]] = {
    "magnitude": by_magnitude,
    "activation": by_activation,
    "surgery": by_surgery,
    "likeness": by_likeness,
    "change": by_change,
    "gradient": by_gradient,
}
LOCAL = ("activation", "surgery", "likeness")  # criteria that look at what reads a unit


def unmeasured(cut: Cut, criterion: str) -> str | None:
    """Why a criterion says nothing of the units of a cut; ``None`` where it does."""
    if criterion not in LOCAL:
        return None
    readers = readers_of(cut)
    if not readers or len(readers) < len(sums_of(cut)):
        return "what reads it cannot be measured: choose another criterion"
    if criterion != "likeness":
        return None
    if len(taps_of(readers)) > 1:
        return "units that several values hold cannot be merged"
    places = inputs_of(readers[0].units, cut.count)
    return "units of different sizes cannot be merged" if places.max() >= len(readers[0].units) else None


def _measured(
    spaces: Sequence[Space], evidence: Evidence
) -> Iterator[tuple[Space, Sequence[Reader], Sequence[Square]]]:
    """The readers of each space and their Hessians, of as many spaces at a time as memory has room for."""
    rounds: list[list[tuple[Space, list[Reader]]]] = [[]]
    held = 0
    for space in spaces:
        readers = readers_of(space.found)
        size = sum(16 * tap.size * tap.size for tap in taps_of(readers))
        if rounds[-1] and held + size > BUDGET:
            rounds.append([])
            held = 0
        rounds[-1].append((space, readers))
        held += size
    for group in rounds:
        taps = taps_of([reader for _, readers in group for reader in readers])
        grams = measure_halves(evidence.model, taps, evidence.samples())
        for space, readers in group:
            yield space, readers, hessians(readers, grams)
