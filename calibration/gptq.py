"""Choose the codes of weights by GPTQ: what ``weight-only`` stores afterwards, rounded for the least output error.

Products are taken in the order of the graph, and those that read one value together (Frantar et al. 2022). With
``sequential``, every value is measured on the model with all earlier products rounded already, so that later ones make
up for what earlier ones lost (section 4 there, "Setup"); the weights of the model itself stay as they are, and the
codes go into notes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qexport.calibration.few_bits import UNSEEN, FewBits
from qexport.calibration.statistics.gram import Gram, by_tap, groups
from qexport.passes.base import Decision, Outcome
from qexport.passes.match import add_constant, sweep
from qexport.passes.numbers.gptq import Rounding, gptq
from qexport.passes.numbers.groups import CODES_KEY, Codes, Grid, as_matrix, codes_of, quantize_groups
from qexport.passes.placement import Site
from qexport.passes.target import Target, find_target
from qexport.passes.writing.lowbit import decision
from qexport.passes.writing.qdq import needs_half

ROUNDING_KEY = "qexport.rounding"


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
class Gptq(FewBits):
    """Round weights to 8, 4 or 3 bits for the least output error (GPTQ); weight-only stores them."""

    exact: ClassVar[bool] = True

    clip: bool = False
    """Whether the range of each group is the one of least squared error, instead of all of it."""
    damping: float = 0.01
    """Share of the Hessian's mean diagonal that is added to the diagonal."""
    act_order: bool = True
    """Whether inputs are rounded in the order of how much goes through them."""
    sequential: bool = False
    """Whether every product is measured behind rounded ones; the samples run once for each value that is read, many
    times as long, and the decoder of the benchmarks does not gain by it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise ValueError(f"damping must be finite and not below 0, got {self.damping!r}")

    def call(self, model: ir.Model) -> Outcome:
        """Leave ``Codes`` on weights and a ``LayerError`` on nodes; no data, or a group that fits not, is an error."""
        grids, refused = self.chosen(model)
        target, (taps, _) = find_target(self.target), by_tap(grids)
        rounds = [[tap] for tap in taps] if self.sequential else groups(taps)
        work = _Rounded(model)
        modified, done = False, []
        for tap, gram in self.measured(rounds, work.model if self.sequential else model):
            for site, codes, error in self._rounded(taps[tap], gram, grids, target):
                modified |= _leave(site, codes, error)
                done.append(_decided(site, error))
                if self.sequential:
                    work.store(site, codes)
            if not gram.rows:
                refused += [decision(site.node, "skipped", UNSEEN) for site in taps[tap]]
        return Outcome(model, modified, (*done, *refused))

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
