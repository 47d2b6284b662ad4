"""Locks of open files and folders, which end with the process that holds them; there are no lock files."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qexport.errors import Busy
from qexport.safe_io.points import reach

PATIENCE = 60.0  # seconds; folders are locked for moments
_LONGEST_PAUSE = 0.1

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def lock(fd: int, where: str, seconds: float, waiting: Callable[[], None] = lambda: None) -> bool:
    """Lock what ``fd`` is open on until it is closed; ``False`` where the file system has no locks.

    Args:
        fd: Descriptor of a file or folder.
        where: Its name, for messages.
        seconds: How long to wait for another holder.
        waiting: Called once when there is something to wait for.

    Raises:
        Busy: Somebody else held it all the time.
    """
    reach("lock", where)
    end, pause = time.monotonic() + seconds, 0.001
    while not (locked := try_lock(fd)):
        if locked is None:
            return False
        if pause == 0.001:
            waiting()
        if time.monotonic() >= end:
            what = f"another process holds the lock, for more than {seconds:g} s"
            raise Busy(what, where=where, hint="wait for it, or end it: locks end with their processes")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return True


def try_lock(fd: int) -> bool | None:
    """Lock at once: whether that worked, ``None`` where the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK and EBADF of network file systems, ENOSYS
        return None
    return True


@contextmanager
def locked_folder(folder: Path) -> Iterator[int]:
    """Hold the lock of ``folder``, or go on without it on a file system without locks; yields a descriptor of it."""
    fd = os.open(folder, _FOLDER)
    try:
        lock(fd, str(folder), PATIENCE)
        yield fd
    finally:
        os.close(fd)
