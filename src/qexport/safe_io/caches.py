"""A folder of what took long to find out: it may go missing at any time, and is believed only where it is sound.

A file lies at ``FOLDER/KIND/KEY``, or ``FOLDER/KIND/KEY/NAME``, sealed under that name (``sealing.py``). Files and
folders have to be the user's own, and nobody else's to write. Folders above may belong to whomever: all that can be put
in the place of ours has another owner.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from qexport.errors import IntegrityError, QexportError, UnsafeInput
from qexport.safe_io.locking import lock, try_lock
from qexport.safe_io.points import reach
from qexport.safe_io.sealing import MOST, Buffer, demand_own, open_own, seal, unseal
from qexport.safe_io.translate import reason, translated
from qexport.safe_io.writing import TEMPORARY, is_written, replacing

KINDS = ("statistics", "builds", "timing", "machines", "fetch")
LIMIT = 20 << 30
"""Bytes that a cache may take."""

_PART = r"[0-9a-z][0-9a-z._-]{0,127}"
_KEY = re.compile(rf"{_PART}(/{_PART})?")
_FORMER = re.compile(r"[0-9a-f]{64}\.(statistics|safetensors)")  # earlier versions kept these in the folder itself
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Kept:
    """One file of a cache.

    Attributes:
        kind: One of ``KINDS``; empty for files of earlier versions.
        key: Its key, or its name where it is no entry.
        path: Where it lies.
        bytes: Its size.
        used: When it was last read or written, in seconds of ``time.time``.
        problem: Why it is of no use; empty where nothing is known against it.
    """

    kind: str
    key: str
    path: Path
    bytes: int
    used: float
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Cache:
    """A folder of entries.

    Attributes:
        folder: Where they lie; made, for its owner alone, when the first one is written. ``None`` keeps nothing.
        limit: Bytes that all of them may take; the ones that were not used for longest go first.
        strict: Whether an unsound entry is an ``IntegrityError``; else it is a doubt, and counts as absent.
        doubts: What has gone wrong so far, a sentence each.
    """

    folder: Path | None = None
    limit: int = LIMIT
    strict: bool = False
    doubts: list[str] = field(default_factory=list, compare=False)

    def entry(self, kind: str, key: str) -> Entry:
        """The entry of a kind under a key of lower-case letters and digits, with one ``/`` at most.

        Nothing is opened yet.
        """
        if kind not in KINDS or not _KEY.fullmatch(key):
            raise ValueError(f"no entry is called {kind}/{key}")
        return Entry(self, kind, key)

    @contextmanager
    def hold(
        self, kind: str, key: str, seconds: float = 3600.0, waiting: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Keep others from the folder of ``KIND/KEY/...``, so that equal work is done once.

        Where nothing can be kept, or the file system has no locks, this is a doubt and nobody is kept from anything.

        Args:
            kind: One of ``KINDS``.
            key: A key without ``/``.
            seconds: How long to wait for others.
            waiting: Called once when there is somebody to wait for.

        Raises:
            Busy: Others held it all the time.
            UnsafeInput: The folder is not ours alone.
        """
        folder = self.folder / kind / key if self.folder else None
        fd = self._lock(folder, seconds, waiting) if folder else None
        try:
            yield
        finally:
            if folder and fd is not None:
                with suppress(OSError):  # it has something in it
                    folder.rmdir()
                os.close(fd)

    def entries(self) -> tuple[Kept, ...]:
        """Every file of ours in the folder, and what killed processes and earlier versions have left; none is read.

        Raises:
            UnsafeInput: A folder is not ours alone.
        """
        if self.folder is None or not os.path.lexists(self.folder):
            return ()
        demand_own(self.folder)
        found = [_kept("", item, "an earlier version wrote it") for item in _files(self.folder, _FORMER)]
        for kind in KINDS:
            for folder in _folders(self.folder / kind):
                found += _of_folder(self.folder / kind, folder)
        return tuple(entry for entry in found if entry is not None)

    def verify(self) -> tuple[Kept, ...]:
        """Read every entry; ``entries`` with the ``problem`` of each that has one.

        Raises:
            UnsafeInput: A folder or an entry is not ours alone.
        """
        return tuple(_verified(entry) for entry in self.entries())

    def prune(self, limit: int | None = None, older_than: float | None = None) -> tuple[Kept, ...]:
        """Remove what is of no use, what was not used for ``older_than`` seconds, and then the least recent.

        Args:
            limit: Bytes that may stay; those of the cache when not given.
            older_than: Seconds.

        Returns:
            What was removed. What another process holds stays, and so do files that are none of ours.
        """
        entries = sorted(self.entries(), key=lambda entry: entry.used)
        most = self.limit if limit is None else limit
        total, removed = sum(entry.bytes for entry in entries), []
        now = time.time()
        for entry in entries:
            old = older_than is not None and now - entry.used > older_than
            if (entry.problem or old or total > most) and self.remove(entry):
                total -= entry.bytes
                removed.append(entry)
        return tuple(removed)

    def remove(self, entry: Kept) -> bool:
        """Remove one file; ``False`` where that cannot be, or another process holds its folder."""
        inner = entry.path.parent if "/" in entry.key else None
        try:
            fd = os.open(inner, _FOLDER) if inner else None
        except OSError:
            return False
        try:
            if fd is not None and try_lock(fd) is False:
                return False
            reach("remove", entry.path)
            entry.path.unlink()
            if inner:
                with suppress(OSError):  # it has more in it
                    inner.rmdir()
        except OSError:
            return False
        finally:
            if fd is not None:
                os.close(fd)
        return True

    def doubt(self, text: str) -> None:
        """Note what has gone wrong, once."""
        if text not in self.doubts:
            self.doubts.append(text)

    def _lock(self, folder: Path, seconds: float, waiting: Callable[[], None]) -> int | None:
        """Lock a folder that is made where there is none; a descriptor, or ``None`` with a doubt."""
        while True:
            try:
                self._make(folder)
                with translated(folder):
                    fd = os.open(folder, _FOLDER)
            except UnsafeInput:
                raise
            except QexportError as error:
                self.doubt(f"the cache cannot be used: {error}")
                return None
            try:
                if not lock(fd, str(folder), seconds, waiting):
                    self.doubt(f"{folder}: the file system has no locks, equal builds may do their work twice")
                if _is_at(fd, folder):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # removed while we waited for it

    def _make(self, folder: Path) -> None:
        """Make the folders from the cache's own down to ``folder`` and look at each; ``OSError`` comes translated."""
        own = self.folder or folder
        missing = [parent for parent in own.parents if not os.path.lexists(parent)]
        inner = [own, *reversed([parent for parent in (folder, *folder.parents) if own in parent.parents])]
        for path in (*reversed(missing), *inner):
            if not os.path.lexists(path):
                with translated(path):
                    reach("mkdir", path)
                    path.mkdir(mode=0o700, exist_ok=True)
            if path not in missing:
                demand_own(path)


