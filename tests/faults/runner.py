"""Runs cases: plant, run, look at the eight invariants, look at what the case asserts, run once more."""

from __future__ import annotations

import itertools
import json
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import qexport
from faults import invariants
from faults.case import Case, Ended, Room
from faults.invariants import WALL, Broken, Run, nothing_left
from faults.room import give, look, make, remove

__all__ = ["Broken", "Session", "run"]

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = str(Path(qexport.__file__).absolute().parents[1])
"""Where commands find the package that the tests import, which may be another one than that which is installed."""
QUICK = 0.5  # seconds up to which a case runs both plain and with --json
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Session:
    """The forking process and the rooms of one test session."""

    def __init__(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="qexport-faults-")).resolve()
        self.base.chmod(0o755)  # other users come by
        self._numbers = itertools.count()
        self._lock = Lock()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = str(theirs.fileno())
            env = {**os.environ, **_ONE_THREAD, "PYTHONPATH": f"{PACKAGE}:{TESTS}", "PYTHONDONTWRITEBYTECODE": "1"}
            command = [sys.executable, "-m", "faults.zygote", number]
            self._process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()], start_new_session=True)
        self._channel = ours
        if not ours.recv(100):
            self.close()
            raise RuntimeError("the forking process did not start")

    def close(self) -> None:
        """End the process, remove the rooms."""
        self._channel.close()
        self._process.wait(30)
        shutil.rmtree(self.base, ignore_errors=True)

    def room(self, case: Case | None = None) -> Room:
        """A fresh room."""
        return make(self.base / f"{next(self._numbers):04d}", self, case)

    def start(self, room: Room, argv: list[str], how: Case | None = None) -> Command:
        """Start a command in a room."""
        return Command(self, room, argv, how or Case("", lambda _: []))

    def ask(self, request: dict[str, Any], descriptors: tuple[int, ...] = ()) -> dict[str, Any]:
        """One question to the process, and its answer."""
        with self._lock:
            socket.send_fds(self._channel, [json.dumps(request).encode()], descriptors)
            answer: dict[str, Any] = json.loads(self._channel.recv(1 << 20))
            return answer


class Command:
    """A command under way."""

    def __init__(self, session: Session, room: Room, argv: list[str], how: Case) -> None:
        self._session = session
        ends = [os.pipe() for _ in range(3)]
        request = {"do": "start", "argv": argv, "cwd": str(room.cwd), "room": str(room.root), "way": how.way}
        request |= {"env": environment(room) | dict(how.env), "limits": dict(how.limits), "hook": how.hook}
        try:
            self.pid: int = session.ask(request, tuple(write for _, write in ends))["pid"]
        finally:
            for _, write in ends:
                os.close(write)
        self._told = [bytearray() for _ in ends]
        self._reader = Thread(target=self._read, args=([read for read, _ in ends],), daemon=True)
        self._reader.start()

    def _read(self, descriptors: list[int]) -> None:
        with selectors.DefaultSelector() as ready:
            for descriptor, told in zip(descriptors, self._told, strict=True):
                ready.register(descriptor, selectors.EVENT_READ, told)
            while ready.get_map():
                for key, _ in ready.select():
                    piece = os.read(key.fd, 1 << 16)
                    key.data.extend(piece)
                    if not piece:
                        ready.unregister(key.fd)
                        os.close(key.fd)

    def wait(self, seconds: float = 60.0) -> Ended:
        """Wait for its end, and for that of everything it has started."""
        answer = self._session.ask({"do": "wait", "pid": self.pid, "seconds": seconds})
        self._reader.join(10)
        out, err, log = map(bytes, self._told)
        events = tuple(tuple(json.loads(line)) for line in log.splitlines())
        return Ended(**{**answer, "left": tuple(answer["left"])}, stdout=out, stderr=err, log=events)


def environment(room: Room) -> dict[str, str]:
    """All that a command knows of its surroundings."""
    folders = {"HOME": room.home, "XDG_CACHE_HOME": room.cache, "TMPDIR": room.tmp}
    fixed = {"LANG": "C.UTF-8", "PATH": os.environ.get("PATH", os.defpath), "PYTHONDONTWRITEBYTECODE": "1"}
    fixed["PYTHONPATH"] = PACKAGE
    return {**{name: str(path) for name, path in folders.items()}, **fixed, **_ONE_THREAD}


def run(session: Session, case: Case) -> float:
    """Run a case, plain and with ``--json``, or one of both where it takes its time; returns the seconds it took.

    Raises:
        Broken: An invariant does not hold, or the exit code or the message is wrong.
        AssertionError: What the case itself asserts does not hold.
    """
    first = bool(zlib.crc32(case.id.encode()) & 1)
    wall, both = run_once(session, case, as_json=first)
    if case.both and both and wall <= QUICK:
        wall += run_once(session, case, as_json=not first)[0]
    return wall


def run_once(session: Session, case: Case, *, as_json: bool) -> tuple[float, bool]:
    """Run a case in one form; also tells whether the case leaves the form open."""
    room = session.room(case)
    try:
        argv = case.plant(room)
        both = not {"--json", "--help"} & set(argv)
        argv = [*argv, "--json"] if as_json and both else argv
        if "uid" in case.limits and os.geteuid() == 0:
            give(room, case.limits["uid"])
        before = look(room.root)
        ended = room.start(argv, case).wait(case.limits.get("wall", WALL) + 1)
        done = Run(case, room, before, argv, ended)
        for holds in invariants.ALL:
            holds(done)
        if case.after:
            case.after(room, ended)
        nothing_left(done)
        return ended.wall, both
    finally:
        remove(room)
