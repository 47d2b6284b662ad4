"""Statistics on disk, under the digest of what they were measured on: a second build reads them, a killed one goes on.

One file per model, data and set of tapped values: a SHA-256 of its key and of what follows, then arrays as safetensors.
It lists the digests of the samples it has seen; since statistics do not depend on order, going on means observing the
samples that are missing. A file that cannot be read, or does not have its digest, is passed over and written anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from qexport import safe_io
from qexport.calibration.running.execute import skeleton
from qexport.calibration.statistics.collect import Statistics
from qexport.calibration.statistics.excerpts import Excerpts, Window
from qexport.calibration.statistics.histogram import Histogram
from qexport.errors import QexportError

VERSION = "statistics/3"  # part of every key: a change of what is counted must change it
LIMIT = 4 << 30
DIGEST = hashlib.sha256().digest_size

State = tuple[dict[str, Statistics], frozenset[bytes]]  # statistics by value name, digests of the samples in them


@dataclass(frozen=True, slots=True)
class Store:
    """A folder of statistics.

    Attributes:
        folder: Where the files lie; made, for its owner alone, when the first one is written. ``None`` keeps nothing.
    """

    folder: Path | None = None

    def entry(self, model: ir.Model, taps: Mapping[str, Window], samples: Iterable[bytes]) -> Entry | None:
        """The journal of one measurement over the samples with these digests, if anything is to be kept."""
        if self.folder is None:
            return None
        return Entry(self.folder / f"{key_of(model, taps, samples)}.statistics")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a store, as the journal that ``collect`` writes."""

    path: Path

    @property
    def state(self) -> State | None:
        """What is stored, if it is there and sound."""
        try:
            return _unpack(load(self._open(safe_io.read_bytes(self.path, limit=LIMIT))))
        except (QexportError, SafetensorError, KeyError, ValueError, IndexError, TypeError):
            return None

    def write(self, statistics: Mapping[str, Statistics], seen: frozenset[bytes]) -> None:
        """Store a state, in place of an earlier one; a full disk or a read-only folder is no reason to stop."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            safe_io.write_bytes(self.path, self._seal(save(_pack(statistics, seen))))
        except (QexportError, OSError):
            return

    def _seal(self, content: bytes) -> bytes:
        return self._digest(content) + content

    def _open(self, sealed: bytes) -> bytes:
        """What was sealed under this key; a ``ValueError`` where a bit of it is another."""
        digest, content = sealed[:DIGEST], sealed[DIGEST:]
        if digest != self._digest(content):
            raise ValueError("damaged")
        return content

    def _digest(self, content: bytes) -> bytes:
        state = hashlib.sha256(self.path.stem.encode())
        state.update(content)
        return state.digest()


def key_of(model: ir.Model, taps: Mapping[str, Window], samples: Iterable[bytes]) -> str:
    """Digest of everything the statistics depend on; the order of the samples does not count."""
    proto, weights = skeleton(model)
    state = hashlib.sha256(json.dumps([VERSION, sorted(taps.items())]).encode())
    for digest in sorted(set(samples)):
        state.update(digest)
    state.update(proto.SerializeToString(deterministic=True))
    for name in sorted(weights):
        state.update(name.encode())
        state.update(weights[name].reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def _pack(statistics: Mapping[str, Statistics], seen: frozenset[bytes]) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {
        "names": np.frombuffer(json.dumps(list(statistics)).encode(), np.uint8),
        "seen": _digests(sorted(seen)),
    }
    for index, known in enumerate(statistics.values()):
        histogram, kept = known.histogram, known.excerpts.kept
        arrays[f"{index}.extremes"] = np.array([histogram.low, histogram.high], np.float64)
        arrays[f"{index}.window"] = np.array([histogram.zeros, histogram.top], np.int64)
        arrays[f"{index}.counts"] = histogram.counts
        arrays[f"{index}.excerpts"] = _digests(sorted(kept))
        for place, digest in enumerate(sorted(kept)):
            arrays[f"{index}.excerpt.{place}"] = kept[digest]
    return arrays


def _unpack(arrays: Mapping[str, NDArray[Any]]) -> State:
    names = json.loads(arrays["names"].tobytes())
    statistics = {}
    for index, name in enumerate(names):
        low, high = (float(x) for x in arrays[f"{index}.extremes"])
        zeros, top = (int(x) for x in arrays[f"{index}.window"])
        histogram = Histogram(low, high, zeros, top)
        histogram.counts[:] = arrays[f"{index}.counts"]
        digests = [row.tobytes() for row in arrays[f"{index}.excerpts"]]
        kept = {digest: arrays[f"{index}.excerpt.{place}"].copy() for place, digest in enumerate(digests)}
        statistics[name] = Statistics(histogram, Excerpts(kept=kept))
    return statistics, frozenset(row.tobytes() for row in arrays["seen"])


def _digests(digests: Sequence[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), 32)
