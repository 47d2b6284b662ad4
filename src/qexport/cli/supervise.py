"""Run a command in a process of its own, under a watchdog: whatever native code does there, somebody is left to tell.

Parsers, runtimes and builders are native code: they crash, hang and take all memory. So ``main`` forks before anything
heavy is imported. The child runs the command as ever; the parent waits, hands signals on, looks at memory and time,
and says what the child died of. There is no sandbox: the child may do what the person may.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from qexport.errors import NativeCrash, QexportError, ResourceExhausted

TICK = 0.2  # seconds between two looks at the child
GRACE = 1.8  # seconds in which a child that was told to end may remove what it staged
SHARE = 0.9  # of the machine's memory, or of the control group's: what a command may take by itself
MEMORY, TIME = "--limit-memory", "--limit-time"
ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_FROM_TERMINAL = 0x80  # SI_KERNEL: of an interrupt, that the whole group of processes got it
_SET_PARENT_DEATH_SIGNAL = 1
_STAGE = 512  # bytes of a stage's name
_LEAVING = "the end"  # a stage: all is done, and what is loaded is taken down
_page: mmap.mmap | None = None  # of a child; what it writes there the parent reads


@dataclass(frozen=True, slots=True)
class Limits:
    """What a command may take.

    Attributes:
        memory: Bytes, of the command and all it starts, less files that are mapped.
        seconds: On the clock; ``None`` for no end.
    """

    memory: int
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Death:
    """A child that did not end by itself.

    Attributes:
        failure: What to tell; ``None`` where it was asked to end and did not do so in time.
        code: The exit code.
        stage: What it was doing; empty where that is unknown.
        stack: What the interpreter did when a signal killed it.
        told: Whether it has said itself that it ends.
    """

    failure: QexportError | None
    code: int
    stage: str
    stack: str
    told: bool = False


def parse_bytes(text: str) -> int | None:
    """Bytes of ``1500000``, ``800M``, ``2G``, ``1.5GB``, ``4GiB``; ``None`` for anything else."""
    plain = text.strip().lower().removesuffix("b").removesuffix("i")
    number, unit = (plain[:-1], plain[-1]) if plain[-1:] in _UNITS and plain[-1:] else (plain, "")
    with suppress(ValueError, OverflowError):
        found = float(number)
        if found > 0:
            return int(found * _UNITS[unit])
    return None


def read_limits(flags: Sequence[str]) -> Limits:
    """The limits of a command line; what cannot be read is click's to refuse."""
    given = {MEMORY: "", TIME: ""}
    for place, word in enumerate(flags):
        name, equals, value = word.partition("=")
        if name in given:
            given[name] = value if equals else "".join(flags[place + 1 : place + 2])
    seconds = None
    with suppress(ValueError):
        seconds = float(given[TIME])
    return Limits(parse_bytes(given[MEMORY]) or int(SHARE * _machine()), seconds if (seconds or 0) > 0 else None)


def tell_stage(name: str) -> None:
    """Let the parent know what is done now."""
    if _page is not None:
        told = name.encode("utf-8", "backslashreplace")[: _STAGE - 1]
        _page[: len(told) + 1] = told + b"\0"


def tell_end() -> None:
    """Let the parent know that the person was told why this ends, which threads in native code may still hinder."""
    if _page is not None:
        _page[_STAGE] = 1


def told_stage() -> str:
    """What was told last; empty in a process that has no parent to tell."""
    return _stage_of(_page) if _page is not None else ""


def supervise(work: Callable[[], int], limits: Limits) -> int | Death:
    """Call ``work`` in a child process.

    Args:
        work: Returns an exit code.
        limits: What it may take.

    Returns:
        In the child what ``work`` returns. In the parent the exit code of the child, or what it died of. Where there
        is no such thing as a child, ``work`` is called here.
    """
    if sys.platform != "linux":
        return work()
    global _page
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as where a shell has closed it
            with suppress(OSError):
                stream.flush()
    heard = [number for number in ENDS if signal.getsignal(number) is not signal.SIG_IGN]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [*heard, signal.SIGCHLD])
    parent = os.getpid()
    try:
        page, stack = mmap.mmap(-1, _STAGE + 1), os.memfd_create("qexport-stack")
        child = os.fork()
    except OSError:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return work()  # no process to spare is no reason to do nothing
    if child == 0:
        _page = page
        _settle(parent, stack)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        code = work()
        if code == 0:
            tell_stage(_LEAVING)
        return code
    watch = _Watch(child, limits, time.monotonic())
    try:
        code = watch.until_it_ends([*heard, signal.SIGCHLD])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if code >= 0:
        return code
    stage = _stage_of(page)
    failure = watch.cause(-code, stage)
    code = watch.asked if failure is None else failure.exit_code
    return Death(failure, code, stage, _text(stack), told=bool(page[_STAGE]))


