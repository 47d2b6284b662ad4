"""Look at activations channel by channel: leave an ``Activation`` on what products and convolutions read.

Minima and maxima do not depend on order, and the rows that are kept are chosen by the digests of their samples, so the
result is the same for any order of the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.least import check_least
from qexport.calibration.reading.data import Dataset
from qexport.calibration.statistics.collect import Values, numbered, stream
from qexport.calibration.statistics.excerpts import Excerpts, Window
from qexport.calibration.statistics.store import (
    Arrays,
    Entry,
    Store,
    journal,
    pack_excerpts,
    pack_names,
    unpack_excerpts,
    unpack_names,
)
from qexport.errors import DataInvalid, UsageError
from qexport.passes.base import Outcome, Pass
from qexport.passes.folding.activation import ACTIVATION_KEY, MIXED, Activation
from qexport.passes.placement import Site, plan
from qexport.passes.target import find_target

CHANNELS = "channels/1"  # part of every key: a change of what is measured must change it
ROWS = 4  # positions kept of each of the samples that excerpts are kept of
IMAGE_AXIS = 1


@dataclass(frozen=True)
class Observe(Pass):
    """Note the smallest and largest value of every channel that a product or convolution reads, and some samples."""

    exact: ClassVar[bool] = True

    data: Dataset | None = field(default=None, metadata={"bound": True})
    advance: Callable[[], None] = field(default=lambda: None, metadata={"bound": True})
    store: Store = field(default=Store(), metadata={"bound": True})
    target: str = "tensorrt-rtx"
    samples: int = 512

    def __post_init__(self) -> None:
        check_least("observe", self, samples=1)

    def call(self, model: ir.Model) -> Outcome:
        """Leave an ``Activation`` on each value that the target's sites read; no data is a ``UsageError``.

        A value whose readers have its channels on different axes is marked ``MIXED`` instead.
        """
        if self.data is None:
            raise UsageError("looking at activations needs data", hint="give real samples with --calib")
        roots = [site for site in plan(model, find_target(self.target)).roots if site.weight is not None]
        digests = self.data.digests[: self.samples]

        def find(taps: Mapping[str, Window]) -> Entry | None:
            return self.store.entry(model, taps, digests, CHANNELS)

        found = observe(model, roots, islice(self.data, self.samples), self.advance, find)
        modified = False
        for value, note in found.items():
            modified |= not _same(value.meta.get(ACTIVATION_KEY), note)
            value.meta[ACTIVATION_KEY] = note
        return Outcome(model, modified)


@dataclass(slots=True)
class _Channels:
    """Running extremes of one value's channels."""

    axis: int
    low: NDArray[np.float32] | None = None
    high: NDArray[np.float32] | None = None
    excerpts: Excerpts = field(default_factory=lambda: Excerpts(rows=ROWS))

    def add(self, digest: bytes, value: NDArray[Any]) -> None:
        rows = np.moveaxis(value.astype(np.float32, copy=False), self.axis, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        if not rows.size:
            return
        low, high = rows.min(axis=0), rows.max(axis=0)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise DataInvalid("activation is NaN or infinite", hint="look for overflow in the model or in the sample")
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)
        self.excerpts.add(digest, rows)

    def summary(self) -> Activation | None:
        if self.low is None or self.high is None:
            return None
        return Activation(self.axis, self.low, self.high, np.concatenate(self.excerpts.stacked()))


def observe(
    model: ir.Model,
    sites: Iterable[Site],
    samples: Iterable[dict[str, Any]],
    advance: Callable[[], None],
    find: Callable[[Mapping[str, Window]], Entry | None] = lambda taps: None,
) -> dict[ir.Value, Activation | str]:
    """Return what was seen of every value that ``sites`` read, or ``MIXED``; what no sample reached is left out.

    ``find`` tells where the measurement of these values, each with the axis of its channels, is kept.

    Raises:
        DataInvalid: NaN or infinity, naming the sample and the value.
    """
    axes: dict[ir.Value, set[int]] = {}
    for site in sites:
        for value in site.values:
            axes.setdefault(value, set()).add(_axis(site))
    mixed = {value: MIXED for value, found in axes.items() if len(found) > 1}
    values = {value.name or "": value for value in axes if value not in mixed}
    known = {name: _Channels(min(axes[value])) for name, value in values.items()}
    entry = find({name: (channels.axis,) for name, channels in known.items()})
    kept = entry.recall(_unpack) if entry else None
    if kept is not None and kept[0].keys() == known.keys():
        known = kept[0]
    seen = set(kept[1]) if kept is not None and known is kept[0] else set()
    with journal(entry, seen, lambda: _pack(known)) as took:
        for index, digest, found in stream(model, list(values), numbered(samples, advance, seen)):
            _add(known, index, digest, found)
            took(digest)
    summaries = {values[name]: channels.summary() for name, channels in known.items()}
    return mixed | {value: activation for value, activation in summaries.items() if activation is not None}


def _add(known: Mapping[str, _Channels], index: int, digest: bytes, found: Values) -> None:
    for name, channels in known.items():
        try:
            channels.add(digest, found[name])
        except DataInvalid as error:
            raise DataInvalid(f"{error.what} at {name!r}", where=f"sample {index}", hint=error.hint) from error


def _pack(known: Mapping[str, _Channels]) -> Arrays:
    arrays: Arrays = {"names": pack_names(known)}
    for index, channels in enumerate(known.values()):
        arrays[f"{index}.axis"] = np.array([channels.axis])
        if channels.low is not None and channels.high is not None:
            arrays |= {f"{index}.low": channels.low, f"{index}.high": channels.high}
        arrays |= pack_excerpts(str(index), channels.excerpts)
    return arrays


def _unpack(arrays: Arrays) -> dict[str, _Channels]:
    known = {}
    for index, name in enumerate(unpack_names(arrays["names"])):
        excerpts = Excerpts(rows=ROWS, kept=unpack_excerpts(str(index), arrays))
        low, high = arrays.get(f"{index}.low"), arrays.get(f"{index}.high")
        known[name] = _Channels(int(arrays[f"{index}.axis"][0]), low, high, excerpts)
    return known


def _axis(site: Site) -> int:
    return IMAGE_AXIS if site.node.op_type in ("Conv", "ConvTranspose") else -1


def _same(one: object, other: Activation | str) -> bool:
    if not isinstance(one, Activation) or not isinstance(other, Activation):
        return one == other
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("low", "high", "rows"))
