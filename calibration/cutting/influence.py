"""How much a residual block does: by what it changes in its input, or in what the model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.reading.data import Sample
from qexport.calibration.statistics.collect import numbered, stream
from qexport.errors import DataInvalid
from qexport.passes.folding.flood import FLOATS
from qexport.passes.match import is_cache
from qexport.passes.pruning.blocks import Block

Rows = NDArray[np.float64]  # [positions, channels]
_HINT = "look for overflow in the model or in the sample"


def influences(
    model: ir.Model, blocks: Sequence[Block], samples: Iterable[Sample], advance: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Return one minus the mean cosine between a block's entry and exit over all positions, by its name.

    Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", equation 1.

    Raises:
        DataInvalid: NaN or infinity; entry and exit of other sizes.
    """
    ends = [(block, str(block.entry.name), str(block.exit.name)) for block in blocks]
    taps = list(dict.fromkeys(name for _, *names in ends for name in names))
    sums = {block.name: np.zeros(2) for block in blocks}
    for index, _, values in stream(model, taps, numbered(samples, advance)):
        for block, entry, out in ends:
            one, other = (positions(values[name], block.axis) for name in (entry, out))
            if one.shape != other.shape:
                what = f"block {block.name!r} makes {values[out].shape} of {values[entry].shape}"
                raise DataInvalid(what, where=f"sample {index}", hint="leave it alone: name it in layers.spare")
            sums[block.name] += _cosines(one, other).sum(), len(one)
        demand_numbers(index, sums)
    return {name: 1 - float(total / count) for name, (total, count) in sums.items() if count}


def change(
    model: ir.Model, other: ir.Model, samples: Sequence[Sample], advance: Callable[[], None] = lambda: None
) -> float:
    """Return how far the outputs of another model are from those of a model, relative to these.

    The mean over the outputs of the squared difference over the squared output, of which the root is taken.

    Raises:
        DataInvalid: NaN or infinity.
    """
    names = [str(value.name) for value in model.graph.outputs if value.dtype in FLOATS and not is_cache(value)]
    sums = {name: np.zeros(2) for name in names}
    for index, one, two in side_by_side((model, names), (other, names), samples, advance):
        for name in names:
            truth = one[name].astype(np.float64)
            sums[name] += np.square(two[name] - truth).sum(), np.square(truth).sum()
        demand_numbers(index, sums)
    shares = [gap / size for gap, size in sums.values() if size]
    return float(np.sqrt(np.mean(shares))) if shares else 0.0


def side_by_side(
    one: tuple[ir.Model, Sequence[str]],
    other: tuple[ir.Model, Sequence[str]],
    samples: Sequence[Sample],
    advance: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Mapping[str, NDArray[np.floating]], Mapping[str, NDArray[np.floating]]]]:
    """Yield the position of every distinct sample, and what values of two models are on it."""
    pairs = zip(
        stream(*one, numbered(samples, advance)),
        stream(*other, numbered(samples)),
        strict=True,
    )
    for (index, _, first), (_, _, second) in pairs:
        yield index, first, second


def positions(value: NDArray[np.floating], axis: int) -> Rows:
    """The vectors along an axis of a value."""
    return np.moveaxis(value, axis, -1).reshape(-1, value.shape[axis]).astype(np.float64)


def _cosines(one: Rows, other: Rows) -> NDArray[np.float64]:
    """Of each pair of rows; zeros are like zeros and unlike all else."""
    length = np.sqrt(np.square(one).sum(axis=1) * np.square(other).sum(axis=1))
    same = np.all(one == other, axis=1)
    with np.errstate(invalid="ignore"):
        found = np.divide((one * other).sum(axis=1), length, out=np.zeros(len(one)), where=length != 0)
    return np.where(same, 1.0, found)


def demand_numbers(index: int, sums: Mapping[str, NDArray[np.float64]]) -> None:
    """Raise ``DataInvalid`` where a sum is NaN or infinite."""
    for name, pair in sums.items():
        if not np.isfinite(pair).all():
            raise DataInvalid(f"NaN or infinity at {name!r}", where=f"sample {index}", hint=_HINT)
