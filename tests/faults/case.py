"""What a case of the catalogue says, what it is given, and what comes back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Way = Literal["warm", "cold"]


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    """Its exit code; minus the number of the signal that ended it."""
    stdout: bytes
    stderr: bytes
    at: float
    """When it ended, by ``time.monotonic``."""
    wall: float
    """Seconds from the start of the command; of a forked interpreter, so without the imports."""
    rss: int
    """Peak resident bytes of the largest process of its tree."""
    cpu: float = 0.0
    """Seconds of processor that its tree took, which other programs on the machine do not change."""
    log: tuple[tuple[str, ...], ...] = ()
    """Audit events of all its processes: name and arguments, folders of descriptors resolved; see ``audit.py``."""
    left: tuple[str, ...] = ()
    """Command lines of the processes that outlived it; they are ended when they are found."""
    late: bool = False
    """Whether it was ended because its time was over."""

    @property
    def told(self) -> dict[str, Any]:
        """The one object on stdout of a command with ``--json``."""
        told: dict[str, Any] = json.loads(self.stdout)
        return told

    def events(self, name: str) -> list[tuple[str, ...]]:
        """The arguments of the audit events of this name, in order; ``qexport.io`` are the fault points."""
        return [event[1:] for event in self.log if event[0] == name]


class Running(Protocol):
    """A command under way."""

    pid: int

    def wait(self, seconds: float = 60.0) -> Ended:
        """Wait for its end; after ``seconds`` the whole tree is ended, and ``late`` says so."""


class Driver(Protocol):
    """What starts commands; ``runner.py`` has the two ways."""

    def start(self, room: Room, argv: list[str], how: Case | None = None) -> Running:
        """Start ``qexport argv`` in a room; hook, limits, way and network are those of ``how``."""


@dataclass(frozen=True)
class Room:
    """A fresh folder for one run: everything that a command may see, and may not change but out, cache and tmp.

    HOME, XDG_CACHE_HOME, TMPDIR and the working folder point into it.
    """

    root: Path
    driver: Driver
    case: Case | None = None

    @property
    def inputs(self) -> Path:
        """What a case plants; must be the same after the run."""
        return self.root / "inputs"

    @property
    def out(self) -> Path:
        """The folder in which results are published; empty at first."""
        return self.root / "out"

    @property
    def artefact(self) -> Path:
        """Where commands of a case publish: a name inside of ``out`` that does not exist at first."""
        return self.out / "a"

    @property
    def cache(self) -> Path:
        """XDG_CACHE_HOME; commands keep theirs in ``cache/qexport``."""
        return self.root / "cache"

    @property
    def home(self) -> Path:
        """HOME; nothing may be written there."""
        return self.root / "home"

    @property
    def tmp(self) -> Path:
        """TMPDIR."""
        return self.root / "tmp"

    @property
    def cwd(self) -> Path:
        """The working folder; nothing may be written there."""
        return self.root / "cwd"

    @property
    def good(self) -> Path:
        """A good model.onnx (x: float[n, 32] to y: float[n, 32]) and good calib.npz of 16 samples (x)."""
        return self.root / "good"

    def build(self, *more: str) -> list[str]:
        """The good build of a second: int8 on ort-cpu into ``artefact``, what pays is not asked for."""
        return self.build_of(self.good / "model.onnx", "--calib", str(self.good / "calib.npz"), *more)

    def build_of(self, model: Path, *more: str) -> list[str]:
        """A build of another model into ``artefact``."""
        fixed = ("--target", "ort-cpu", "--set", "export.never_worse=false", "-o", str(self.artefact))
        return ["build", str(model), *fixed, *more]

    def start(self, argv: list[str], how: Case | None = None) -> Running:
        """Start another command in this room, without the hook and the limits of the case unless ``how`` has them."""
        return self.driver.start(self, argv, how)

    def run(self, argv: list[str], how: Case | None = None, seconds: float = 60.0) -> Ended:
        """Start a command and wait for its end."""
        return self.start(argv, how).wait(seconds)


@dataclass(frozen=True)
class Case:
    """One fault, what the command must make of it, and what else must hold."""

    id: str
    """``M05_ext_dotdot``; the row is what stands before the first underscore."""
    plant: Callable[[Room], list[str]]
    """Writes inputs below ``room.inputs``; returns the arguments of ``qexport``. Runs once for each run."""
    code: int | tuple[int, ...] = 0
    """Exit codes that are right; -9 where the case kills the command."""
    says: str = ""
    """A regular expression that is searched in the place, the cause and the hint of the error."""
    after: Callable[[Room, Ended], None] | None = None
    """Asserts what else must hold, before the follow-up run."""
    hook: str = ""
    """``name`` of a function of ``faults/hooks.py`` or ``module:name`` of one of ``faults/module.py``: called as
    ``hook(root)``, ``root`` the room's folder, in the command's own process before the command."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """Of the command's process: RLIMIT_* without the prefix (``FSIZE``), ``uid`` (of whoever is not root; the
    tests' own where root does not run them), ``umask``; ``wall`` (seconds, default 20), ``cpu``
    (seconds) and ``rss`` (MB, default 1000)."""
    env: Mapping[str, str] = field(default_factory=dict)
    """More environment."""
    way: Way = "warm"
    """``warm``: forked from an interpreter that has imported everything; ``cold``: ``python -m qexport``."""
    network: bool = False
    """Whether connections to this machine itself are allowed."""
    moves_inputs: bool = False
    """Whether the fault itself changes the inputs during the run."""
    again: Callable[[Room], list[str]] | None = None
    """The good run that follows; without one a good build where the case has touched out, cache or tmp, but for
    commands that ended well and left nothing that would have to be removed."""
    both: bool = True
    """Whether a quick case runs plain and with ``--json``; else, as long ones do, in one of the two forms."""
    slow: bool = False
    """Left out unless ``--table`` is given."""

    @property
    def row(self) -> str:
        """The row of the catalogue."""
        return self.id.split("_")[0]

    @property
    def codes(self) -> tuple[int, ...]:
        """The exit codes that are right."""
        return self.code if isinstance(self.code, tuple) else (self.code,)
