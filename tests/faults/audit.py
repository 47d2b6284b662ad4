"""The record of what a command opens, writes and calls: Python's audit events, one JSON line each, into a pipe.

A pipe, because a limit on file sizes must not reach it. Processes that are forked inherit the hook; Python processes
that are executed get it from ``site/sitecustomize.py`` where they keep the environment and the descriptor.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from contextlib import suppress

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
FOLDERS = {"os.rename": (2, 3), "os.link": (2, 3), "os.symlink": (2,), "os.remove": (1,), "os.rmdir": (1,)}
FOLDERS |= {"os.mkdir": (2,), "os.chmod": (2,), "os.chown": (3,), "os.utime": (3,)}
"""Where events hold the descriptor of the folder of each of their paths."""
CHANGES = frozenset({*FOLDERS, "os.truncate"})
NETWORK = frozenset(
    {
        "socket.connect",
        "socket.getaddrinfo",
        "socket.gethostbyname",
        "socket.sendto",
        "socket.sendmsg",
        "urllib.Request",
    }
)
OTHERS = frozenset({"subprocess.Popen", "qexport.io"})
LONGEST = 4000  # bytes of a line; writes of up to 4096 into a pipe are never mixed


def record(descriptor: int) -> None:
    """Write the events of this process and of those that it forks into a pipe from now on."""

    def hook(event: str, args: tuple[object, ...]) -> None:
        line = _line(event, args)
        if line:
            with suppress(OSError):
                os.write(descriptor, line)

    sys.addaudithook(hook)


def call(name: str, root: str) -> None:
    """Call a hook of a case: ``name`` of ``faults.hooks``, or ``module:name`` of ``faults.module``."""
    module, _, function = name.rpartition(":")
    getattr(importlib.import_module(f"faults.{module or 'hooks'}"), function)(root)


def _line(event: str, args: tuple[object, ...]) -> bytes:
    if event == "open":
        told = _opened(args)
    elif event in CHANGES:
        told = _changed(event, args)
    elif event in NETWORK or event in OTHERS:
        told = [text(arg) for arg in args]
    else:
        return b""
    longest = LONGEST // (6 * len(told) + 6) if told else 0  # a character may become six
    return json.dumps([event, *(part[:longest] for part in told)]).encode() + b"\n" if told else b""


def _opened(args: tuple[object, ...]) -> list[str]:
    """Path, and how it is opened. Of a path under the descriptor of a folder only the name is known."""
    path, _, flags = args
    if isinstance(path, int):
        return []
    return [text(path), "write" if isinstance(flags, int) and flags & WRITES else "read"]


def _changed(event: str, args: tuple[object, ...]) -> list[str]:
    folders = [args[at] for at in FOLDERS.get(event, ()) if at < len(args)]
    paths = args[: max(len(folders), 1)] if event != "os.symlink" else args[1:2]
    return [_whole(path, folders[at] if at < len(folders) else -1) for at, path in enumerate(paths)]


def _whole(path: object, folder: object) -> str:
    """The whole of a path that may be relative to the descriptor of a folder, or be a descriptor itself."""
    with suppress(OSError):
        if isinstance(path, int):
            return os.readlink(f"/proc/self/fd/{path}")
        start = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else os.getcwd()
        return os.path.join(start, text(path))
    return text(path)


def text(value: object) -> str:
    """Names as text, whatever bytes they hold."""
    return os.fsdecode(value) if isinstance(value, (str, bytes, os.PathLike)) else str(value)
