"""Remove whole attention heads: the columns of queries, keys and values, and the rows of the output projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from qexport.calibration.prune import Kind, Prune


@dataclass(frozen=True)
class Heads(Prune):
    """Remove the attention heads that the model's outputs owe least to, and refit the output projections."""

    kind: ClassVar[Kind] = "heads"

    keep: float = 0.75
    """Share of the heads that stays, above 0 and below 1. Heads that share their keys and values go together."""
    criterion: Literal["magnitude", "activation", "surgery", "change", "gradient"] = "change"
    """What tells which heads go: their weights, the energy they add to the projection's output, the error that is left
    once all others have made up for it, how much the model's outputs change without them (one run for each head and
    sample), or the gradient of that (one run for each sample)."""