@dataclass(frozen=True, slots=True)
class Entry:
    """A place in a cache, whether there is something or not."""

    cache: Cache
    kind: str
    key: str

    @property
    def path(self) -> Path | None:
        """Where it lies, if anything is kept."""
        return None if self.cache.folder is None else self.cache.folder / self.kind / self.key

    def read(self) -> bytes | None:
        """What is kept; ``None`` where there is nothing, or nothing sound.

        Raises:
            UnsafeInput: The file or a folder is a link, or not ours alone.
            IntegrityError: It is not sound and the cache is strict.
        """
        if self.path is None or self.cache.folder is None:
            return None
        try:
            own = self.cache.folder
            for folder in reversed([parent for parent in self.path.parents if parent.is_relative_to(own)]):
                demand_own(folder)
            with open_own(self.path) as file:
                content = unseal(file, f"{self.kind}/{self.key}")
                with suppress(OSError):
                    os.utime(file.fileno())
                return content
        except FileNotFoundError:
            return None
        except OSError as error:
            self.cache.doubt(f"the cache cannot be used: {reason(error, str(self.path))}")
        except ValueError as error:
            self.reject(str(error))
        return None

    def write(self, *content: Buffer) -> bool:
        """Keep something, which may be in pieces, in place of what was there.

        Returns:
            Whether it is kept; ``False``, with a doubt, where there is no room or no permission.

        Raises:
            UnsafeInput: A folder is not ours alone.
        """
        if self.path is None:
            return False
        head = seal(f"{self.kind}/{self.key}", *content)
        size = len(head) + sum(memoryview(piece).nbytes for piece in content)
        if size > min(self.cache.limit, MOST):
            self.cache.doubt(f"{self.path}: {size} bytes are too many for the cache")
            return False
        try:
            self.cache._make(self.path.parent)
            self.cache.prune(self.cache.limit - size)
            with translated(self.path), replacing(self.path, 0o600) as file:
                for piece in (head, *content):
                    file.write(piece)
        except UnsafeInput:
            raise
        except QexportError as error:
            self.cache.doubt(f"nothing was kept in the cache: {error}")
            return False
        return True

    def set_aside(self) -> None:
        """Let what is there, if anything, be no entry any more, but lie beside it with ``.bad`` behind its name."""
        if self.path is not None:
            with suppress(OSError):
                reach("rename", self.path)
                os.replace(self.path, f"{self.path}.bad")

    def reject(self, why: str) -> None:
        """Say that what is kept is of no use.

        Raises:
            IntegrityError: The cache is strict.
        """
        if self.cache.strict:
            hint = "leave out --strict-cache to compute it again, or remove it: qexport cache prune"
            raise IntegrityError(f"unsound in the cache: {why}", where=str(self.path), hint=hint)
        self.cache.doubt(f"{self.path}: passed over in the cache and computed again: {why}")


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    with os.scandir(folder) as items:
        return sorted(Path(i.path) for i in items if pattern.fullmatch(i.name) and i.is_file(follow_symlinks=False))


def _folders(kind: Path) -> list[Path]:
    """The folder of a kind and those in it, each of them ours alone."""
    if not os.path.lexists(kind):
        return []
    demand_own(kind)
    with os.scandir(kind) as items:
        inner = sorted(Path(i.path) for i in items if _KEY.fullmatch(i.name) and i.is_dir(follow_symlinks=False))
    for folder in inner:
        demand_own(folder)
    return [kind, *inner]


def _of_folder(kind: Path, folder: Path) -> list[Kept | None]:
    dead = [path for path in _files(folder, TEMPORARY) if not _written(path)]
    left = [_kept(kind.name, path, "a process left it that was ended") for path in dead]
    return [*(_kept(kind.name, path, key=str(path.relative_to(kind))) for path in _files(folder, _KEY)), *left]


def _written(path: Path) -> bool:
    try:
        return is_written(str(path))
    except OSError:
        return True


def _kept(kind: str, path: Path, problem: str = "", key: str = "") -> Kept | None:
    """What is known of a file; ``None`` where it is gone."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return Kept(kind, key or path.name, path, status.st_size, status.st_mtime, problem)


def _verified(entry: Kept) -> Kept:
    problem = entry.problem
    try:
        if not problem:
            with open_own(entry.path) as file:
                unseal(file, f"{entry.kind}/{entry.key}")
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        problem = (error.strerror or str(error)).lower()
    return Kept(entry.kind, entry.key, entry.path, entry.bytes, entry.used, problem)
