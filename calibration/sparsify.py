"""Set weights of products and convolutions to zero, in any share or 2:4, and let what stays make up for them.

Weights are taken as ``[K, N]`` with the inputs in the order in which engines group them: those of a convolution by the
position in its kernel first, so that 2:4 lies along its input channels. The pattern is put into float weights, where
zero is zero, and survives symmetric quantization, which stores a zero as a zero.

Layers are pruned in the order of the graph. With ``sequential``, every layer is measured on the model with all earlier
ones pruned already, so that it makes up for what they lost; the model itself is edited once all is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.few_bits import UNSEEN, every
from qexport.calibration.gradients.saliency import weight_saliency
from qexport.calibration.least import check_least
from qexport.calibration.reading.data import Dataset, Sample
from qexport.calibration.statistics.gram import BUDGET, Gram, Tap, groups
from qexport.calibration.statistics.halves import Halves, measure_halves
from qexport.calibration.zeros.choice import Choice
from qexport.calibration.zeros.kernels import Kernel
from qexport.calibration.zeros.orders import reorder_neurons
from qexport.errors import UsageError
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.folding.activation import ACTIVATION_KEY
from qexport.passes.numbers.masks import Mask, Pattern, Scope, Scores, keep_mask, magnitude, wanda
from qexport.passes.numbers.notes import forget_layer, forget_range
from qexport.passes.numbers.refit import RIDGE, best_ridge, refit
from qexport.passes.numbers.sparse_gpt import sparse_gpt
from qexport.passes.placement import Site
from qexport.passes.target import find_target
from qexport.passes.writing.lowbit import decision
from qexport.passes.writing.quantized import quantized_nodes

SPARSITY_KEY = "qexport.sparsity"
_COMPARABLE = ("magnitude", "gradient")  # criteria whose scores mean the same in all layers
SPARED = "other layers have smaller numbers"
Matrix = NDArray[np.float64]  # [K, N]


@dataclass(frozen=True, slots=True)
class LayerLoss:
    """Squared output error over squared output on the calibration samples, left on the node; NaN without samples.

    Attributes:
        masked: Of the float weight without the numbers that go.
        left: Of the weight that is stored.
    """

    masked: float
    left: float


@dataclass(frozen=True)
class Sparsify(Pass):
    """Set weights to zero, in any share or 2:4, and fit what stays to the outputs (SparseGPT, least squares)."""

    exact: ClassVar[bool] = False
    one_at_a_time: ClassVar[bool] = True

    data: Dataset | None = field(default=None, metadata={"bound": True})
    advance: Callable[[], None] = field(default=lambda: None, metadata={"bound": True})
    target: str = "tensorrt-rtx"
    samples: int = 512
    pattern: str | float = "2:4"
    """Share of zeros, such as 0.5, or n:m: of every m consecutive inputs of an output n stay. Engines have sparse
    kernels for 2:4 alone."""
    criterion: Literal["magnitude", "wanda", "gradient", "sparsegpt"] = "sparsegpt"
    """What tells which numbers go: their size, their size times that of their input, what the model's outputs owe to
    them to first order, or the layer's output error without them once all others have made up for it."""
    per: Literal["output", "layer", "model"] | None = None
    """Where numbers compete for a share: unset, wanda in an output and the others in a layer; model, which is for
    magnitude and gradient, takes more from some layers than from others."""
    repair: bool = True
    """Whether what stays is fitted to the layer's output by least squares."""
    sequential: bool = True
    """Whether every layer is measured behind pruned ones; the samples run once for each value that is read."""
    ridge: float | None = None
    """Share of the Hessian's mean diagonal that is added to it, so that noise is not fitted; unset, what is best for
    one half of the samples when fitted to the other."""
    permute: bool = False
    """With n:m: whether neurons between two products change places first, so that groups mix large and small ones."""
    min_dim: int | None = None
    """Layers stay dense with so few inputs or outputs, or fewer; unset, 256 for n:m and 0 for a share."""
    keep: tuple[str, ...] = ()
    """Names of nodes that stay dense."""

    def __post_init__(self) -> None:
        check_least("sparsify", self, samples=1, **({} if self.min_dim is None else {"min_dim": 0}))
        if self.ridge is not None and not (math.isfinite(self.ridge) and self.ridge >= 0):
            what = f"ridge is {self.ridge:g}, expected a number not below 0"
            raise UsageError(what, where="sparsify.ridge", hint="leave it out to have it searched")
        group = self.wanted.group
        if self.per is not None and group:
            hint = "leave it out, or give a share of zeros"
            what = f"numbers compete in their group of {group}, not per {self.per}"
            raise UsageError(what, where="sparsify.per", hint=hint)
        if self.permute and not group:
            hint = "leave it out, or set pattern = '2:4'"
            raise UsageError("a share of zeros has no groups to order", where="sparsify.permute", hint=hint)
        if self.per == "model" and self.criterion not in _COMPARABLE:
            what = f"scores of {self.criterion} cannot be compared between layers"
            hint = 'set criterion = "magnitude" or "gradient", or per = "layer"'
            raise UsageError(what, where="sparsify.per", hint=hint)

    @property
    def wanted(self) -> Pattern:
        """The pattern; ``UsageError`` where there is no such."""
        try:
            return Pattern.parse(self.pattern)
        except ValueError as error:
            hint = "set '2:4', or a share such as 0.5"
            raise UsageError(str(error), where="sparsify.pattern", hint=hint) from error

    @property
    def scope(self) -> Scope:
        """Where scores compete, in one layer."""
        return "output" if self.per == "output" or (self.per is None and self.criterion == "wanda") else "layer"

    def call(self, model: ir.Model) -> Outcome:
        """Prune every layer that can gain; no data where it is needed, or a share that empties a layer, is an error."""
        if quantized_nodes(model):
            return Outcome(model, False, (Decision("", "graph", "skipped", "already quantized"),))
        blind = self.criterion == "magnitude" and not self.repair
        if self.data is None and not blind:
            raise UsageError("sparsify needs calibration data", hint="give real samples with --calib")
        choice = Choice(self.wanted, self.scope, self.min_dim, self.keep, together=self.per == "model")
        target = find_target(self.target)
        taps, refused = choice.layers(model, target)
        moved = reorder_neurons(model, taps, self.wanted, self._samples) if self.permute else []
        chosen = choice.masks(self._scores([site for sites in taps.values() for site in sites], model))
        spared = {site for site, mask in chosen.items() if mask.all()}
        refused += [decision(site.node, "skipped", SPARED) for site in spared]
        work = _Copy(model) if self.sequential else None
        found: dict[Site, tuple[Matrix, LayerLoss]] = {}
        for tap, halves in self._grams(taps, model if work is None else work.model, blind=blind):
            for site in (site for site in taps[tap] if site not in spared):
                if self.criterion != "magnitude" and not any(half.rows for half in halves):
                    refused.append(decision(site.node, "skipped", UNSEEN))
                    continue
                found[site] = self._pruned(Kernel(site), halves, chosen.get(site))
                if work is not None:
                    work.store(site, found[site][0])
        changed = [site for site, (matrix, _) in found.items() if Kernel(site).store(matrix)]
        for site, (_, loss) in found.items():
            site.node.meta[SPARSITY_KEY] = loss
        _forget(model, changed)
        done = [_decided(site, self.wanted, loss) for site, (_, loss) in found.items()]
        if self.wanted.group and changed and not target.sparse_kernels:
            refused.append(Decision("", "graph", "noted", f"{target.name} has no sparse kernels: zeros save no time"))
        return Outcome(model, bool(changed or moved), (*moved, *done, *refused))

    def _samples(self) -> Iterator[Sample]:
        """The samples, from the first one on."""
        return islice(self.data or (), self.samples)

    def _scores(self, sites: Sequence[Site], model: ir.Model) -> dict[Site, Scores]:
        """Scores that are known before any layer is pruned."""
        if self.criterion == "gradient" and sites:
            names = [site.node.inputs[1].name or "" for site in sites if site.node.inputs[1] is not None]
            owed = weight_saliency(model, names, self._samples())
            return {site: Kernel(site).laid(owed[name]) for site, name in zip(sites, names, strict=True)}
        return {site: magnitude(Kernel(site).matrix()) for site in sites} if self.per == "model" else {}

    def _grams(
        self, taps: Mapping[Tap, Sequence[Site]], model: ir.Model, *, blind: bool
    ) -> Iterator[tuple[Tap, Halves]]:
        """What every value is like, one after the other as the model is by then, or empty where it does not matter."""
        if blind or self.data is None:
            yield from ((tap, (Gram(0), Gram(0))) for tap in taps)
            return
        rounds = [[tap] for tap in taps] if self.sequential else groups(taps, BUDGET // 2)
        advance = every(len(rounds), self.advance)
        for group in rounds:
            yield from measure_halves(model, group, self._samples(), advance).items()

    def _pruned(self, kernel: Kernel, halves: Halves, mask: Mask | None) -> tuple[Matrix, LayerLoss]:
        """The weight as it will be, and what that costs."""
        weight = kernel.matrix()
        one, other = (kernel.hessian(half) if half.size else np.zeros((0, 0)) for half in halves)
        hessian = one + other
        if mask is None:
            scores = magnitude(weight) if self.criterion == "magnitude" else wanda(weight, hessian)
            mask = keep_mask(scores, self.wanted, self.scope)  # with sparsegpt, what its ridge is tried on
        updated, ridge = None, RIDGE if self.ridge is None else self.ridge
        if self.ridge is None and (self.repair or self.criterion == "sparsegpt") and all(half.rows for half in halves):
            ridge = best_ridge(weight, (one, other), mask)
        if self.criterion == "sparsegpt":
            mask, updated = sparse_gpt(weight, hessian, self.wanted, per=self.scope, damping=ridge)
        masked = np.where(mask, weight, 0.0)
        if self.repair:
            updated = refit(weight, hessian, mask, ridge)
        sparse = masked if updated is None else np.asarray(updated, np.float64)
        return sparse, LayerLoss(_loss(weight, masked, hessian), _loss(weight, sparse, hessian))


class _Copy:
    """A copy of a model whose layers are pruned one after the other."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model.clone()
        self._makers = {node.outputs[0].name: node for node in self.model.graph}

    def store(self, site: Site, matrix: Matrix) -> None:
        """Put the sparse weight in place of the dense one."""
        node = self._makers[site.node.outputs[0].name]
        Kernel(Site(node, site.inputs, site.weight, site.axis)).store(matrix)


def _loss(weight: Matrix, sparse: Matrix, hessian: Matrix) -> float:
    if not hessian.size:
        return math.nan
    gap = weight - sparse
    return float(np.sum(gap * (hessian @ gap)) / max(float(np.sum(weight * (hessian @ weight))), 1e-30))


def _decided(site: Site, pattern: Pattern, loss: LayerLoss) -> Decision:
    """What it costs, in whole decibels, so that equal losses can be counted."""
    if math.isnan(loss.left):
        return decision(site.node, "pruned", f"{pattern.name} zeros")
    signal = -10 * math.log10(max(loss.left, 1e-12))
    return decision(site.node, "pruned", f"{pattern.name}, output {signal:.0f} dB above its error")


def _forget(model: ir.Model, sites: Iterable[Site]) -> None:
    """Drop what was measured of layers that are others now, and of the values behind them."""
    reached: set[ir.Value] = set()
    pruned = {site.node for site in sites}
    for node in model.graph:
        if node in pruned:
            forget_layer(node)
        if node in pruned or not reached.isdisjoint(value for value in node.inputs if value is not None):
            reached.update(node.outputs)
    for value in reached:
        forget_range(value)
        value.meta.pop(ACTIVATION_KEY, None)
