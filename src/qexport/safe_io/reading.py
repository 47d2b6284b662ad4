"""Open, read and digest regular files; follow no link that a model names."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader
from mmap import mmap
from pathlib import Path
from typing import TypeVar

from qexport.errors import IntegrityError, ModelInvalid, QexportError, ResourceExhausted, UnsafeInput, UsageError
from qexport.safe_io.translate import reason, translated

_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY
_PIN = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC  # while it is open, no other folder gets its number
_TRIES = 8
_PIECE = 1 << 16

T = TypeVar("T")


def open_file(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file that a person named; links are followed.

    Raises:
        UsageError: It is missing or a folder.
        UnsafeInput: It is a FIFO, a socket or a device; it is never waited for.
        ResourceExhausted: It cannot be read.
    """
    where = os.fspath(path)
    if "\0" in where:
        raise UsageError("not a name of a file", where=where)
    with translated(path):
        _demand_regular(os.stat(path), where)
        fd = os.open(path, _FILE)
    try:
        _demand_regular(os.fstat(fd), where)
    except BaseException:
        os.close(fd)
        raise
    return os.fdopen(fd, "rb")


def _demand_regular(status: os.stat_result, where: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise UsageError("a folder was given where a file is needed", where=where)
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeInput("not a regular file", where=where, hint="FIFOs, sockets and devices are not read")


def read_bytes(path: str | os.PathLike[str], *, limit: int | None = None) -> bytes:
    """Read a whole regular file; raise ``ResourceExhausted`` when it has more than ``limit`` bytes."""
    with open_file(path) as file, translated(path):
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise ResourceExhausted(f"the file has {size} bytes, the limit is {limit}", where=os.fspath(path))
        data = file.read(size)
        while more := file.read(_PIECE):  # it grows, or is one of those of the kernel, which have no size
            data += more
            if limit is not None and len(data) > limit:
                what = f"the file has more than {limit} bytes, which is the limit"
                raise ResourceExhausted(what, where=os.fspath(path))
        return data


def read_text(path: str | os.PathLike[str], *, limit: int | None = None) -> str:
    """Read a whole UTF-8 file; raise ``UsageError`` when it is not UTF-8."""
    try:
        return read_bytes(path, limit=limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 text: bad byte at offset {error.start}", where=os.fspath(path)) from error


def digest_bytes(data: bytes | mmap) -> str:
    """``sha256:`` and the hexadecimal digest."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def digest_file(path: str | os.PathLike[str]) -> str:
    """Digest of a regular file, read in pieces."""
    with open_file(path) as file, translated(path):
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def of_one_version(folder: str | os.PathLike[str], read: Callable[[], T]) -> T:
    """Call ``read``, which reads files of ``folder`` by their names, again if the folder was replaced meanwhile.

    Raises:
        IntegrityError: It was replaced every time.
        QexportError: Whatever ``read`` raises while nobody replaces the folder.
    """
    for _ in range(_TRIES):
        try:
            fd = os.open(folder, _PIN)
        except OSError:
            return read()
        try:
            found = read()
            if _is_still(fd, folder):
                return found
        except QexportError:
            if _is_still(fd, folder):
                raise
        finally:
            os.close(fd)
    what = f"the folder was replaced {_TRIES} times while it was read"
    raise IntegrityError(what, where=os.fspath(folder), hint="try again when nobody writes it")


def _is_still(fd: int, path: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def open_beneath(root: Path, relative: str) -> BufferedReader:
    """Open the regular file ``relative`` below ``root`` without following any link.

    Every component is opened relative to the one before, so swapping a file for a link meanwhile cannot lead out.

    Raises:
        UnsafeInput: An absolute path, ``..``, a link anywhere below ``root``, a hard link, FIFO, device or folder.
        ModelInvalid: There is no such file.
        ResourceExhausted: It cannot be read.
    """
    parts = safe_parts(relative)
    where = str(root / (relative if len(relative) <= 120 else f"{relative[:120]}…"))
    with translated(root):
        folder = os.open(root, _FOLDER)
    try:
        for part in parts[:-1]:
            inner = _open_part(folder, part, _FOLDER, where)
            os.close(folder)
            folder = inner
        fd = _open_part(folder, parts[-1], _FILE, where)
    finally:
        os.close(folder)
    return os.fdopen(fd, "rb")


def safe_parts(relative: str) -> list[str]:
    """Split a relative path; ``UnsafeInput`` unless it stays below its folder on every operating system."""
    parts = [part for part in re.split(r"[/\\]", relative) if part not in ("", ".")]
    if relative[:1] in ("/", "\\") or re.match(r"^[A-Za-z]:", relative):
        raise UnsafeInput(f"absolute path {relative!r}", hint="file names inside a model are relative to the model")
    if ".." in parts:
        raise UnsafeInput(f"path {relative!r} leaves the folder of the model")
    if "\0" in relative or "\\" in relative or not parts:
        raise UnsafeInput(f"path {relative!r} is not a file name")
    return parts


def _open_part(folder: int, part: str, flags: int, where: str) -> int:
    """Open one component; look before, because opening a device or a FIFO has effects, and look again after."""
    try:
        _demand_plain(os.stat(part, dir_fd=folder, follow_symlinks=False), flags, where)
        fd = os.open(part, flags | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
            raise ModelInvalid(
                "the model refers to a file that does not exist", where=where, hint=_twin(folder, part)
            ) from error
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise UnsafeInput("a link or not a folder", where=where) from error
        raise reason(error, where) from error
    try:
        _demand_plain(os.fstat(fd), flags, where)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _demand_plain(status: os.stat_result, flags: int, where: str) -> None:
    if stat.S_ISLNK(status.st_mode):
        hint = "copy the folder with its links resolved (cp -rL) and use the copy"
        raise UnsafeInput("a symbolic link", where=where, hint=hint)
    if flags & os.O_DIRECTORY:
        return
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeInput("not a regular file", where=where)
    if status.st_nlink > 1:
        raise UnsafeInput(f"the file has {status.st_nlink} hard links", where=where, hint="use a copy of the file")


def _twin(folder: int, part: str) -> str:
    """A hint for a missing file: a name that differs in case only, if there is one."""
    names: list[str] = []
    with suppress(OSError):
        names = os.listdir(folder)
    twin = next((name for name in names if name.lower() == part.lower()), None)
    return f"there is {twin!r}: names are case-sensitive" if twin else "put the file beside the model"
