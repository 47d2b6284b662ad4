"""Remove channels of convolutions, also those that residual sums hold together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from qexport.calibration.prune import Kind, Prune


@dataclass(frozen=True)
class Channels(Prune):
    """Remove the channels of convolutions that cost least for the work they save, and refit what reads them."""

    kind: ClassVar[Kind] = "channels"
    of: ClassVar[Literal["units", "work"]] = "work"

    keep: float = 0.8
    """Share of the model's multiplications that stays, above 0 and below 1."""
    criterion: Literal["magnitude", "activation", "surgery", "likeness", "change", "gradient"] = "gradient"
    """What tells which channels go: the gradient of the outputs by a factor on each channel (one run for each sample),
    how much they change without it (one for each channel and sample), its weights, the energy it adds to what reads
    it, the error that is left once all others have made up for it, or its likeness to others."""
    multiple: int = 4
    """What the number that stays in a layer is a multiple of."""
