"""Run the float model over samples and keep statistics of the tapped values.

Every sample runs by itself, unpadded and on one thread. Its values do not depend on what else is in a batch, so the
statistics are identical for any batching, order or sharding of the same samples, and no padding is ever counted.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.reading.data import Sample, sample_digest
from qexport.calibration.reading.spec import input_specs, static_batch
from qexport.calibration.running.execute import open_model
from qexport.calibration.statistics.excerpts import Excerpts, Window
from qexport.calibration.statistics.histogram import Histogram
from qexport.errors import DataInvalid
from qexport.runtime.session import SessionOptions

JOURNAL_EVERY = 128  # samples
MAX_WORKERS = 4  # samples that run side by side
GROUP_BYTES = 4 << 20  # values that wait to be counted together

Work = tuple[int, bytes, Sample]  # position, digest, sample
Values = dict[str, NDArray[Any]]  # tapped value by name, batch axis of 1 first
Measured = tuple[int, bytes, Values]  # position, digest, values of one sample


@dataclass(slots=True)
class Statistics:
    """What is known of one value: its histogram, and excerpts of the values themselves."""

    histogram: Histogram = field(default_factory=Histogram)
    excerpts: Excerpts = field(default_factory=Excerpts)

    def add(self, digests: Sequence[bytes], values: Sequence[NDArray[np.float32]]) -> None:
        """Take in the values of some samples; together, because a histogram costs by the call."""
        self.histogram.add(np.concatenate([value.ravel() for value in values]))
        for digest, value in zip(digests, values, strict=True):
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
    taps: Mapping[str, Window],
    samples: Iterable[Sample],
    advance: Callable[[], None] = lambda: None,
    journal: Journal | None = None,
) -> dict[str, Statistics]:
    """Return the statistics of each tapped value over ``samples``; equal samples count once.

    ``taps`` names the values, with the window that excerpts of images are cut to (empty for rows of matrices).
    Memory is the model, the activations of a few samples and the statistics: flat in the number of samples. With a
    ``journal``, samples that it has seen are not run again, and it is told every 128 samples and at the end, however
    that comes.
    """
    statistics = {name: Statistics(excerpts=Excerpts(window)) for name, window in taps.items()}
    done: set[bytes] = set()
    kept = journal.state if journal else None
    if kept is not None and kept[0].keys() == statistics.keys():
        for name, known in kept[0].items():
            statistics[name].merge(known)
        done |= kept[1]
    written, whole = len(done), True
    try:
        for group in _grouped(stream(model, list(taps), _missing(samples, done, advance)), JOURNAL_EVERY // 8):
            whole = False  # an interrupt may come in the middle of this
            observe(statistics, group)
            done |= {digest for _, digest, _ in group}
            whole = True
            if journal and len(done) // JOURNAL_EVERY > written // JOURNAL_EVERY:
                journal.write(statistics, frozenset(done))
                written = len(done)
    finally:
        if journal and whole and len(done) != written:
            journal.write(statistics, frozenset(done))
    return statistics


def _missing(samples: Iterable[Sample], done: set[bytes], advance: Callable[[], None]) -> Iterator[Work]:
    """Yield the samples that are neither in ``done`` nor equal to one before."""
    taken = set(done)
    for index, sample in enumerate(samples):
        digest = sample_digest(sample)
        if digest not in taken:
            taken.add(digest)
            yield index, digest, sample
        advance()


def _grouped(items: Iterator[Measured], count: int) -> Iterator[list[Measured]]:
    """Yield samples in groups of ``count``, or fewer where their values are large."""
    group: list[Measured] = []
    size = 0
    for item in items:
        group.append(item)
        size += sum(value.nbytes for value in item[2].values())
        if len(group) >= count or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def stream(model: ir.Model, taps: Sequence[str], work: Iterator[Work], *, literal: bool = False) -> Iterator[Measured]:
    """Yield the tapped values of each sample, in order; a few samples run side by side, one thread each.

    With ``literal``, Q/DQ nodes run as they are written.
    """
    first = next(work, None)
    if first is None or not taps:
        return
    session = open_model(model, SessionOptions(threads=1, literal=literal), taps)
    batch = static_batch(input_specs(model)) or 1  # a sample fills a batch of a fixed size by itself

    def run(item: Work) -> Measured:
        index, digest, sample = item
        return index, digest, session.run({name: np.stack([array] * batch) for name, array in sample.items()}, taps)

    pool = ThreadPoolExecutor(workers())
    try:
        running = deque(pool.submit(run, item) for item in chain([first], islice(work, workers())))
        while running:
            yield running.popleft().result()
            running.extend(pool.submit(run, item) for item in islice(work, 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # who interrupts it does not wait for what runs


def numbered(
    samples: Iterable[Sample], advance: Callable[[], None] = lambda: None, done: Iterable[bytes] = ()
) -> Iterator[Work]:
    """Yield each distinct sample that is not in ``done`` with its position and digest, as :func:`stream` wants them."""
    return _missing(samples, set(done), advance)


def workers() -> int:
    """Threads that calibration uses: as many as there are processors for this process, within reason."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)))


def observe(statistics: Mapping[str, Statistics], group: Sequence[Measured]) -> None:
    """Add the values of some samples; NaN or infinity is ``DataInvalid`` naming the sample and the value."""
    digests = [digest for _, digest, _ in group]
    for name, known in statistics.items():
        values = [found[name].astype(np.float32, copy=False) for _, _, found in group]
        try:
            known.add(digests, values)
        except DataInvalid as error:
            bad = next(item[0] for item, value in zip(group, values, strict=True) if not np.isfinite(value).all())
            raise DataInvalid(f"{error.what} at {name!r}", where=f"sample {bad}", hint=error.hint) from error
