"""Turn what the operating system says into errors a person can act on."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from qexport.errors import QexportError, ResourceExhausted, UsageError

_USAGE = {
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "a part of the path is not a folder",
    errno.EEXIST: "a part of the path is a file",
    errno.EISDIR: "it is a folder",
    errno.ELOOP: "too many links",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EBUSY: "it is a mount point or in use",
    errno.EXDEV: "it is a mount point or belongs to a lower layer of the file system",
}
_HINTS = {
    errno.EACCES: "check the permissions of the file and of its folder",
    errno.EPERM: "check the permissions of the file and of its folder",
    errno.EROFS: "the file system is read-only: choose another place",
    errno.ENOSPC: "free some disk space or choose another place",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another place",
    errno.EFBIG: "the file would pass the size limit of this process or file system",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
    errno.EBUSY: "choose a folder inside it",
    errno.EXDEV: "choose a folder inside it, or remove it first",
}


def reason(error: OSError, where: str) -> QexportError:
    """``UsageError`` for a wrong path, ``ResourceExhausted`` for everything the machine lacks."""
    number = error.errno or 0
    hint = _HINTS.get(number)
    if number in _USAGE:
        return UsageError(_USAGE[number], where=where, hint=hint)
    text = (error.strerror or str(error)).lower()
    return ResourceExhausted(f"cannot be read or written: {text}", where=where, hint=hint)


@contextmanager
def translated(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise ``reason`` for every ``OSError`` of the block."""
    try:
        yield
    except OSError as error:
        raise reason(error, os.fspath(path)) from error
