"""Write one file so that readers see the old bytes or the new ones, never a part."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from qexport.errors import UsageError
from qexport.safe_io.locking import try_lock
from qexport.safe_io.points import reach
from qexport.safe_io.translate import translated

_PIECE = 1 << 24
TEMPORARY = re.compile(r"\.(?P<stem>.+)\.tmp-[0-9a-f]{16}")


class Sink(io.RawIOBase):
    """Writes everything it is given to a descriptor, counting and digesting on the way."""

    def __init__(self, fd: int, path: Path) -> None:
        super().__init__()
        self._fd = fd
        self._path = path
        self._hash = hashlib.sha256()
        self._size = 0
        self._told = -_PIECE  # the place where a write was last announced

    def writable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def write(self, data: Any, /) -> int:
        """Write all of ``data``, however often the system call has to be repeated."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            if self._size + done >= self._told + _PIECE:
                self._told = self._size + done
                reach("write", self._path)
            done += os.write(self._fd, view[done : done + _PIECE])
        self._hash.update(view)
        self._size += done
        return done

    def finish(self) -> tuple[int, str]:
        """Flush to the disk; return bytes and digest."""
        reach("fsync", self._path)
        os.fsync(self._fd)
        return self._size, f"sha256:{self._hash.hexdigest()}"


def create(path: Path, mode: int = 0o666) -> int:
    """Descriptor of a new file whose mode is what the umask leaves of ``mode``."""
    reach("create", path)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    reach("sync-folder", folder)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def to_json(value: object) -> bytes:
    """Indented UTF-8 JSON with a final newline; ``ValueError`` for NaN and Inf, which JSON does not have.

    The bytes of a file name that are not UTF-8 are surrogates in Python and their escapes in JSON.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # only surrogates cannot be encoded, and JSON escapes them alike


def finite(value: Any) -> Any:
    """Replace NaN and infinities in nested dicts and lists by ``None``, which is ``null`` in JSON."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def beside(target: Path, kind: str) -> Path:
    """A new hidden name in the folder of ``target``: ``.NAME.KIND-RANDOM``."""
    return target.with_name(f".{stem(target)}.{kind}-{secrets.token_hex(8)}")


def stem(target: Path) -> str:
    """The name of ``target``, or its digest where the name leaves no room for an ending."""
    raw = os.fsencode(target.name)
    return target.name if len(raw) <= 200 else hashlib.sha256(raw).hexdigest()


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file piece by piece; it replaces what is there, in one step, when the block ends well.

    When the block raises, or this process dies in the middle, the old content stays. A link is followed; an existing
    character device, such as ``/dev/stdout``, is written to directly.

    Raises:
        UsageError: The path is a folder, or its folder is missing.
        ResourceExhausted: No space, no permission.
    """
    with translated(path):
        target = Path(os.path.realpath(path))
        there = target.exists() and not target.is_file()
        with _device(target) if there else replacing(target) as sink:
            yield sink  # type: ignore[misc]  # a RawIOBase has all that BinaryIO asks of a writer


@contextmanager
def replacing(target: Path, mode: int = 0o666) -> Iterator[Sink]:
    """``replace_file`` of a name that is no link, with what the umask leaves of ``mode``; raises ``OSError``."""
    temporary, fd = _open_temporary(target, mode)
    try:
        try:
            sink = Sink(fd, target)
            yield sink
            sink.finish()
            reach("rename", target)
            os.replace(temporary, target)  # while it is locked: nobody takes it for a dead one
        finally:
            os.close(fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(target.parent)


def _open_temporary(target: Path, mode: int) -> tuple[Path, int]:
    """Make and lock a file; the lock tells the living from the dead, whose files are removed first.

    Who collects may have taken it for a dead one in the moment before the lock: then there is another one. The folder
    is not locked for that, as it may be a stage, which its owner locks for as long as it lives.
    """
    with suppress(OSError):  # what cannot be removed does not stop the work
        _collect(target)
    while True:
        temporary = beside(target, "tmp")
        fd = create(temporary, mode)
        if try_lock(fd) is not False and os.path.exists(temporary):
            return temporary, fd
        os.close(fd)


def _collect(target: Path) -> None:
    """Remove what processes that died while they wrote ``target`` have left beside it."""
    for entry in os.scandir(target.parent):
        match = TEMPORARY.fullmatch(entry.name)
        mine = match is not None and match["stem"] == stem(target) and entry.is_file(follow_symlinks=False)
        if mine and not is_written(entry.path):
            reach("remove", entry.path)
            os.unlink(entry.path)


def is_written(temporary: str) -> bool:
    """Whether somebody writes a file; so it seems where nobody can tell."""
    fd = os.open(temporary, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return try_lock(fd) is not True
    finally:
        os.close(fd)


@contextmanager
def _device(target: Path) -> Iterator[Sink]:
    if not target.is_char_device():
        raise UsageError("not a file", where=str(target), hint="choose the name of a file")
    fd = os.open(target, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        yield Sink(fd, target)
    finally:
        os.close(fd)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """``replace_file`` in one piece."""
    with replace_file(path) as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """``write_bytes`` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """``write_bytes`` of indented JSON; ``ValueError`` for NaN and Inf, which JSON does not have."""
    write_bytes(path, to_json(value))
