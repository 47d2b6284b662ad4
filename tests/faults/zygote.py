"""A process that has imported everything and forks for each command: the start of a command in 10 ms, not a second.

It opens no session and starts no thread. Being the reaper of everything below it, it also knows what outlives a
command. It answers requests that come over a socket, one JSON object each:

- ``{"do": "start", ...}`` with three descriptors (stdout, stderr, the record of events): ``{"pid": ...}``
- ``{"do": "wait", "pid": ..., "seconds": ...}``: ``{"code", "at", "wall", "rss", "cpu", "left", "late"}``
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import resource
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from faults import audit

HEAVY = (
    # for users who cannot read the interpreter's folder
    *("encodings.ascii", "encodings.cp437", "encodings.idna", "encodings.latin_1", "encodings.cp437"),
    *("jinja2", "ssl", "importlib.readers", "importlib.resources.readers", "ssl"),
    *("numpy", "onnx", "onnx_ir", "onnxscript", "onnxslim", "pydantic", "rich.table", "safetensors.numpy"),
    *("tokenizers", "threadpoolctl", "ml_dtypes", "qexport.exporter.build", "qexport.exporter.export"),
)
_SET_CHILD_SUBREAPER = 36
_GRACE = 2.0  # seconds for processes that die with their parent
_HERE = Path(__file__).parent


def serve(channel: socket.socket) -> None:
    """Import, then answer until the other end is closed."""
    for name in HEAVY:
        importlib.import_module(name)
    importlib.import_module("qexport.runtime.session").load_onnxruntime()
    for found in pkgutil.walk_packages(importlib.import_module("qexport").__path__, "qexport."):
        if not found.name.endswith("__main__"):
            with suppress(ImportError):  # what needs packages that are not there
                importlib.import_module(found.name)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us in the background
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has one thread alone, and waits for the others at its end"
    gc.collect()
    gc.freeze()  # the pages of what is there already stay shared
    started: dict[int, float] = {}
    channel.send(b"{}")
    while True:
        data, descriptors, *_ = socket.recv_fds(channel, 1 << 20, 3)
        if not data:
            return
        request = json.loads(data)
        answer = _start(request, descriptors, started, channel) if request["do"] == "start" else _wait(request, started)
        channel.send(json.dumps(answer).encode())


def _start(request: dict[str, Any], descriptors: list[int], started: dict[int, float], channel: socket.socket) -> Any:
    pid = os.fork()
    if pid == 0:
        channel.close()
        _become(request, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    started[pid] = time.monotonic()
    return {"pid": pid}


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Be the command; does not return."""
    out, err, log = descriptors
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate((nothing, out, err)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    streams = [open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2)]  # noqa: SIM115 - for good
    sys.stdout, sys.stderr = streams
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    os.chdir(request["cwd"])
    _limit(request["limits"])
    if request["way"] == "cold":
        os.set_inheritable(log, True)
        more = {"FAULTS_LOG": str(log), "FAULTS_HOOK": request["hook"], "FAULTS_ROOM": request["room"]}
        paths = {"FAULTS_PATH": str(_HERE.parent), "PYTHONPATH": f"{_HERE / 'site'}:{os.environ['PYTHONPATH']}"}
        os.execve(sys.executable, [sys.executable, "-m", "qexport", *request["argv"]], {**os.environ, **more, **paths})
    audit.record(log)
    if request["hook"]:
        audit.call(request["hook"], request["room"])
    sys.argv = ["qexport", *request["argv"]]
    _end(sys.modules["qexport.cli"].main)


def _end(command: Callable[[], None]) -> None:
    """Call it and end as an interpreter ends, but for taking everything apart, which would copy every page."""
    code: object = 1
    try:
        command()
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001 - the last line, as of any interpreter
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


def _limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        if name == "umask":
            os.umask(value)
        elif name.isupper():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    if "uid" in limits and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(limits["uid"])
        os.setuid(limits["uid"])


def _wait(request: dict[str, Any], started: dict[int, float]) -> Any:
    pid = request["pid"]
    descriptor = os.pidfd_open(pid)
    late = not select.select([descriptor], [], [], request["seconds"])[0]
    os.close(descriptor)
    if late:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    at = time.monotonic()
    wall = at - started.pop(pid)
    left, most = _end_orphans(set(started))
    cpu = usage.ru_utime + usage.ru_stime
    code = os.waitstatus_to_exitcode(status)
    rss = max(usage.ru_maxrss, most) * 1024
    return {"code": code, "at": at, "wall": wall, "rss": rss, "cpu": cpu, "left": left, "late": late}


def _end_orphans(known: set[int]) -> tuple[list[str], int]:
    """Reap what is ours and no command under way; end what still lives after a while. Names, and most KB resident."""
    names, most, until = [], 0, time.monotonic() + _GRACE
    while orphans := _children() - known:
        for pid in orphans:
            if time.monotonic() > until:
                names.append(_name(pid))
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            reaped, _, usage = os.wait4(pid, 0 if time.monotonic() > until else os.WNOHANG)
            most = max(most, usage.ru_maxrss if reaped else 0)
        time.sleep(0.005)
    return names, most


def _children() -> set[int]:
    """Children of this process, zombies too."""
    told, found = Path(f"/proc/self/task/{os.getpid()}/children"), set()
    if told.exists():
        return set(map(int, told.read_text().split()))
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                found |= {int(entry.name)} if int(parent) == os.getpid() else set()
    return found


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    return str(pid)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as asked:
        serve(asked)
