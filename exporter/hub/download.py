"""Files of a hub, piece by piece: what has arrived is kept in the cache, what is published has the right digest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from qexport.errors import IntegrityError, QexportError
from qexport.exporter.hub.connection import PAUSES, Answer, CutError, Hub, Meter
from qexport.exporter.hub.listing import Listed
from qexport.safe_io import Cache, Stage, open_beneath

KIND = "fetch"
PIECE = 16 << 20
"""Bytes that are kept at once."""


class DamagedError(IntegrityError):
    """What has arrived is not the file."""


def download(hub: Hub, address: str, file: Listed, stage: Stage, cache: Cache) -> None:
    """Put a file into the stage: what the cache has of it, and the rest from the hub.

    Args:
        hub: Where from.
        address: Of the file, below the endpoint.
        file: Its name, size and digest.
        stage: Where to.
        cache: What keeps the pieces, so that the next run goes on.

    Raises:
        IntegrityError: Twice it was shorter, longer, or another one than was announced.
        QexportError: As of ``Hub.get``.
    """
    for last in (False, True):
        try:
            _put(stage, file, _pieces(hub, address, file, cache))
        except DamagedError as error:
            os.unlink(stage.path / file.name)
            forget(cache, [file])
            if last:
                hint = "somebody has changed it on its way, or the hub is broken: try again, or another network"
                what = f"{file.name} is not what was announced: {error.what}"
                raise IntegrityError(what, where=address, hint=hint) from error
        else:
            return


def copy(file: Listed, folder: Path, stage: Stage) -> bool:
    """Put a file of an earlier fetch into the stage, where it is still what it was."""
    try:
        old = open_beneath(folder, file.name)
    except QexportError:
        return False
    with old:
        digest = file.hasher()
        if os.fstat(old.fileno()).st_size == file.bytes:
            for piece in iter(lambda: old.read(1 << 20), b""):
                digest.update(piece)
        same = digest.hexdigest() == file.digest
        if same:
            old.seek(0)
            _put(stage, file, iter(lambda: old.read(1 << 20), b""))
    return same


def forget(cache: Cache, files: Iterable[Listed]) -> None:
    """Remove the pieces of files from the cache."""
    digests = {file.digest for file in files}
    for kept in cache.entries():
        if kept.kind == KIND and kept.key.partition("/")[0] in digests:
            cache.remove(kept)


def _put(stage: Stage, file: Listed, pieces: Iterable[bytes]) -> None:
    """Write pieces under the name of the file; ``DamagedError`` where they are not the file."""
    digest = file.hasher()
    with stage.create(file.name) as out:
        for piece in pieces:
            digest.update(piece)
            out.write(piece)
        if digest.hexdigest() != file.digest:
            raise DamagedError(f"its digest is {digest.hexdigest()}, not {file.digest}")


def _pieces(hub: Hub, address: str, file: Listed, cache: Cache) -> Iterator[bytes]:
    with closing(_Stream(hub, address)) as stream:
        for start in range(0, file.bytes, PIECE):
            size = min(PIECE, file.bytes - start)
            entry = cache.entry(KIND, f"{file.digest}/{start // PIECE:06d}")
            data = entry.read()
            if data is None or len(data) != size:
                data = stream.read(start, size)
                entry.write(data)
            yield data
        stream.demand_end(file.bytes)


class _Stream:
    """Reads a file of the hub from any place on, and goes on where a connection has ended."""

    def __init__(self, hub: Hub, address: str) -> None:
        self._ask: Callable[[int], Answer] = lambda start: hub.get(address, start, meter)
        self._answer: Answer | None = None
        self._at = 0
        meter = Meter()

    def read(self, start: int, size: int) -> bytes:
        """``size`` bytes from ``start`` on; ``DamagedError`` where there are not so many, however often it is asked."""
        data, pauses = bytearray(), list(PAUSES)
        while len(data) < size:
            part = self._part(start + len(data), size - len(data))
            data += part
            if not part and not pauses:
                raise DamagedError(f"it ends after {start + len(data)} bytes")
            if not part:
                self.close()
                time.sleep(pauses.pop(0))
        return bytes(data)

    def demand_end(self, size: int) -> None:
        """``DamagedError`` where what was read from goes on behind ``size`` bytes."""
        with suppress(CutError):
            if self._answer is not None and self._at == size and self._answer.read(1):
                raise DamagedError(f"it goes on after {size} bytes")

    def close(self) -> None:
        """Leave the connection."""
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def _part(self, start: int, size: int) -> bytes:
        """Up to ``size`` bytes; none where the connection ends."""
        try:
            if self._answer is None or self._at != start:
                self.close()
                self._answer = self._ask(start)
                self._at = self._answer.start
            if not 0 <= self._at <= start:
                raise DamagedError(f"asked for what begins at {start}, the server sends what begins at {self._at}")
            while self._at < start:  # a server that knows no ranges begins at the beginning
                self._at += len(self._some(start - self._at))
            part = self._some(size)
            self._at += len(part)
        except CutError:
            return b""
        return part

    def _some(self, size: int) -> bytes:
        part = self._answer.read(size) if self._answer is not None else b""
        if not part:
            raise CutError
        return part
