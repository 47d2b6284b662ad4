"""Choose the codes of weights by GPTQ: what ``weight-only`` stores afterwards, rounded for the least output error.

Products are taken in the order of the graph, and those that read one value together. With ``sequential``, every value
is measured on the model with all earlier products rounded already, so that later ones make up for what earlier ones
lost (Frantar et al. 2022, section 3.3); the weights of the model itself stay as they are, and the codes go into notes.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qexport.calibration.data import Dataset
from qexport.calibration.gram import Gram, Tap, by_tap, groups, measure
from qexport.errors import UsageError
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.fit import fitted
from qexport.passes.gptq_core import Rounding, gptq
from qexport.passes.groups import CODES_KEY, Codes, Grid, as_matrix, codes_of, misfit_groups, quantize_groups
from qexport.passes.lowbit import Choice, decision
from qexport.passes.match import add_constant, sweep
from qexport.passes.placement import Site
from qexport.passes.qdq import needs_half
from qexport.passes.target import Target, find_target

ROUNDING_KEY = "qexport.rounding"
UNSEEN = "not calibrated: no sample reached it"


@dataclass(frozen=True, slots=True)
class LayerError:
    """Squared output error over squared output on the calibration samples, left on the node.

    Attributes:
        nearest: Of rounding every weight to the nearest code.
        chosen: Of the codes that were chosen.
    """

    nearest: float
    chosen: float


@dataclass(frozen=True)
class Gptq(Pass):
    """Round weights to 8, 4 or 3 bits for the least output error (GPTQ); weight-only stores them."""

    exact: ClassVar[bool] = True

    data: Dataset | None = field(default=None, metadata={"bound": True})
    advance: Callable[[], None] = field(default=lambda: None, metadata={"bound": True})
    target: str = "tensorrt-rtx"
    samples: int = 128
    bits: Literal[8, 4, 3] = 4
    group: int = 128
    """Inputs that share a scale; 0 gives one scale to each output channel."""
    fit: bool = False
    """Whether a product whose inputs the group does not divide takes the largest multiple of 16 below it that does."""
    symmetric: bool = True
    """Whether there are no zero points; engines take none."""
    clip: bool = False
    """Whether the range of each group is the one of least squared error, instead of all of it."""
    damping: float = 0.01
    """Share of the Hessian's mean diagonal that is added to the diagonal."""
    act_order: bool = True
    """Whether inputs are rounded in the order of how much goes through them."""
    sequential: bool = True
    """Whether every product is measured behind rounded ones; the samples run once for each value that is read."""
    min_dim: int = 32
    """Smallest K and N of a product worth storing in few bits."""
    head: bool = True
    """Whether the product that makes an output of the model is stored in few bits too."""
    keep: tuple[str, ...] = ()
    """Names of nodes that are left to weight-only, which must keep them too if they are to stay in float."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise ValueError(f"damping must be finite and not below 0, got {self.damping!r}")
        for name, least in (("samples", 1), ("group", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def call(self, model: ir.Model) -> Outcome:
        """Leave ``Codes`` on weights and a ``LayerError`` on nodes; no data, or a group that fits not, is an error."""
        if self.data is None:
            raise UsageError("GPTQ needs calibration data", hint="give real samples with --calib")
        target = find_target(self.target)
        grids, refused = self._grids(model, target)
        taps, _ = by_tap(grids)
        rounds = [[tap] for tap in taps] if self.sequential else groups(taps)
        work = _Rounded(model)
        tick, modified, done = every(len(rounds), self.advance), False, []
        for tap, gram in self._measured(rounds, work.model if self.sequential else model, tick):
            for site, codes, error in self._rounded(taps[tap], gram, grids, target):
                modified |= _leave(site, codes, error)
                if self.sequential:
                    work.store(site, codes)
                done.append(_decided(site, error))
            if not gram.rows:
                refused += [decision(site.node, "skipped", UNSEEN) for site in taps[tap]]
        return Outcome(model, modified, (*done, *refused))

    def _grids(self, model: ir.Model, target: Target) -> tuple[dict[Site, Grid], list[Decision]]:
        """The products to round, each with its grid, and why others are not."""
        sites, refused = Choice(self.min_dim, self.keep, self.head).linears(model)
        wanted, grids = Grid(self.bits, self.group, self.symmetric), {}
        readers = Counter(site.node.inputs[1] for site in sites)
        for site in sites:
            weight = as_matrix(site)
            grid = fitted(wanted, len(weight), site.node.name or "", fit=self.fit)
            reason = misfit_groups(weight, grid, half=needs_half(target, site.kernel.dtype))
            if readers[site.node.inputs[1]] > 1:
                reason = "several products read its weight"
            if reason is None:
                grids[site] = grid
            else:
                refused.append(decision(site.node, "skipped", reason))
        return grids, refused

    def _measured(
        self, rounds: Sequence[Sequence[Tap]], model: ir.Model, advance: Callable[[], None]
    ) -> Iterator[tuple[Tap, Gram]]:
        """Gram matrices of one round after the other, each of the model as it is by then."""
        assert self.data is not None
        for taps in rounds:
            yield from measure(model, taps, islice(self.data, self.samples), advance).items()

    def _rounded(
        self, sites: Sequence[Site], gram: Gram, grids: Mapping[Site, Grid], target: Target
    ) -> Iterator[tuple[Site, Codes, LayerError]]:
        """Round the weights that read one value, side by side: the outputs of a product know nothing of each other."""
        if not gram.rows:
            return
        half = any(needs_half(target, site.kernel.dtype) for site in sites)
        how = Rounding(self.damping, self.act_order, half=half, clip=self.clip)
        weights = [as_matrix(site) for site in sites]
        together, grid = np.concatenate(weights, axis=1), grids[sites[0]]
        parts = np.cumsum([0, *(weight.shape[1] for weight in weights)])
        best, nearest = (
            gptq(together, gram.hessian, grid, how),
            quantize_groups(together, grid, half=half, clip=self.clip),
        )
        for site, weight, start, end in zip(sites, weights, parts, parts[1:], strict=False):
            codes = [columns(found, start, end) for found in (nearest, best)]
            power = max(gram.error(weight), 1e-30)
            errors = [gram.error(weight - found.dequantize()) / power for found in codes]
            yield site, codes[errors[1] < errors[0]], LayerError(errors[0], min(errors))


class _Rounded:
    """A copy of a model whose weights become what their codes stand for."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model.clone()
        self._makers = {node.outputs[0].name: node for node in self.model.graph}

    def store(self, site: Site, codes: Codes) -> None:
        """Put the rounded weight in place of the float one."""
        node, weight = self._makers[site.node.outputs[0].name], codes.dequantize()
        old = node.inputs[1]
        numbers = (weight if site.axis == 1 else weight.T).astype(site.kernel.dtype.numpy())
        node.replace_input_with(1, add_constant(node, f"{site.node.name}/rounded", np.ascontiguousarray(numbers)))
        sweep([old] if old is not None else [])


