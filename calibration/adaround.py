"""Choose for every weight whether it is rounded up or down, for the least error of the layer's output (AdaRound).

The weights stay what they are, also of what is left in float afterwards; the codes go into notes. ``quantize`` stores
those of 8 bits with one scale an output channel, ``weight-only`` all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.least import check_least
from qexport.calibration.reading.data import Dataset
from qexport.calibration.rounding import Steps, learn
from qexport.calibration.statistics.gram import by_tap, grams
from qexport.errors import UsageError
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.match import check_names
from qexport.passes.numbers.groups import (
    CODES_KEY,
    Codes,
    Grid,
    as_matrix,
    check_group,
    codes_of,
    misfit_groups,
    quantize_groups,
)
from qexport.passes.numbers.weights import CHOSEN_KEY, Chosen, chosen_for, misfit, quantize_weight
from qexport.passes.placement import Site, plan
from qexport.passes.target import Target, find_target
from qexport.passes.writing.lowbit import Choice
from qexport.passes.writing.qdq import needs_half

CHOSEN = "its codes are chosen already"
TIED = "several nodes read its weight"
UNSEEN = "not calibrated: no sample reached it"
INT8 = 8
REACH = 127  # codes of 8 bits are symmetric
Matrix = NDArray[np.float32]  # [K, N]


@dataclass(frozen=True)
class AdaRound(Pass):
    """Learn which way weights are rounded, for the least error of each layer's output."""

    exact: ClassVar[bool] = True
    one_at_a_time: ClassVar[bool] = True

    data: Dataset | None = field(default=None, metadata={"bound": True})
    advance: Callable[[], None] = field(default=lambda: None, metadata={"bound": True})
    target: str = "tensorrt-rtx"
    samples: int = 512
    bits: Literal[8, 4, 3] = 8
    """8 without groups is for quantize, everything else for weight-only."""
    group: int = 0
    """Inputs that share a scale; 0 gives one scale to each output channel."""
    iterations: int = 300
    keep: tuple[str, ...] = ()
    """Names of nodes that are left alone."""

    def __post_init__(self) -> None:
        check_least("adaround", self, iterations=1, samples=1, group=0)

    def call(self, model: ir.Model) -> Outcome:
        """Round every layer with a constant weight; no data, or a group that does not fit, is a ``UsageError``."""
        if self.data is None:
            raise UsageError("learned rounding needs calibration data", hint="give real samples with --calib")
        check_names(self.keep, model)
        way = self._way()
        opened, decisions = self._open(model, way)
        taps, refused = by_tap(opened)
        decisions += [_decision(site, "skipped", reason) for site, reason in refused.items()]
        modified = False
        for tap, gram in grams(model, taps, islice(self.data, self.samples), advance=self.advance):
            sites = taps[tap]
            if not gram.rows:
                decisions += [_decision(site, "skipped", UNSEEN) for site in sites]
                continue
            steps = _together([opened[site] for site in sites])
            codes = learn(steps, gram.hessian / gram.rows, self.iterations)
            ends = np.cumsum([opened[site].weight.shape[1] for site in sites])
            for site, chosen in zip(sites, np.split(codes, ends[:-1], axis=1), strict=True):
                better = not np.array_equal(chosen, opened[site].nearest)
                way.leave(site, opened[site], chosen)
                modified = True
                reason = "rounding learned" if better else "nearest rounding is the best"
                decisions.append(_decision(site, "folded" if better else "skipped", reason))
        return Outcome(model, modified, tuple(decisions))

    def _way(self) -> _Way:
        target = find_target(self.target)
        if self.bits == INT8 and not self.group:
            return _Channels(target)
        return _Groups(target, Grid(self.bits, self.group))

    def _open(self, model: ir.Model, way: _Way) -> tuple[dict[Site, Steps], list[Decision]]:
        """The sites to round, each with its grid, and why others are not."""
        sites, refused = way.sites(model)
        opened = {}
        for site in sites:
            steps = "left alone by name" if site.node.name in self.keep else way.open(site)
            if isinstance(steps, Steps):
                opened[site] = steps
            else:
                refused.append(_decision(site, "skipped", steps))
        return opened, refused


