"""How many units of which spaces stay: those with the highest scores, within a share of units or of work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.errors import UsageError
from qexport.passes.folding.axes import FREE, Ids
from qexport.passes.match import constant, dims
from qexport.passes.pruning.cut import Keep
from qexport.passes.pruning.spaces import Space

Scores = NDArray[np.float64]  # [units], what is lost without each
WEIGHTED = ("MatMul", "Gemm", "Conv", "ConvTranspose")
Cuts = dict[tuple[ir.Node, int], list[tuple[int, Ids]]]
STEPS = 256  # shares that are tried where every layer loses as much


@dataclass(frozen=True, slots=True)
class Budget:
    """What may stay.

    Attributes:
        keep: Share, above 0 and below 1.
        per: Whether every space keeps this share, or all of them together.
        of: What the share is of: the units, or the multiplications of the whole model.
        multiple: What the number of units that stay is a multiple of.
        where: The option, for errors.
    """

    keep: float
    per: Literal["layer", "model"]
    of: Literal["units", "work"] = "units"
    multiple: int = 1
    where: str = "keep"

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            what = f"the share that stays must be above 0 and below 1, got {self.keep!r}"
            raise UsageError(what, where=self.where, hint="to leave all as it is, disable the step")

    def choose(self, model: ir.Model, spaces: Sequence[Space], scores: Sequence[Scores]) -> list[Keep]:
        """Return for each space which units stay, the first of equal scores; scores for their work where that counts.

        Raises:
            UsageError: Nothing would be left of a space.
        """
        share = _units
        if self.of == "work":
            work = Work(model, spaces)
            share = work.share
            scores = [row / np.maximum(work.of_units(place), 1) for place, row in enumerate(scores)]
        if self.per == "layer" and self.of == "units":
            return [
                self._largest(space, row, self.keep * space.count) for space, row in zip(spaces, scores, strict=True)
            ]
        if self.per == "layer":
            return self._first(lambda step: self._even(spaces, scores, 1 - step / STEPS), STEPS, share)
        order = _cheapest(scores)
        return self._first(lambda count: self._without(spaces, scores, order[:count]), len(order) + 1, share)

    def _first(
        self, tried: Callable[[int], list[Keep]], count: int, share: Callable[[Sequence[Keep]], float]
    ) -> list[Keep]:
        """The first of a row of ever smaller choices that is within the budget."""
        low, high = 0, count - 1
        least = share(tried(high))
        if least > self.keep + 1e-9:
            what = f"to keep {self.keep:g} of the {self.of} would leave nothing of a layer"
            raise UsageError(what, where=self.where, hint=f"keep more: {math.ceil(100 * least) / 100:g} at least")
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if share(tried(middle)) <= self.keep + 1e-9 else (middle + 1, high)
        return tried(low)

    def _even(self, spaces: Sequence[Space], scores: Sequence[Scores], part: float) -> list[Keep]:
        """The same part of every space, one unit at least."""
        wanted = (max(part * space.count, min(self.multiple, space.count)) for space in spaces)
        return [self._largest(space, row, count) for space, row, count in zip(spaces, scores, wanted, strict=True)]

    def _without(self, spaces: Sequence[Space], scores: Sequence[Scores], gone: NDArray[np.int64]) -> list[Keep]:
        """All units but those of ``gone``, rows of space and unit; every space keeps a multiple, and one at least."""
        lost = np.bincount(gone[:, 0], minlength=len(spaces))
        return [
            self._largest(space, row, max(space.count - int(count), min(self.multiple, space.count)))
            for space, row, count in zip(spaces, scores, lost, strict=True)
        ]

    def _largest(self, space: Space, scores: Scores, wanted: float) -> Keep:
        """The units with the highest scores, as many as the nearest multiple of ``wanted``."""
        count = min(round(wanted / self.multiple) * self.multiple, space.count)
        if count < 1:
            unit = f" in multiples of {self.multiple}" if self.multiple > 1 else ""
            what = f"to keep {self.keep:g} of {space.count} {space.kind}{unit} would leave nothing of {space.name!r}"
            raise UsageError(what, where=self.where, hint=f"keep more, or name it in {self.where.split('.')[0]}.spare")
        keep = np.zeros(space.count, bool)
        keep[np.argsort(-scores, kind="stable")[:count]] = True
        return keep


def _units(keeps: Sequence[Keep]) -> float:
    return float(np.concatenate(list(keeps)).mean())


def _cheapest(scores: Sequence[Scores]) -> NDArray[np.int64]:
    """Units of all spaces, ``[units, 2]`` of space and unit, the least score first."""
    rows = [(place, unit) for place, row in enumerate(scores) for unit in range(len(row))]
    return np.array(rows, np.int64).reshape(-1, 2)[np.argsort(np.concatenate(list(scores)), kind="stable")]


class Work:
    """The multiplications of a model's weights, and what cuts leave of them.

    A weight counts for each pixel of a convolution and each row of a product, of those that are known; one that loses
    inputs and outputs loses both shares.
    """

    def __init__(self, model: ir.Model, spaces: Sequence[Space]) -> None:
        self._counts = [space.count for space in spaces]
        self._cuts: Cuts = {}
        for place, space in enumerate(spaces):
            for slot in space.found.slots:
                self._cuts.setdefault((slot.node, slot.index), []).append((place, slot.ids))
        nodes = (node for node in model.graph if node.op_type in WEIGHTED and node.domain == "")
        self._base = {(node, index): _work(node, index) for node in nodes for index in _weights(node)}

    def share(self, keeps: Sequence[Keep]) -> float:
        """What is left of all work where ``keeps`` stays."""
        padded = [np.append(keep, True) for keep in keeps]
        left = 0.0
        for weight, base in self._base.items():
            for place, ids in self._cuts.get(weight, ()):
                base *= float(padded[place][ids].mean())
            left += base
        return left / max(sum(self._base.values()), 1e-30)

    def of_units(self, place: int) -> NDArray[np.float64]:
        """Multiplications that each unit of a space takes part in, ``[units]``."""
        found = np.zeros(self._counts[place])
        for weight, base in self._base.items():
            for own, ids in self._cuts.get(weight, ()):
                if own == place:
                    found += base / ids.size * np.bincount(ids[ids != FREE], minlength=len(found))
        return found


def _weights(node: ir.Node) -> list[int]:
    """The input that holds the weight, of a product either one."""
    found = [index for index in (1, 0) if constant(node.inputs[index]) is not None]
    return found[:1] if len(found) == 1 else []


def _work(node: ir.Node, index: int) -> float:
    kernel = constant(node.inputs[index])
    assert kernel is not None
    made = dims(node.inputs[0] if node.op_type == "ConvTranspose" else node.outputs[0]) or ()
    if node.op_type in ("Conv", "ConvTranspose"):
        places = made[2:]
    elif len(kernel.shape) != 2:
        places = ()
    else:
        places = made[1:-1] if index == 1 else (*made[1:-2], *made[-1:])
    return float(kernel.size) * float(np.prod([size for size in places if isinstance(size, int)]))
