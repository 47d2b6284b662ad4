"""Move outlier channels of activations into the weights that read them, with no Mul left behind.

``x W`` becomes ``(x / s) (s W)`` with ``s_j = max|x_j|^a / max|W_j|^(1 - a)``, and ``1 / s`` is folded into whatever
makes x (see ``channels``): norms, products, convolutions, through layout operators, Relu, attention values and the
linear branch of gated layers. Where that is impossible the value is left alone with a reason: a Gelu, for instance, is
not homogeneous. Where others read a norm too, the products get a copy of it (``split``); with ``mul``, one Mul may be
left for what nothing takes in.

``a`` is fixed, or searched for each value. The search asks how a static symmetric 8-bit quantizer would do on samples
that its range was not taken from, by the mean *and* the worst rows: smoothing brings every channel as near to the clip
as the largest one, and a search on the mean alone buys it with ruined samples. Smoothing has to win clearly; else the
value stays as it is.

Source: Xiao et al. 2022, "SmoothQuant", equation 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.errors import UsageError
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.folding.activation import Activation, activation_of, transform, why_unknown
from qexport.passes.folding.channels import Fold, find_fold
from qexport.passes.folding.flood import Slot
from qexport.passes.folding.sources import copy_norm, is_norm, leave_mul
from qexport.passes.folding.trial import Trial
from qexport.passes.match import check_names
from qexport.passes.placement import Site, plan
from qexport.passes.shift import by_value
from qexport.passes.target import find_target

ALPHAS = np.linspace(0.2, 0.9, 15)
COARSE = 3  # of which so many lie between two that are tried first
MIN_ROWS = 8  # fewer tell nothing of those that were not seen
PRODUCTS = ("MatMul", "Gemm")
SMOOTHED_KEY = "qexport.smoothed"
Scale = NDArray[np.float64]  # [channels]


@dataclass(frozen=True)
class Smooth(Pass):
    """Fold outlier channels of activations into the weights behind them (SmoothQuant)."""

    target: str = "tensorrt-rtx"
    alpha: float | None = None
    """Migration strength in [0, 1]; searched for each value when not given."""
    headroom: float = 1.1
    """How far beyond the values it saw the search lets the quantizer reach."""
    floor: float = 0.01
    """Channels smaller than this share of the largest one are scaled as if they had it."""
    gain: float = 0.05
    """How much smaller a search must find the error (as a share) before it smooths at all."""
    split: bool = True
    """Whether products get their own copy of a norm that others read too."""
    mul: bool = False
    """Whether a Mul may stay where the scale cannot be folded."""
    keep: tuple[str, ...] = ()
    """Names of nodes whose inputs are left alone."""
    format: Literal["fp8"] | None = None
    """8-bit numbers that the search rounds to: unset, even steps; as in quantize.format."""

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha is {self.alpha:g}, expected a number from 0 to 1", where="smooth.alpha")
        for name, least, most in (("headroom", 1, 10), ("floor", 0, 1), ("gain", 0, 1)):
            told = getattr(self, name)
            if not least <= told <= most:
                raise UsageError(
                    f"{name} is {told:g}, expected a number from {least} to {most}", where=f"smooth.{name}"
                )

    def call(self, model: ir.Model) -> Outcome:
        """Smooth what ``observe`` has looked at; what cannot be folded is left alone with a reason."""
        check_names(self.keep, model)
        target, decisions = find_target(self.target).using(self.format, "smooth.format"), []
        for value, sites in by_value(plan(model, target).roots).items():
            readers = [site for site in sites if site.node.op_type in PRODUCTS]
            if not readers or any(site.node.name in self.keep for site in sites):
                continue
            node = readers[0].node
            if all(site.node.meta.get(SMOOTHED_KEY) == self for site in readers):
                action, reason = "skipped", "decided by an earlier run"
            else:
                action, reason = self._smooth(value, readers)
            decisions.append(Decision(node.name or "", node.op_type, action, reason))
        return Outcome(model, any(d.action == "folded" for d in decisions), tuple(decisions))

    def _smooth(self, value: ir.Value, sites: Sequence[Site]) -> tuple[str, str]:
        """What was done to ``value``, and how or why."""
        known = activation_of(value)
        if known is None:
            return "skipped", why_unknown(value)
        found = find_fold(value, known.axis, known.low.size)
        if isinstance(found, Fold):
            scale, reason = self._scale(known, found, sites)
            _mark(sites, self)
            if scale is None:
                return "skipped", reason
            found.apply(scale)
            for scaled, ids in found.values.items():
                transform(scaled, ids, scale, np.zeros_like(scale))
            return "folded", reason
        source = self._source(value)
        if source is None:
            return "skipped", found
        alone = _readers(sites, known.low.size)
        scale, reason = self._scale(known, alone, sites)
        _mark(sites, self)
        if scale is None:
            return "skipped", reason
        alone.apply(scale)
        source(value, [site.node for site in sites], scale, known)
        return "folded", f"{reason}; a {'Mul' if source is leave_mul else 'copy of its norm'} left: {found}"

    def _source(self, value: ir.Value) -> Callable[[ir.Value, Sequence[ir.Node], Scale, Activation], None] | None:
        """What can divide a value for its products alone, if the options allow for any."""
        if self.split and is_norm(value):
            return copy_norm
        return leave_mul if self.mul and value.producer() is not None else None

    def _scale(self, known: Activation, fold: Fold, sites: Sequence[Site]) -> tuple[Scale | None, str]:
        """The scale of each channel with what was chosen, or ``None`` with the reason to leave them."""
        w = fold.weight_reach()

        def scale(reach: NDArray[np.floating], alpha: float) -> Scale:
            x = fold.largest(reach)
            return migrate(np.maximum(x, self.floor * x.max(initial=0.0)), w, alpha)

        if self.alpha is not None:
            return scale(known.reach, self.alpha), f"alpha {self.alpha:g}"
        if len(known.rows) < MIN_ROWS:
            return None, "too few samples to search alpha"
        trial = Trial(known, [_matrix(site) for site in sites], self.headroom, self.format or "int8")
        best, error = search(lambda alpha: trial.error(lambda reach: scale(reach, alpha)))
        if not error < (1 - self.gain) * trial.error(np.ones_like):
            return None, "smoothing would not lower its error"
        return scale(known.reach, best), f"alpha {best:.2g}, searched"


def search(error: Callable[[float], float]) -> tuple[float, float]:
    """The best of ``ALPHAS`` with its error: every third is tried, then those around the best of them."""
    errors = {index: error(float(ALPHAS[index])) for index in range(0, len(ALPHAS), COARSE)}
    coarse = min(errors, key=lambda index: errors[index])
    for index in range(max(0, coarse - COARSE + 1), min(len(ALPHAS), coarse + COARSE)):
        errors[index] = errors[index] if index in errors else error(float(ALPHAS[index]))
    best = min(errors, key=lambda index: errors[index])
    return float(ALPHAS[best]), errors[best]


def _mark(sites: Sequence[Site], step: Smooth) -> None:
    """Remember what was decided, so that a second run does not decide again about its own result."""
    for site in sites:
        site.node.meta[SMOOTHED_KEY] = step


def migrate(x: Scale, w: Scale, alpha: float) -> Scale:
    """``max|x|^alpha / max|W|^(1 - alpha)`` for each channel, with a geometric mean of 1; 1 where either is zero."""
    alive = (x > 0) & (w > 0)
    logs = np.zeros_like(x)
    logs[alive] = alpha * np.log(x[alive]) - (1 - alpha) * np.log(w[alive])
    logs[alive] -= logs[alive].mean() if alive.any() else 0.0
    return np.asarray(np.exp(logs), np.float64)


def _matrix(site: Site) -> NDArray[np.float32]:
    """The kernel of a product as ``[inputs, outputs]``."""
    kernel = np.asarray(site.kernel.numpy(), np.float32)
    return kernel if site.axis == 1 else kernel.T


def _readers(sites: Sequence[Site], count: int) -> Fold:
    """A fold that scales the kernels of ``sites`` alone, for a division in a node of its own."""
    ids = np.arange(count)
    slots = []
    for site in sites:
        shape = site.kernel.numpy().shape
        along = ids[:, None] if site.axis == 1 else ids
        slots.append(Slot(site.node, 1, np.broadcast_to(along, shape), 1, weight=True))
    return Fold(tuple(slots), ids, {})
