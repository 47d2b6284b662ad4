"""Measurements on disk, under the digest of what they were made on: a second build reads them, a killed one goes on.

One entry of the cache per measurement, model, data and set of tapped values: arrays as safetensors. It lists the
digests of the samples it has seen; since nothing that is measured depends on order, going on means running the samples
that are missing. An entry that cannot be read, or is damaged, is passed over, which the cache tells, and written anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from qexport import safe_io
from qexport.calibration.running.execute import skeleton
from qexport.calibration.statistics.collect import JOURNAL_EVERY, Statistics
from qexport.calibration.statistics.excerpts import Excerpts, Window
from qexport.calibration.statistics.histogram import Histogram

STATISTICS = "statistics/3"  # part of every key: a change of what is counted must change it

Arrays = dict[str, NDArray[Any]]
State = tuple[dict[str, Statistics], frozenset[bytes]]  # statistics by value name, digests of the samples in them
SEEN = "seen"
T = TypeVar("T")
_UNREADABLE = (SafetensorError, KeyError, ValueError, IndexError, TypeError)


@dataclass(frozen=True, slots=True)
class Store:
    """What calibration measures, in a cache.

    Attributes:
        cache: Where it is kept, if anywhere.
    """

    cache: safe_io.Cache = field(default_factory=safe_io.Cache)

    def entry(
        self, model: ir.Model, taps: Mapping[str, Window], samples: Iterable[bytes], what: str = STATISTICS
    ) -> Entry | None:
        """The journal of one measurement over the samples with these digests, if anything is to be kept."""
        if self.cache.folder is None:
            return None
        return Entry(self.cache.entry("statistics", key_of(model, taps, samples, what)))


@dataclass(frozen=True, slots=True)
class Entry:
    """One measurement; of statistics, it is the journal that ``collect`` writes."""

    place: safe_io.Entry

    @property
    def path(self) -> Path | None:
        """Where it lies, if anything is kept."""
        return self.place.path

    @property
    def state(self) -> State | None:
        """What is stored, if it is there and sound.

        Raises:
            QexportError: The cache is not to be trusted, or it is strict and the entry damaged.
        """
        return self.recall(_unpack)

    def write(self, statistics: Mapping[str, Statistics], seen: frozenset[bytes]) -> None:
        """Store a state, in place of an earlier one; a full disk or a read-only folder is no reason to stop."""
        self.save(_pack(statistics), seen)

    def recall(self, unpack: Callable[[Arrays], T]) -> tuple[T, frozenset[bytes]] | None:
        """What ``unpack`` makes of the arrays that are stored, and the samples in them; see ``state``."""
        content = self.place.read()
        if content is None:
            return None
        try:
            arrays = load(content)
            return unpack(arrays), frozenset(row.tobytes() for row in arrays[SEEN])
        except _UNREADABLE as error:
            self.place.reject(f"it says something else: {error}")
            return None

    def save(self, arrays: Arrays, seen: Iterable[bytes]) -> None:
        """Store arrays, and which samples are in them."""
        self.place.write(save({**arrays, SEEN: digest_rows(sorted(seen))}))


@contextmanager
def journal(entry: Entry | None, seen: set[bytes], pack: Callable[[], Arrays]) -> Iterator[Callable[[bytes], None]]:
    """Store what ``pack`` returns every 128 samples and at the end, however the block ends.

    Args:
        entry: Where; ``None`` stores nothing.
        seen: Digests of the samples that are in it already; those of the block are added.
        pack: What is known so far. Samples that were taken in but not told yet may be in it: they are measured again.

    Yields:
        A function to be told the digest of every sample that has been taken in.
    """
    written = len(seen)

    def store() -> None:
        nonlocal written
        if entry is not None and len(seen) != written:
            written = len(seen)
            entry.save(pack(), seen)

    def took(digest: bytes) -> None:
        seen.add(digest)
        if len(seen) - written >= JOURNAL_EVERY:
            store()

    try:
        yield took
    finally:
        store()


def key_of(model: ir.Model, taps: Mapping[str, Window], samples: Iterable[bytes], what: str = STATISTICS) -> str:
    """Digest of everything a measurement depends on; the order of the samples does not count."""
    proto, weights = skeleton(model)
    state = hashlib.sha256(json.dumps([what, sorted(taps.items())]).encode())
    for digest in sorted(set(samples)):
        state.update(digest)
    state.update(proto.SerializeToString(deterministic=True))
    for name in sorted(weights):
        state.update(name.encode())
        state.update(weights[name].reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def _pack(statistics: Mapping[str, Statistics]) -> Arrays:
    arrays: Arrays = {"names": pack_names(statistics)}
    for index, known in enumerate(statistics.values()):
        histogram = known.histogram
        arrays[f"{index}.extremes"] = np.array([histogram.low, histogram.high], np.float64)
        arrays[f"{index}.window"] = np.array([histogram.zeros, histogram.top], np.int64)
        arrays[f"{index}.counts"] = histogram.counts
        arrays |= pack_excerpts(str(index), known.excerpts)
    return arrays


def _unpack(arrays: Arrays) -> dict[str, Statistics]:
    statistics = {}
    for index, name in enumerate(unpack_names(arrays["names"])):
        low, high = (float(x) for x in arrays[f"{index}.extremes"])
        zeros, top = (int(x) for x in arrays[f"{index}.window"])
        histogram = Histogram(low, high, zeros, top)
        histogram.counts[:] = arrays[f"{index}.counts"]
        statistics[name] = Statistics(histogram, Excerpts(kept=unpack_excerpts(str(index), arrays)))
    return statistics


def pack_names(names: Iterable[str]) -> NDArray[np.uint8]:
    """Names in order, as an array."""
    return np.frombuffer(json.dumps(list(names)).encode(), np.uint8)


def unpack_names(array: NDArray[Any]) -> list[str]:
    """The names of an array that ``pack_names`` made."""
    return list(map(str, json.loads(array.tobytes())))


def pack_excerpts(prefix: str, excerpts: Excerpts) -> Arrays:
    """The pieces that were kept, as arrays under names with a prefix."""
    kept = excerpts.kept
    pieces = {f"{prefix}.excerpt.{place}": kept[digest] for place, digest in enumerate(sorted(kept))}
    return {f"{prefix}.excerpts": digest_rows(sorted(kept)), **pieces}


def unpack_excerpts(prefix: str, arrays: Arrays) -> dict[bytes, NDArray[Any]]:
    """The pieces that ``pack_excerpts`` put there: sample digest to piece."""
    digests = [row.tobytes() for row in arrays[f"{prefix}.excerpts"]]
    return {digest: arrays[f"{prefix}.excerpt.{place}"].copy() for place, digest in enumerate(digests)}


def digest_rows(digests: Sequence[bytes]) -> NDArray[np.uint8]:
    """Digests as uint8 [count, 32]."""
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), 32)
