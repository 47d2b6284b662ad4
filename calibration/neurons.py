"""Remove neurons: what lies between two products, such as the inner width of a feed-forward block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from qexport.calibration.prune import Kind, Prune


@dataclass(frozen=True)
class Neurons(Prune):
    """Remove the neurons between two products that cost least, and refit the product that reads them."""

    kind: ClassVar[Kind] = "neurons"

    keep: float = 0.7
    """Share of the neurons that stays, above 0 and below 1."""
    per: Literal["layer", "model"] = "layer"
    """Whether every layer keeps this share, or all layers together, some losing more than others."""
    multiple: int = 16
    """What the number that stays in a layer is a multiple of; some kernels like 64 better."""
