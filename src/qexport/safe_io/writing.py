"""Write one file so that readers see the old bytes or the new ones, never a part."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from qexport.errors import UsageError
from qexport.safe_io.translate import translated

_PIECE = 1 << 24


class Sink(io.RawIOBase):
    """Writes everything it is given to a descriptor, counting and digesting on the way."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._hash = hashlib.sha256()
        self._size = 0

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
            done += os.write(self._fd, view[done : done + _PIECE])
        self._hash.update(view)
        self._size += done
        return done

    def finish(self) -> tuple[int, str]:
        """Flush to the disk; return bytes and digest."""
        os.fsync(self._fd)
        return self._size, f"sha256:{self._hash.hexdigest()}"


def create(path: Path) -> int:
    """Descriptor of a new file whose mode is what the umask leaves of 0666."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
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
        with _device(target) if there else _replacing(target) as sink:
            yield sink  # type: ignore[misc]  # a RawIOBase has all that BinaryIO asks of a writer


@contextmanager
def _replacing(target: Path) -> Iterator[Sink]:
    temporary = beside(target, "tmp")
    fd = create(temporary)
    try:
        try:
            sink = Sink(fd)
            yield sink
            sink.finish()
        finally:
            os.close(fd)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(target.parent)


@contextmanager
def _device(target: Path) -> Iterator[Sink]:
    if not target.is_char_device():
        raise UsageError("not a file", where=str(target), hint="choose the name of a file")
    fd = os.open(target, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        yield Sink(fd)
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
