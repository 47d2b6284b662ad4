"""Choose for every weight whether it is rounded up or down, for the least error of the layer's output (AdaRound).

The weights stay what they are, also of what is left in float afterwards; the codes go into notes. ``quantize`` stores
those of 8 bits with one scale an output channel, ``weight-only`` all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.few_bits import UNSEEN, FewBits
from qexport.calibration.least import check_least
from qexport.calibration.rounding import Steps, learn
from qexport.calibration.statistics.gram import by_tap, groups
from qexport.passes.base import Decision, Outcome
from qexport.passes.match import check_names
from qexport.passes.numbers.groups import CODES_KEY, Codes, Grid, as_matrix, codes_of, quantize_groups
from qexport.passes.numbers.weights import CHOSEN_KEY, Chosen, chosen_for, misfit, quantize_weight
from qexport.passes.placement import Site, plan
from qexport.passes.target import Target, find_target
from qexport.passes.writing.lowbit import decision
from qexport.passes.writing.qdq import needs_half

CHOSEN = "its codes are chosen already"
TIED = "several nodes read its weight"
KEPT = "left alone by name"
INT8 = 8
REACH = 127  # codes of 8 bits are symmetric
Matrix = NDArray[np.float32]  # [K, N]


@dataclass(frozen=True, slots=True)
class Task:
    """A weight to be rounded.

    Attributes:
        steps: Makes the weight and its grid; not before its turn, or all weights would be held once more.
        leave: Notes the codes, ``[K, N]``.
    """

    steps: Callable[[], Steps]
    leave: Callable[[Matrix], None]


Tasks = dict[Site, Task]


@dataclass(frozen=True)
class AdaRound(FewBits):
    """Learn which way weights are rounded, for the least error of each layer's output."""

    exact: ClassVar[bool] = True

    samples: int = 512
    bits: Literal[8, 4, 3] = 8
    """8 without groups is for quantize, which has one grid, so that the options below count for weight-only alone;
    everything else is for weight-only."""
    group: int = 0
    """Inputs that share a scale; 0 gives one scale to each output channel."""
    clip: bool = False
    """Whether the range of each group is the one of least squared error, instead of all of it."""
    iterations: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("adaround", self, iterations=1)

    def call(self, model: ir.Model) -> Outcome:
        """Round every layer with a constant weight; no data, or a group that does not fit, is a ``UsageError``."""
        self.demand_data()
        whole = self.bits == INT8 and not self.group
        tasks, decisions = self._channels(model) if whole else self._groups(model)
        taps, refused = by_tap(tasks)
        decisions += [decision(site.node, "skipped", reason) for site, reason in refused.items()]
        modified = False
        for tap, gram in self.measured(groups(taps), model):
            sites = taps[tap]
            if not gram.rows:
                decisions += [decision(site.node, "skipped", UNSEEN) for site in sites]
                continue
            parts = [tasks[site].steps() for site in sites]
            codes = learn(_together(parts), gram.hessian / gram.rows, self.iterations)
            ends = np.cumsum([part.weight.shape[1] for part in parts])
            for site, part, chosen in zip(sites, parts, np.split(codes, ends[:-1], axis=1), strict=True):
                tasks[site].leave(chosen)
                decisions.append(_decided(site, better=not np.array_equal(chosen, part.nearest)))
                modified = True
        return Outcome(model, modified, tuple(decisions))

    def _channels(self, model: ir.Model) -> tuple[Tasks, list[Decision]]:
        """What ``quantize`` stores in 8 bits, and why other layers are left alone."""
        check_names(self.keep, model)
        target = find_target(self.target)
        found = plan(model, target)
        tasks, refused = {}, list(found.refused)
        for site in found.roots:
            if site.weight is None:
                continue
            reason = KEPT if site.node.name in self.keep else _refusal(site, target)
            if reason is None:
                tasks[site] = _for_quantize(site, half=needs_half(target, site.kernel.dtype))
            else:
                refused.append(decision(site.node, "skipped", reason))
        return tasks, refused

    def _groups(self, model: ir.Model) -> tuple[Tasks, list[Decision]]:
        """What ``weight-only`` stores on the same grids, and why other products are left alone."""
        target = find_target(self.target)
        grids, refused = self.chosen(model)
        done = [site for site in grids if codes_of(site.node.inputs[1]) is not None]
        refused += [decision(site.node, "skipped", CHOSEN) for site in done]
        return {
            site: _for_weight_only(site, grid, half=needs_half(target, site.kernel.dtype), clip=self.clip)
            for site, grid in grids.items()
            if site not in done
        }, refused


