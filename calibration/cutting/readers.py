"""The weights that read a space's units, as ``[K, N]`` with the unit of each input, and their repair after a cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.statistics.gram import Gram, Tap, tap_of
from qexport.calibration.statistics.halves import Halves
from qexport.calibration.zeros.kernels import Kernel, Matrix
from qexport.passes.folding.axes import FREE
from qexport.passes.numbers.gptq import Square
from qexport.passes.numbers.refit import RIDGE, best_ridge, centred, refit_rows, refit_rows_and_bias
from qexport.passes.numbers.removal import merge
from qexport.passes.placement import CHANNEL_AXIS, Site
from qexport.passes.pruning.cut import Cut, Keep, Slot
from qexport.passes.pruning.spaces import attends
from qexport.passes.writing.bias import bias_refusal, raise_bias

Units = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """A product or convolution without groups that sums over the units.

    Attributes:
        kernel: Its weight.
        tap: What it reads.
        units: The unit of each input, ``[K]``; ``FREE`` for none.
        outputs: The unit of each output, ``[N]``, where the same units are among these too; ``FREE`` elsewhere.
    """

    kernel: Kernel
    tap: Tap
    units: Units
    outputs: Units

    @property
    def node(self) -> ir.Node:
        """The product."""
        return self.kernel.site.node


def sums_of(cut: Cut) -> list[Slot]:
    """The weights that sum over the units; not those of an attention itself, which sum over the numbers of a head."""
    return [slot for slot in cut.consumers if not attends(slot.node)]


def readers_of(cut: Cut) -> list[Reader]:
    """All readers of a cut whose inputs can be measured."""
    found = (_reader(slot, cut.slots) for slot in sums_of(cut))
    return [reader for reader in found if reader is not None]


def _reader(slot: Slot, slots: Sequence[Slot]) -> Reader | None:
    node = slot.node
    if slot.index != 1 or node.op_type not in ("Conv", "Gemm", "MatMul") or node.domain != "":
        return None
    site = Site(node, (0,), 1, CHANNEL_AXIS[node.op_type](node))
    tap = tap_of(site)
    if isinstance(tap, str):
        return None
    kernel = Kernel(site)
    units = kernel.laid(slot.ids)[:, 0]
    own = [
        kernel.laid(other.ids)[0] for other in slots if other.node is node and other.index == 1 and other is not slot
    ]
    return Reader(kernel, tap, units, own[0] if own else np.full(kernel.outputs, FREE))


@dataclass(frozen=True, slots=True, eq=False)
class Repair:
    """What to write into a reader once its units are gone.

    Attributes:
        reader: The reader.
        weight: What its weight will be, ``[kept K, kept N]``.
        shift: What to add to its bias, ``[kept N]``; ``None`` where it has none and takes none.
        masked: Squared output error over squared output without repair, on the samples.
        left: The same with repair.
    """

    reader: Reader
    weight: Matrix
    shift: NDArray[np.float64] | None
    masked: float
    left: float

    def write(self) -> None:
        """Put the numbers in place; the cut has been applied."""
        self.reader.kernel.store(self.weight)
        if self.shift is not None:
            raise_bias(self.reader.node, self.shift)


def repair(reader: Reader, halves: Halves, keep: Keep, ridge: float | None) -> Repair | None:
    """Fit a reader to what stays, on two halves of the samples; ``None`` where nothing was seen."""
    one, other = (_moments(reader, half) for half in halves)
    if not one.rows and not other.rows:
        return None
    both = one + other
    weight, padded = reader.kernel.matrix(), np.append(keep, True)
    stay, columns = padded[reader.units], padded[reader.outputs]
    absorbs = bias_refusal(reader.node) is None
    mask = np.broadcast_to(stay[:, None], weight.shape)
    squares = (one.centred, other.centred) if absorbs else (one.square, other.square)
    searched = ridge is None and one.rows > 0 and other.rows > 0
    chosen = best_ridge(weight, squares, mask) if searched else RIDGE if ridge is None else ridge
    if absorbs:
        fitted, shift = refit_rows_and_bias(weight, both.square, both.total, both.rows, stay, chosen)
    else:
        fitted, shift = refit_rows(weight, both.square, stay, chosen), np.zeros(weight.shape[1])
    wide = np.zeros_like(weight)
    wide[stay] = fitted
    masked = both.error(np.where(mask, 0.0, weight)) / both.energy(weight)
    left = both.error(weight - wide, shift) / both.energy(weight)
    return Repair(reader, fitted[:, columns], shift[columns] if absorbs else None, masked, left)


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over all rows x that a reader reads.

    Attributes:
        square: Of ``x^T x``, ``[K, K]``.
        total: Of x, ``[K]``.
        rows: How many.
    """

    square: Square
    total: NDArray[np.float64]
    rows: int

    def __add__(self, other: Moments) -> Moments:
        """The sums over the rows of both."""
        return Moments(self.square + other.square, self.total + other.total, self.rows + other.rows)

    @property
    def centred(self) -> Square:
        """Of ``(x - mean)^T (x - mean)``."""
        return centred(self.square, self.total, self.rows)

    def energy(self, weight: Matrix) -> float:
        """Sum of ``|x W|^2``."""
        return max(self.error(weight), 1e-30)

    def error(self, gap: Matrix, shift: NDArray[np.float64] | None = None) -> float:
        """Sum of ``|x gap - shift|^2``."""
        found = float(np.sum(gap * (self.square @ gap)))
        if shift is not None:
            found += float(self.rows * (shift @ shift) - 2 * (self.total @ gap) @ shift)
        return max(found, 0.0)


def _moments(reader: Reader, gram: Gram) -> Moments:
    return Moments(reader.kernel.hessian(gram), reader.kernel.row(gram.total), gram.rows)


def taps_of(readers: Sequence[Reader]) -> list[Tap]:
    """What readers read, each once."""
    return list(dict.fromkeys(reader.tap for reader in readers))


def hessians(readers: Sequence[Reader], grams: Mapping[Tap, Halves]) -> list[Square]:
    """``X^T X`` of each reader over all samples."""
    return [sum((reader.kernel.hessian(half) for half in grams[reader.tap]), np.zeros(())) for reader in readers]


def merged(readers: Sequence[Reader], squares: Sequence[Square], keep: Keep) -> list[Repair]:
    """What to write where every unit that goes is added to the one of those that stay that it is most like."""
    found = []
    for reader, square in zip(readers, squares, strict=True):
        old = reader.kernel.matrix()
        new = merge(square, old, reader.units, keep)
        padded = np.append(keep, True)
        stay, columns = padded[reader.units], padded[reader.outputs]
        moments = Moments(square, np.zeros(len(square)), 0)
        energy = moments.energy(old)
        masked = moments.error(np.where(stay[:, None], 0.0, old)) / energy
        found.append(Repair(reader, new[stay][:, columns], None, masked, moments.error(old - new) / energy))
    return found
