"""Scale up the inputs that most goes through before weights are rounded, folded so that the model stays what it was.

``x W`` becomes ``(x / s) (s W)``: rounding ``s W`` hurts inputs with a large s less. ``s_j = mean|x_j|^a``, and a is
searched for the least output error of all products that read x, rounded to the nearest (Lin et al. 2023, "AWQ",
section 3.2, equation 5). ``1 / s`` goes into whatever makes x (see ``passes.folding.channels``); where it cannot, the
products keep their weights, with a reason. The rounding itself is left to ``weight-only`` or ``gptq``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.few_bits import UNSEEN, FewBits
from qexport.calibration.statistics.gram import Gram, by_tap, groups
from qexport.passes.base import Outcome
from qexport.passes.folding.activation import transform
from qexport.passes.folding.channels import Fold, find_fold
from qexport.passes.numbers.groups import Grid, Matrix, as_matrix, quantize_groups
from qexport.passes.placement import Site
from qexport.passes.target import find_target
from qexport.passes.writing.lowbit import decision
from qexport.passes.writing.qdq import needs_half

DONE = "scaled already"
SCALED_KEY = "qexport.awq"
ALPHAS = np.linspace(0, 1, 21)
LEAST = 1e-4  # of the largest channel: what smaller ones count as

Scale = NDArray[np.float64]  # [K]


@dataclass(frozen=True)
class Awq(FewBits):
    """Scale inputs of products by how much goes through them, so that few bits hurt less (AWQ)."""

    gain: float = 0.02
    """How much smaller the search must find the error (as a share) before it scales at all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gain < 1:
            raise ValueError(f"gain must be at least 0 and below 1, got {self.gain!r}")

    def call(self, model: ir.Model) -> Outcome:
        """Fold scales into the constants of the model; no data, or a group that fits not, is an error."""
        grids, refused = self.chosen(model)
        fresh = {site: grid for site, grid in grids.items() if SCALED_KEY not in site.node.meta}
        refused += [decision(site.node, "skipped", DONE) for site in grids if site not in fresh]
        taps, _ = by_tap(fresh)
        divided: set[ir.Value] = set()
        done = []
        for tap, gram in self.measured(groups(taps), model):
            sites = taps[tap]
            value = sites[0].node.inputs[0]
            assert value is not None
            fold = DONE if value in divided else find_fold(value, -1, tap.size)
            scale, reason = self._scale(sites, fresh[sites[0]], gram, fold)
            if scale is not None and isinstance(fold, Fold):
                _apply(fold, scale, sites)
                divided |= set(fold.values)
            action = "skipped" if scale is None else "folded"
            done += [decision(site.node, action, reason) for site in sites]
        return Outcome(model, bool(divided), (*done, *refused))

    def _scale(self, sites: Sequence[Site], grid: Grid, gram: Gram, fold: Fold | str) -> tuple[Scale | None, str]:
        """The scale of each input with the strength that was chosen, or ``None`` with the reason to leave them."""
        if isinstance(fold, str):
            return None, fold
        if not gram.rows:
            return None, UNSEEN
        target = find_target(self.target)
        half = any(needs_half(target, site.kernel.dtype) for site in sites)
        weights = [as_matrix(site) for site in sites]

        powers = [max(gram.error(weight), 1e-30) for weight in weights]

        def error(scale: Scale) -> float:
            """Squared output error over squared output, summed over the products."""
            pairs = zip(weights, powers, strict=True)
            return sum(rounding_error(weight, scale, gram, grid, half=half) / power for weight, power in pairs)

        errors = {float(alpha): error(strength(gram, fold, alpha)) for alpha in ALPHAS}
        best = min(errors, key=lambda alpha: errors[alpha])
        if not errors[best] < (1 - self.gain) * errors[0.0]:
            return None, "scaling would not lower its error"
        return strength(gram, fold, best), f"alpha {best:.2g}, searched"


def strength(gram: Gram, fold: Fold, alpha: float) -> Scale:
    """``mean|x|^alpha`` for each input, equal for tied ones, the root of the smallest times the largest being 1."""
    size = fold.largest(gram.magnitude)
    size = np.maximum(size, LEAST * size.max(initial=0.0))
    scale = np.ones_like(size) if not size.any() else size**alpha
    return np.asarray(scale / np.sqrt(scale.min() * scale.max()), np.float64)


def rounding_error(weight: Matrix, scale: Scale, gram: Gram, grid: Grid, *, half: bool) -> float:
    """Squared output error of ``weight`` rounded as ``s W`` and read through ``x / s``."""
    wide = scale.astype(np.float32)[:, None]
    rounded = quantize_groups(weight * wide, grid, half=half).dequantize() / wide
    return gram.error(weight - rounded)


def _apply(fold: Fold, scale: Scale, sites: Sequence[Site]) -> None:
    """Divide the value, and let what is known of it follow."""
    fold.apply(scale)
    for value, ids in fold.values.items():
        transform(value, ids, scale, np.zeros_like(scale))
    for site in sites:
        site.node.meta[SCALED_KEY] = True