def columns(codes: Codes, start: int, end: int) -> Codes:
    """The codes of some outputs."""
    zero = None if codes.zero is None else codes.zero[:, start:end]
    return Codes(codes.values[:, start:end], codes.scale[:, start:end], zero, codes.grid)


def every(count: int, advance: Callable[[], None]) -> Callable[[], None]:
    """Call ``advance`` at every ``count``-th call: the progress of one round over the samples, for many."""
    calls = itertools.count(1)

    def tick() -> None:
        if next(calls) % count == 0:
            advance()

    return tick


def _leave(site: Site, codes: Codes, error: LayerError) -> bool:
    """Leave notes; whether they are new."""
    weight = site.node.inputs[1]
    assert weight is not None
    before = codes_of(weight)
    weight.meta[CODES_KEY], site.node.meta[ROUNDING_KEY] = codes, error
    return before is None or not _same(before, codes)


def _same(one: Codes, other: Codes) -> bool:
    pairs = ((one.values, other.values), (one.scale, other.scale), (one.zero, other.zero))
    return one.grid == other.grid and all(np.array_equal(a, b) for a, b in pairs if a is not None and b is not None)


def _decided(site: Site, error: LayerError) -> Decision:
    """What was gained, in whole decibels, so that equal gains can be counted."""
    gain = 10 * math.log10(max(error.nearest, 1e-30) / max(error.chosen, 1e-30))
    return decision(site.node, "rounded", f"{gain:.0f} dB less output error than to the nearest")
