"""Run the float model over samples, one at a time, and keep statistics of the tapped values.

Samples run alone and unpadded: a result that does not depend on what else is in the batch is what makes the statistics
identical for any batching, order or sharding of the same samples, and no padding is ever counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.data import Sample, sample_digest
from qexport.calibration.excerpts import Excerpts
from qexport.calibration.execute import open_model
from qexport.calibration.histogram import Histogram
from qexport.errors import DataInvalid
from qexport.runtime.session import Session, SessionOptions

JOURNAL_EVERY = 128  # samples


@dataclass(slots=True)
class Statistics:
    """What is known of one value: its histogram, and excerpts of the values themselves."""

    histogram: Histogram = field(default_factory=Histogram)
    excerpts: Excerpts = field(default_factory=Excerpts)

    def add(self, digest: bytes, value: NDArray[np.float32]) -> None:
        """Take in one sample's value."""
        self.histogram.add(value)
        self.excerpts.add(digest, value)

    def merge(self, other: Statistics) -> None:
        """Take in what another shard has seen."""
        self.histogram.merge(other.histogram)
        self.excerpts.merge(other.excerpts)


class Journal(Protocol):
    """Remembers statistics between runs."""

    @property
    def state(self) -> tuple[dict[str, Statistics], frozenset[bytes]] | None:
        """What was remembered: statistics, and the digests of the samples in them."""

    def write(self, statistics: Mapping[str, Statistics], seen: frozenset[bytes]) -> None:
        """Remember."""


def collect(
    model: ir.Model,
    taps: Sequence[str],
    samples: Iterable[Sample],
    advance: Callable[[], None] = lambda: None,
    journal: Journal | None = None,
) -> dict[str, Statistics]:
    """Return the statistics of each tapped value over ``samples``.

    Memory is the model, one sample's activations and the statistics: flat in the number of samples. With a
    ``journal``, samples that it has seen are not run again, and it is told every 128 samples and at the end.
    """
    statistics, seen = (journal.state if journal else None) or ({name: Statistics() for name in taps}, frozenset())
    done = set(seen)
    session: Session | None = None
    for index, sample in enumerate(samples):
        digest = sample_digest(sample)
        if digest not in done and taps:
            session = session or open_model(model, SessionOptions(), taps)
            values = session.run({name: array[None] for name, array in sample.items()}, list(taps))
            observe(statistics, digest, values, f"sample {index}")
            done.add(digest)
            if journal and len(done) % JOURNAL_EVERY == 0:
                journal.write(statistics, frozenset(done))
        advance()
    if journal and done != seen:
        journal.write(statistics, frozenset(done))
    return statistics


def observe(
    statistics: Mapping[str, Statistics], digest: bytes, values: Mapping[str, NDArray[np.float32]], where: str
) -> None:
    """Add one sample's values; NaN or infinity is ``DataInvalid`` naming the sample and the value."""
    for name, value in values.items():
        try:
            statistics[name].add(digest, value.astype(np.float32, copy=False))
        except DataInvalid as error:
            raise DataInvalid(f"{error.what} at {name!r}", where=where, hint=error.hint) from error
