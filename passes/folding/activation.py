"""What calibration saw of an activation, channel by channel; left by ``observe`` for passes that move scales about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.folding.axes import Ids, only_along
from qexport.passes.numbers.notes import forget_range

ACTIVATION_KEY = "qexport.activation"
UNSEEN = "no sample was observed at its input"
MIXED = "a product and a convolution read its input, whose channels are on different axes for them"
"""The note that a value gets instead of an ``Activation`` where its readers do not agree on the axis."""
Channels = NDArray[np.floating]  # [channels]


@dataclass(frozen=True, slots=True, eq=False)
class Activation:
    """Per-channel statistics of a value, over all samples and all positions that are not padding.

    Attributes:
        axis: Axis of the channels in the value: the last one of what a matrix product reads, 1 of an image.
        low: Smallest value of each channel, ``[K]``.
        high: Largest value of each channel, ``[K]``.
        rows: Some of the values themselves, ``[n, K]``: single positions of some samples.
    """

    axis: int
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    rows: NDArray[np.float32]

    @property
    def reach(self) -> NDArray[np.float32]:
        """Largest magnitude of each channel, ``[K]``."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


def transform(value: ir.Value, ids: Ids, scale: Channels, offset: Channels) -> None:
    """Let the statistics of a value follow what was done to its channels: ``(x - offset[ids]) / scale[ids]``.

    What was measured of the whole value is forgotten.
    """
    forget_range(value)
    known = value.meta.get(ACTIVATION_KEY)
    if known == MIXED:
        return  # nothing was measured that could be wrong now
    value.meta.pop(ACTIVATION_KEY, None)
    along = None if known is None else only_along(ids, known.axis)
    if not isinstance(known, Activation) or along is None:
        return
    s = np.append(scale, 1.0)[along].astype(np.float32)
    c = np.append(offset, 0.0)[along].astype(np.float32)
    value.meta[ACTIVATION_KEY] = Activation(known.axis, (known.low - c) / s, (known.high - c) / s, (known.rows - c) / s)


def activation_of(value: ir.Value | None) -> Activation | None:
    """What ``observe`` left on ``value``, if it did."""
    found = None if value is None else value.meta.get(ACTIVATION_KEY)
    return found if isinstance(found, Activation) else None


def why_unknown(value: ir.Value | None) -> str:
    """Why there is no ``Activation`` on ``value``."""
    return MIXED if value is not None and value.meta.get(ACTIVATION_KEY) == MIXED else UNSEEN
