"""Make up for a removed block by a scale and an offset of each channel of what stands in for it.

Both go into the normalization that makes the value, so that the model has no node more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.cutting.influence import change, demand_numbers, positions, side_by_side
from qexport.calibration.reading.data import Sample
from qexport.passes.folding.activation import ACTIVATION_KEY
from qexport.passes.match import add_constant, array, maker, producer, sweep
from qexport.passes.numbers.notes import forget_layer, forget_range
from qexport.passes.pruning.blocks import Block

WITH_OFFSET = ("LayerNormalization",)
WITHOUT_OFFSET = ("RMSNormalization", "SimplifiedLayerNormalization")
SHARED = "not repaired: others read what stands in for it"
NO_NORM = "not repaired: no normalization makes what stands in for it"
NO_GAIN = "not repaired: no better on the other half of the samples"

Channels = NDArray[np.float64]  # [channels]


Sums = NDArray[np.float64]  # [5, channels]: of 1, x, y, x x and x y, x the value and y what it is to be like
Removed = tuple[ir.Model, ir.Node | None]  # a model without a block, and the node that makes what was its entry


@dataclass(frozen=True, slots=True)
class Trial:
    """What to fit, and how far to go there from leaving things as they are."""

    share: float
    scale: bool
    offset: bool


SHARES = (0.25, 0.5, 1.0)
TRIALS = tuple(Trial(share, scale, offset=True) for share in SHARES for scale in (True, False))
SCALES = tuple(Trial(share, scale=True, offset=False) for share in SHARES)


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """What a value is multiplied with, and what is added then, channel by channel, ``[channels]``."""

    scale: Channels
    offset: Channels


def why_not(block: Block) -> str | None:
    """Why nothing can make up for a block; ``None`` if its entry's normalization can."""
    norm = producer(block.entry, *WITH_OFFSET, *WITHOUT_OFFSET)
    if norm is None or any(array(value) is None for value in norm.inputs[1:] if value is not None):
        return NO_NORM
    return None if block.is_private else SHARED


def fit(
    work: tuple[ir.Model, Block], whole: tuple[ir.Model, str], samples: Sequence[Sample], without: Callable[[], Removed]
) -> Affine | str:
    """Return what brings a block's entry nearer to a value of the whole model; or why nothing is gained.

    A line by least squares, or an offset alone, and how far to go there, for what is nearest need not be best for the
    layers behind: what is fitted to one half of the samples must bring the outputs of the model nearer on the other.

    Args:
        work: The model as it is now, and the block that will be removed from it.
        whole: The model as it was, and the value that the block's exit stands for.
        samples: What to measure on.
        without: Makes a copy of the model without the block.

    Raises:
        DataInvalid: NaN or infinity.
    """
    reason = why_not(work[1])
    if reason is not None:
        return reason
    halves = [samples[::2], samples[1::2]]
    sums = [_measure(work, whole, half) for half in halves if half]
    if len(sums) < len(halves):
        return NO_GAIN
    trials = [None, *TRIALS] if maker(work[1].entry).op_type in WITH_OFFSET else [None, *SCALES]
    rated = {trial: _change(without(), sums[0], trial, (whole[0], halves[1])) for trial in trials}
    best = min(trials, key=rated.__getitem__)
    there, back = (_change(without(), sums[1], trial, (whole[0], halves[0])) for trial in (best, None))
    return NO_GAIN if best is None or there >= back else solve(sums[0] + sums[1], best)


def solve(sums: Sums, trial: Trial) -> Affine:
    """The share of the least-squares line of each channel; channels that are constant are moved alone."""
    n, x, y, xx, xy = sums
    if trial.offset:
        spread, joint = xx - x * x / n, xy - x * y / n
    else:
        spread, joint = xx, xy
    fitted = trial.scale & (spread > 1e-9 * np.maximum(xx, 1e-30))
    scale = np.divide(joint, spread, out=np.ones_like(spread), where=fitted)
    offset = (y - scale * x) / n if trial.offset else np.zeros_like(scale)
    return Affine(1 + trial.share * (scale - 1), trial.share * offset)


def fold(norm: ir.Node, affine: Affine) -> None:
    """Let a normalization make what it made, scaled and moved; constants that others read stay as they are."""
    for index, moved in ((1, 0.0), (2, affine.offset)):
        old = norm.inputs[index] if len(norm.inputs) > index else None
        numbers = array(old)
        if numbers is None and (norm.op_type not in WITH_OFFSET or not np.any(moved)):
            continue
        like = array(norm.inputs[1])
        assert like is not None
        held = np.zeros(affine.scale.shape) if numbers is None else numbers.astype(np.float64)
        name = str(old.name) if old is not None else f"{norm.name}/bias"
        norm.resize_inputs(max(len(norm.inputs), index + 1))
        norm.replace_input_with(index, None)
        sweep([old])
        norm.replace_input_with(index, add_constant(norm, name, (held * affine.scale + moved).astype(like.dtype)))
    forget_layer(norm)
    forget_range(norm.outputs[0])
    norm.outputs[0].meta.pop(ACTIVATION_KEY, None)


def _measure(work: tuple[ir.Model, Block], whole: tuple[ir.Model, str], samples: Sequence[Sample]) -> Sums:
    """Sums over all positions of each channel of the entry, and of what it is to be like."""
    entry, target = str(work[1].entry.name), whole[1]
    total: Sums | None = None
    for index, one, other in side_by_side((work[0], [entry]), (whole[0], [target]), samples):
        x, y = positions(one[entry], -1), positions(other[target], -1)
        ones = np.full(x.shape[1], float(len(x)))
        sums = np.stack([ones, x.sum(0), y.sum(0), (x * x).sum(0), (x * y).sum(0)])
        demand_numbers(index, {entry: sums})
        total = sums if total is None else total + sums
    assert total is not None
    return total


def _change(removed: Removed, sums: Sums, trial: Trial | None, judge: tuple[ir.Model, Sequence[Sample]]) -> float:
    """How far the outputs without the block are from those of the whole model."""
    model, norm = removed
    if trial is not None and norm is not None:
        fold(norm, solve(sums, trial))
    return change(judge[0], model, judge[1])
