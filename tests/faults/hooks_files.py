"""What goes wrong with files inside of a command; ``FAULT`` in its surroundings says at which step of safe_io."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import stat
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qexport.safe_io import EVENT, locking


def _on_step(root: str, act: Callable[[str], None]) -> None:
    """Act at each step of ``FAULT``, a point and a pattern of paths below the room."""
    point, pattern = os.environ["FAULT"].split(" ")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == EVENT and args[0] == point and fnmatch(os.path.relpath(args[1], root), pattern):
            act(args[1])

    sys.addaudithook(hook)


def killed(root: str) -> None:
    """SIGKILL, for the process that the command began as too."""
    first = os.getpid()

    def act(path: str) -> None:
        if os.getpid() != first:
            os.kill(first, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    _on_step(root, act)


def failing(root: str) -> None:
    """An error of the disk."""

    def act(path: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    _on_step(root, act)


def full(root: str) -> None:
    """No space."""

    def act(path: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    _on_step(root, act)


def killed_after_weights(root: str) -> None:
    """SIGKILL as ``FAULT`` says, with weights of any size in a file of their own."""
    _weights_apart()
    killed(root)


def _weights_apart() -> None:
    from qexport.exporter import onnx_file

    onnx_file.save_onnx.__kwdefaults__["threshold"] = 0


def limited(root: str) -> None:
    """Files may have nine tenths of the size of one of the earlier artefact: the one whose place ``FAULT`` says."""
    sizes = sorted(path.stat().st_size for path in Path(root, "out/a").iterdir())
    size = sizes[int(os.environ["FAULT"])] * 9 // 10
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def short_writes(root: str) -> None:
    """Files take a part of what is written, and an odd one."""
    real = os.write

    def write(fd: int, data: Any) -> int:
        part = max(len(data) * 2 // 3, 1) if stat.S_ISREG(os.fstat(fd).st_mode) else len(data)
        return real(fd, bytes(memoryview(data)[:part]))

    os.write = write


def interrupted(root: str) -> None:
    """A signal every millisecond that nobody minds, as from a terminal that is resized all the time."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    os.register_at_fork(after_in_child=lambda: signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001))


def impatient(root: str) -> None:
    """Locks are waited for half a second."""
    locking.PATIENCE = 0.5


def no_locks(root: str) -> None:
    """A file system without locks, as some of those over a network."""

    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = flock
