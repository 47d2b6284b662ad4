"""Which layers get zeros, and why others stay dense."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qexport.calibration.statistics.gram import Tap, by_tap
from qexport.calibration.zeros.kernels import Kernel
from qexport.errors import UsageError
from qexport.passes.base import Decision
from qexport.passes.match import check_names
from qexport.passes.numbers.masks import Mask, Pattern, Scope, Scores, keep_mask, keep_masks
from qexport.passes.placement import Site, plan
from qexport.passes.target import Target
from qexport.passes.writing.lowbit import decision

DENSE = "kept dense by name"
DONE = "has the pattern already"
SHARED = "something else reads its weight"
LEAST_DIM = 256  # sparse kernels gain nothing with so few inputs or outputs, or fewer
_EMPTY = "ask for fewer zeros, or keep the node"


@dataclass(frozen=True, slots=True)
class Choice:
    """What is wanted of which layers.

    Attributes:
        pattern: The zeros.
        scope: Where scores compete, in one layer.
        min_dim: Layers stay dense with so few inputs or outputs, or fewer; ``None`` is 256 for n:m, 0 for a share.
        keep: Names of nodes that stay dense.
        together: Whether the numbers of all layers compete.
    """

    pattern: Pattern
    scope: Scope
    min_dim: int | None = None
    keep: tuple[str, ...] = ()
    together: bool = False

    def layers(self, model: ir.Model, target: Target) -> tuple[dict[Tap, list[Site]], list[Decision]]:
        """Layers to prune by what they read, and why others stay dense.

        Raises:
            UsageError: A name in ``keep`` is no node's; the pattern would leave nothing of a layer.
        """
        check_names(self.keep, model)
        found = plan(model, target)
        taps, odd = by_tap(site for site in found.roots if site.weight is not None)
        reasons = {site: self._dense(site) for sites in taps.values() for site in sites}
        if self.together and self._reached(site for site in reasons if not reasons[site]):
            reasons = {site: reason or DONE for site, reason in reasons.items()}
        refused = [decision(site.node, "skipped", reason) for site, reason in (reasons | odd).items() if reason]
        left = {tap: [site for site in sites if not reasons[site]] for tap, sites in taps.items()}
        return {tap: sites for tap, sites in left.items() if sites}, [*refused, *found.refused]

    def masks(self, scores: Mapping[Site, Scores]) -> dict[Site, Mask]:
        """The masks of layers by scores ``[K, N]``; ``UsageError`` where they compete and nothing of one is left."""
        if not self.together:
            return {site: keep_mask(found, self.pattern, self.scope) for site, found in scores.items()}
        masks = dict(zip(scores, keep_masks(list(scores.values()), self.pattern), strict=True)) if scores else {}
        for site, mask in masks.items():
            if not mask.any():
                what = f"{self.pattern.name} of the model's weights leave nothing of node {site.node.name!r}"
                raise UsageError(what, where="sparsify.pattern", hint=_EMPTY)
        return masks

    def _dense(self, site: Site) -> str | None:
        """Why a layer stays dense, if it does."""
        kernel, held, group = Kernel(site), site.node.inputs[1], self.pattern.group
        least = self.min_dim if self.min_dim is not None else LEAST_DIM if group else 0
        if site.node.name in self.keep:
            return DENSE
        if held is None or len(held.uses()) > 1 or held.is_graph_output():
            return SHARED
        if min(kernel.inputs, kernel.outputs) <= least:
            return f"at most {least} inputs or outputs: sparse kernels gain nothing" if group else "too small"
        if group and kernel.inputs % group:
            return f"its inputs are no multiple of {group}"
        matrix = kernel.matrix()
        if not np.isfinite(matrix).all():
            return "weights are not finite"
        try:
            fits = self.pattern.fits(matrix == 0, self.scope)
        except ValueError as error:
            raise UsageError(f"{error} at node {site.node.name!r}", where="sparsify.pattern", hint=_EMPTY) from error
        return DONE if fits and not self.together else None

    def _reached(self, sites: Iterable[Site]) -> bool:
        """Whether all the weights together have the zeros already."""
        zero = [Kernel(site).matrix().ravel() == 0 for site in sites]
        return bool(zero) and self.pattern.fits(np.concatenate(zero)[:, None])
