"""Files that only their owner can write, and seals that tell whether they are what was written under a name.

A sealed file is a line with the version and the name, the SHA-256 of that line and the content, and the content. The
digest finds damage and mistaken names; that nobody else has written the file is for its owner and mode to say.
"""

from __future__ import annotations

import hashlib
import os
import stat
from io import BufferedReader
from pathlib import Path

from qexport.errors import UnsafeInput

MOST = 8 << 30
"""Bytes that a sealed file may have."""

Buffer = bytes | memoryview

_SCHEMA = b"qexport-cache/"
_VERSION = b"1"
_DIGEST = hashlib.sha256().digest_size
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def demand_own(folder: Path) -> None:
    """``UnsafeInput`` unless it is a folder that nobody but its owner, us or root, can write; raises ``OSError``."""
    where = str(folder)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        hint = "give the folder itself with --cache, or go without: --no-cache"
        raise UnsafeInput("a link or a file in the place of a folder of the cache", where=where, hint=hint)
    _demand_owner(status, where)


def _demand_own_file(status: os.stat_result, where: str) -> None:
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise UnsafeInput("no regular file, or one with several names", where=where, hint="remove it")
    _demand_owner(status, where)
    if status.st_size > MOST:
        raise ValueError(f"it has {status.st_size} bytes")


def _demand_owner(status: os.stat_result, where: str) -> None:
    if status.st_uid not in (0, os.geteuid()):
        hint = "choose another one with --cache, or go without: --no-cache"
        raise UnsafeInput(f"the cache belongs to another user ({status.st_uid})", where=where, hint=hint)
    if status.st_mode & _OTHERS:
        raise UnsafeInput("others can write to the cache", where=where, hint=f"chmod go-w {where}")


def open_own(path: Path) -> BufferedReader:
    """Open an entry and look at what is open; ``UnsafeInput`` unless it is a file that only its owner can write.

    Raises:
        ValueError: It is too large.
        OSError: It is not there, or cannot be read.
    """
    if stat.S_ISLNK(os.lstat(path).st_mode):
        raise UnsafeInput("a symbolic link in the cache", where=str(path), hint="remove it")
    fd = os.open(path, _FILE)
    try:
        _demand_own_file(os.fstat(fd), str(path))
    except BaseException:
        os.close(fd)
        raise
    return os.fdopen(fd, "rb")


def seal(name: str, *content: Buffer) -> bytes:
    """What stands before ``content``, which may be in pieces, in a file that is sealed under ``name``."""
    head = _head(name)
    return head + _digest(head, *content)


def unseal(file: BufferedReader, name: str) -> bytes:
    """The content of what was sealed under ``name``; ``ValueError`` with the reason where it was not."""
    line = file.readline(512)
    head = _head(name)
    if line != head:
        if not line.startswith(_SCHEMA):
            raise ValueError("it is damaged, or an earlier version wrote it")
        same = line.startswith(_SCHEMA + _VERSION + b" ")
        raise ValueError("it is that of another key" if same else "another version wrote it")
    digest, content = file.read(_DIGEST), file.read()
    if digest != _digest(head, content):
        raise ValueError("it is damaged")
    return content


def _head(name: str) -> bytes:
    return _SCHEMA + _VERSION + b" " + name.encode() + b"\n"


def _digest(head: bytes, *content: Buffer) -> bytes:
    state = hashlib.sha256(head)
    for piece in content:
        state.update(piece)
    return state.digest()