def _refusal(site: Site, target: Target) -> str | None:
    """Why no codes are chosen for what ``quantize`` would store, if none are."""
    held, half = site.node.inputs[1], needs_half(target, site.kernel.dtype)
    if chosen_for(held, site.kernel, site.axis, half=half) is not None:
        return CHOSEN
    if held is None or len(held.uses()) > 1:
        return TIED
    return misfit(site.kernel.numpy(), site.axis, half=half)


def _for_quantize(site: Site, *, half: bool) -> Task:
    tensor, axis, held = site.kernel, site.axis, site.node.inputs[1]
    assert held is not None

    def steps() -> Steps:
        kernel = np.asarray(tensor.numpy(), np.float32)
        scale = quantize_weight(kernel, axis, half=half)[1][None]
        ends = np.full_like(scale, REACH)
        return Steps(_as_columns(kernel, axis), scale, -ends, ends)

    def leave(codes: Matrix) -> None:
        shape = np.moveaxis(tensor.numpy(), axis, -1).shape
        numbers = np.ascontiguousarray(np.moveaxis(codes.astype(np.int8).reshape(shape), -1, axis))
        _, scale = quantize_weight(tensor.numpy(), axis, half=half)
        held.meta[CHOSEN_KEY] = Chosen(numbers, scale, axis, half, tensor)

    return Task(steps, leave)


def _for_weight_only(site: Site, grid: Grid, *, half: bool, clip: bool) -> Task:
    held = site.node.inputs[1]
    assert held is not None

    def rounded() -> tuple[Matrix, Codes, Matrix]:
        """The weight, its nearest codes and the codes that stand for zero."""
        weight = as_matrix(site)
        nearest = quantize_groups(weight, grid, half=half, clip=clip)
        origin = np.zeros((1, weight.shape[1])) if nearest.zero is None else _wide(nearest.zero, len(weight))
        return weight, nearest, origin.astype(np.float32)

    def steps() -> Steps:
        weight, nearest, origin = rounded()
        return Steps(weight, _wide(nearest.scale, len(weight)), grid.low - origin, grid.high - origin)

    def leave(codes: Matrix) -> None:
        _, nearest, origin = rounded()
        held.meta[CODES_KEY] = Codes((codes + origin).astype(np.int8), nearest.scale, nearest.zero, grid)

    return Task(steps, leave)


def _together(parts: Sequence[Steps]) -> Steps:
    """Weights that read one value, side by side."""
    names = ("weight", "scale", "low", "high")
    return Steps(*(np.concatenate([getattr(part, name) for part in parts], axis=1) for name in names))


def _wide(numbers: NDArray[Any], k: int) -> NDArray[Any]:
    """What belongs to groups, ``[K / group, N]``, for each of ``k`` inputs."""
    return np.repeat(numbers, k // len(numbers), axis=0)


def _as_columns(kernel: NDArray[Any], axis: int) -> NDArray[Any]:
    """A weight as ``[K, N]``, output channels last; the rows of a convolution in the order of its patches."""
    return np.moveaxis(kernel, axis, -1).reshape(-1, kernel.shape[axis])


def _decided(site: Site, *, better: bool) -> Decision:
    if better:
        return decision(site.node, "folded", "rounding learned")
    return decision(site.node, "skipped", "nearest rounding is the best")
