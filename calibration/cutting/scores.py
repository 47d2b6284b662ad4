"""What is lost without each unit, by criterion: the units with the smallest numbers go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.cutting.gates import gate_gradients, output_change
from qexport.calibration.cutting.readers import Reader, hessians, readers_of, taps_of
from qexport.calibration.few_bits import every
from qexport.calibration.halves import measure_halves
from qexport.calibration.reading.data import Sample
from qexport.calibration.statistics.gram import BUDGET
from qexport.passes.folding.axes import FREE
from qexport.passes.match import array
from qexport.passes.numbers.gptq import Square
from qexport.passes.numbers.removal import System, merge_costs, removal_costs
from qexport.passes.pruning.cut import Cut
from qexport.passes.pruning.spaces import Space

Scores = NDArray[np.float64]
Merges = list[tuple[int, int, float]]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What scores are made from.

    Attributes:
        model: The model as it is before any cut.
        samples: Makes a fresh run over the samples.
        advance: Called for each sample, once for all runs together.
        ridge: For what makes up for a loss.
    """

    model: ir.Model
    samples: Callable[[], Iterator[Sample]]
    advance: Callable[[], None]
    ridge: float


def by_magnitude(spaces: Sequence[Space], evidence: Evidence) -> list[Scores]:
    """Squared norm of a unit's weights, as a share of each weight's (Li et al. 2016, "Pruning Filters", with L2)."""
    return [_norms(_cut(space)) for space in spaces]


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
        np.sum([_energies(reader, h) for reader, h in zip(readers, squares, strict=True)], axis=0)
        for readers, squares in _measured(spaces, evidence)
    ]


def _energies(reader: Reader, hessian: Square) -> Scores:
    system = System.of(reader.kernel.matrix(), hessian, reader.units)
    rows = system.weight[system.inputs]
    block = hessian[system.inputs[:, :, None], system.inputs[:, None, :]]
    return np.asarray(np.sum(rows * (block @ rows), axis=(1, 2)) / system.total)


def by_surgery(spaces: Sequence[Space], evidence: Evidence) -> list[Scores]:
    """What the outputs of a unit's readers lose once all other units have made up for it."""
    return [
        removal_costs(
            [
                System.of(reader.kernel.matrix(), h, reader.units, evidence.ridge)
                for reader, h in zip(readers, squares, strict=True)
            ]
        )
        for readers, squares in _measured(spaces, evidence)
    ]


def by_likeness(spaces: Sequence[Space], evidence: Evidence) -> list[Scores]:
    """``1 - |cosine|`` to the unit that takes over for it."""
    return [merges_of(readers, squares)[0] for readers, squares in _measured(spaces, evidence)]


def merges_of(readers: Sequence[Reader], squares: Sequence[Square]) -> tuple[Scores, Merges]:
    """The merges of the units that ``readers`` read; all must read the same value, ``ValueError`` otherwise."""
    if len({reader.tap for reader in readers}) != 1:
        raise ValueError("units that several values hold cannot be merged")
    return merge_costs(squares[0], np.hstack([reader.kernel.matrix() for reader in readers]), readers[0].units)


def by_change(spaces: Sequence[Space], evidence: Evidence) -> list[Scores]:
    """Change of the model's outputs without the unit."""
    return output_change(evidence.model, spaces, evidence.samples(), evidence.advance)


def by_gradient(spaces: Sequence[Space], evidence: Evidence) -> list[Scores]:
    """``|dy / dgate|`` at an open gate: the change to first order."""
    return gate_gradients(evidence.model, spaces, evidence.samples(), evidence.advance)


CRITERIA: dict[str, Callable[[Sequence[Space], Evidence], list[Scores]]] = {
    "magnitude": by_magnitude,
    "activation": by_activation,
    "surgery": by_surgery,
    "likeness": by_likeness,
    "change": by_change,
    "gradient": by_gradient,
}
LOCAL = ("activation", "surgery", "likeness")  # criteria that look at what reads a unit


def _measured(spaces: Sequence[Space], evidence: Evidence) -> Iterator[tuple[list[Reader], list[Square]]]:
    """The readers of each space and their Hessians, of as many spaces at a time as memory has room for."""
    rounds: list[list[list[Reader]]] = [[]]
    held = 0
    for space in spaces:
        readers = readers_of(_cut(space))
        size = sum(16 * tap.size * tap.size for tap in taps_of(readers))
        if rounds[-1] and held + size > BUDGET:
            rounds.append([])
            held = 0
        rounds[-1].append(readers)
        held += size
    advance = every(len(rounds), evidence.advance)
    for group in rounds:
        taps = taps_of([reader for readers in group for reader in readers])
        grams = measure_halves(evidence.model, taps, evidence.samples(), advance)
        for readers in group:
            yield readers, hessians(readers, grams)


def _cut(space: Space) -> Cut:
    assert isinstance(space.cut, Cut)
    return space.cut