def _settle(parent: int, stack: int) -> None:
    """Be a child: end with the parent, leave no core, and a stack where a signal kills."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(ENDS[signal.SIGTERM])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable(stack)


class _Watch:
    """What the parent knows of its child."""

    def __init__(self, child: int, limits: Limits, began: float) -> None:
        self._child, self._limits, self._began = child, limits, began
        self._peak = 0  # bytes
        self._asked: signal.Signals | None = None  # to end, by this signal
        self._patience = float("inf")  # until then
        self._over: QexportError | None = None

    def until_it_ends(self, heard: Sequence[signal.Signals]) -> int:
        """Its exit code, or less than zero the signal that killed it."""
        while True:
            found = signal.sigtimedwait(heard, TICK)
            if found is not None and found.si_signo in ENDS:
                self._hand_on(signal.Signals(found.si_signo), found.si_code)
            ended, status, used = os.wait4(self._child, os.WNOHANG)
            if ended:
                self._peak = max(self._peak, used.ru_maxrss << 10)
                return os.waitstatus_to_exitcode(status)
            self._look()

    @property
    def asked(self) -> int:
        """The exit code of what was asked to end."""
        return ENDS[self._asked or signal.SIGTERM]

    def _hand_on(self, number: signal.Signals, code: int) -> None:
        """The first is a request, the second one is not; a terminal that interrupts tells the child by itself."""
        if self._asked is not None:
            self._kill()
            return
        self._asked, self._patience = number, time.monotonic() + GRACE
        if code != _FROM_TERMINAL or number == signal.SIGHUP:  # which only the leader of a session is told
            with suppress(ProcessLookupError):
                os.kill(self._child, number)

    def _look(self) -> None:
        now = time.monotonic()
        taken = _tree_bytes(self._child)
        self._peak = max(self._peak, taken)
        seconds = self._limits.seconds
        if now >= self._patience:
            self._kill()
        elif taken > self._limits.memory:
            what = f"it took {_mebibytes(taken)}, and may take {_mebibytes(self._limits.memory)}"
            self._stop(what, f"give it less at once, or more room: {MEMORY} SIZE")
        elif seconds is not None and now - self._began >= seconds:
            self._stop(f"it did not end within {seconds:g} s", f"allow it more time: {TIME} SECONDS")

    def _stop(self, what: str, hint: str) -> None:
        self._over = self._over or ResourceExhausted(what, hint=hint)
        self._kill()

    def _kill(self) -> None:
        """Children of the child die with it: they have asked the kernel for that."""
        with suppress(ProcessLookupError):
            os.kill(self._child, signal.SIGKILL)

    def cause(self, number: int, stage: str) -> QexportError | None:
        """Why it died of a signal; ``None`` where it was asked to end."""
        where = f"stage {stage!r}" if stage else None
        outcome = outcome_at(stage)
        if self._over is not None:
            return ResourceExhausted(self._over.what + outcome, where=where, hint=self._over.hint)
        if self._asked is not None and number in (signal.SIGKILL, self._asked):
            return None
        if number == signal.SIGKILL:
            what = f"killed, most likely because memory ran out: it took {_mebibytes(self._peak)}"
            hint = f"free memory, give it less at once, or set {MEMORY} below what the machine has"
            return ResourceExhausted(what + outcome, where=where, hint=hint)
        known = {entry.value: entry.name for entry in signal.Signals}
        return NativeCrash(f"native code died by {known.get(number, f'signal {number}')}{outcome}", where=where)


def outcome_at(stage: str) -> str:
    """What a death at a stage means for what was to be published, in words that can be appended."""
    return ", when all was done" if stage == _LEAVING else "; nothing was published"


def _tree_bytes(root: int) -> int:
    """Memory of a process and all below it that is nobody else's and no file's."""
    total, open_list = 0, [root]
    while open_list:
        process = open_list.pop()
        with suppress(OSError, ValueError):
            with open(f"/proc/{process}/status", encoding="ascii", errors="replace") as status:
                for line in status:
                    if line.startswith(("RssAnon:", "RssShmem:")):
                        total += int(line.split()[1]) << 10
            for thread in os.listdir(f"/proc/{process}/task"):
                with open(f"/proc/{process}/task/{thread}/children", encoding="ascii") as children:
                    open_list += map(int, children.read().split())
    return total


def _machine() -> int:
    """Bytes of memory that there are for this process."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
        found = min(found, int(limit.read()))
    return found


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"


def _stage_of(page: mmap.mmap) -> str:
    return page[:_STAGE].split(b"\0")[0].decode("utf-8", "replace")


def _text(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, min(size, 1 << 16), 0).decode("utf-8", "replace")
