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
    multiple: int = 4
    """What the number that stays in a layer is a multiple of."""