class _Way(Protocol):
    """Which weights are rounded to what, and where the codes go."""

    def sites(self, model: ir.Model) -> tuple[list[Site], list[Decision]]:
        """The nodes whose weights are stored in few bits, and why others are not."""

    def open(self, site: Site) -> Steps | str:
        """The weight and its grid, or why it is left alone."""

    def leave(self, site: Site, steps: Steps, codes: Matrix) -> None:
        """Note the codes on the weight."""


@dataclass(frozen=True, slots=True)
class _Channels:
    """Int8 with one scale an output channel, as ``quantize`` stores it."""

    target: Target

    def sites(self, model: ir.Model) -> tuple[list[Site], list[Decision]]:
        found = plan(model, self.target)
        return [site for site in found.roots if site.weight is not None], list(found.refused)

    def open(self, site: Site) -> Steps | str:
        held, half = site.node.inputs[1], self._half(site)
        if chosen_for(held, site.kernel, site.axis, half=half) is not None:
            return CHOSEN
        if held is None or len(held.uses()) > 1:
            return TIED
        kernel = np.asarray(site.kernel.numpy(), np.float32)
        reason = misfit(kernel, site.axis, half=half)
        if reason is not None:
            return reason
        scale = quantize_weight(kernel, site.axis, half=half)[1][None]
        ends = np.full_like(scale, REACH)
        return Steps(_as_columns(kernel, site.axis), scale, -ends, ends)

    def leave(self, site: Site, steps: Steps, codes: Matrix) -> None:
        held, shape = site.node.inputs[1], np.moveaxis(site.kernel.numpy(), site.axis, -1).shape
        assert held is not None
        numbers = np.moveaxis(codes.astype(np.int8).reshape(shape), -1, site.axis)
        scale, half = steps.scale[0], self._half(site)
        held.meta[CHOSEN_KEY] = Chosen(np.ascontiguousarray(numbers), scale, site.axis, half, site.kernel)

    def _half(self, site: Site) -> bool:
        return needs_half(self.target, site.kernel.dtype)


@dataclass(frozen=True, slots=True)
class _Groups:
    """Fewer bits or groups, as ``weight-only`` stores them."""

    target: Target
    grid: Grid

    def sites(self, model: ir.Model) -> tuple[list[Site], list[Decision]]:
        return Choice().linears(model)

    def open(self, site: Site) -> Steps | str:
        weight, held = as_matrix(site), site.node.inputs[1]
        check_group(self.grid, len(weight), site.node.name or "")
        if codes_of(held) is not None:
            return CHOSEN
        if held is None or len(held.uses()) > 1:
            return TIED
        half = needs_half(self.target, site.kernel.dtype)
        reason = misfit_groups(weight, self.grid, half=half)
        if reason is not None:
            return reason
        scale = np.repeat(quantize_groups(weight, self.grid, half=half).scale, self.grid.rows(len(weight)), axis=0)
        ends = np.ones((1, weight.shape[1]), np.float32)
        return Steps(weight, scale, self.grid.low * ends, self.grid.high * ends)

    def leave(self, site: Site, steps: Steps, codes: Matrix) -> None:
        held = site.node.inputs[1]
        assert held is not None
        scale = steps.scale[:: self.grid.rows(len(codes))]
        held.meta[CODES_KEY] = Codes(codes.astype(np.int8), scale, None, self.grid)


def _together(parts: Sequence[Steps]) -> Steps:
    """Weights that read one value, side by side."""
    names = ("weight", "scale", "low", "high")
    return Steps(*(np.concatenate([getattr(part, name) for part in parts], axis=1) for name in names))


def _as_columns(kernel: NDArray[Any], axis: int) -> NDArray[Any]:
    """A weight as ``[K, N]``, output channels last; the rows of a convolution in the order of its patches."""
    return np.moveaxis(kernel, axis, -1).reshape(-1, kernel.shape[axis])


def _decision(site: Site, action: str, reason: str) -> Decision:
    return Decision(site.node.name or "", site.node.op_type, action, reason)
