"""What goes wrong inside of calibration, where native code runs: signals, deaths, hangs, memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

AT = 40  # the sample that it happens at, in the middle of a group of 16
PATIENCE = 20.0  # seconds that a worker gets here to clean up


def _at_sample(act: Callable[[], object]) -> None:
    """Let something happen while a sample runs."""
    from qexport.runtime.backends.ort import OrtSession

    run, calls = OrtSession.run, []

    def counted(self, feeds, outputs=None):
        if threading.current_thread() is not threading.main_thread():  # that of proofs
            calls.append(1)
            if len(calls) == AT:
                _until_main_waits()
                act()
        return run(self, feeds, outputs)

    OrtSession.run = counted


def _until_main_waits() -> None:
    """Until the main thread has taken in what came before: what it is in the middle of, it cannot keep."""
    main = threading.main_thread().ident
    until = time.monotonic() + PATIENCE
    while sys._current_frames()[main].f_code.co_name != "wait" and time.monotonic() < until:
        _pause(0.01)


def _hang() -> None:
    """As native code does: nothing in Python runs before it ends."""
    ctypes.PyDLL(None).usleep(60_000_000)


def _signal(number: signal.Signals) -> None:
    """As it reaches one process: the one that was started. When is for the record."""
    sys.audit("qexport.io", "signal", time.monotonic())
    os.kill(os.getppid(), number)


def _patiently() -> None:
    """Let the worker take the time it needs to clean up, however slow the machine is."""
    from qexport.cli import supervise

    supervise.GRACE = PATIENCE


def interrupted(root: str) -> None:
    """Somebody presses Ctrl-C."""
    _patiently()
    _at_sample(lambda: (_signal(signal.SIGINT), time.sleep(60)))


def terminated(root: str) -> None:
    """A service is stopped."""
    _patiently()
    _at_sample(lambda: (_signal(signal.SIGTERM), time.sleep(60)))


def terminated_in_native_code(root: str) -> None:
    """The same while nothing in Python can hear it."""
    _at_sample(lambda: (_signal(signal.SIGTERM), _hang()))


def interrupted_twice(root: str) -> None:
    """The second one does not ask."""

    def act() -> None:
        for _ in range(2):
            _signal(signal.SIGINT)
            _pause(0.3)
        _hang()

    _at_sample(act)


def _pause(seconds: float) -> None:
    ctypes.PyDLL(None).usleep(int(1e6 * seconds))


def terminated_while_the_engine_is_built(root: str) -> None:
    """Somewhere else than in calibration."""
    import qexport.exporter.build as builder

    def act(*_, **__):
        _signal(signal.SIGTERM)
        time.sleep(60)

    builder.save_onnx = act


def takes_memory(root: str) -> None:
    """Touched page by page, and held."""
    _at_sample(lambda: (b"x" * (700 << 20), time.sleep(60)))


def killed_for_memory(root: str) -> None:
    """As the kernel does it."""
    _at_sample(lambda: os.kill(os.getpid(), signal.SIGKILL))


def segfault(root: str) -> None:
    """A real one."""
    _at_sample(lambda: ctypes.string_at(0))


def shrinking_weights(root: str) -> None:
    """A file is cut while it is mapped."""

    def act() -> None:
        with tempfile.TemporaryFile() as file:
            file.truncate(1 << 20)
            held = mmap.mmap(file.fileno(), 0)
            file.truncate(0)
            sys.stderr.write(str(held[5]))

    _at_sample(act)


def hangs(root: str) -> None:
    """For good, with a child of its own."""
    import subprocess

    def act() -> None:
        code = "import ctypes, time; ctypes.CDLL(None).prctl(1, 9); time.sleep(60)"
        subprocess.Popen([sys.executable, "-c", code])
        _hang()

    _at_sample(act)


def bad_alloc(root: str) -> None:
    """What onnxruntime says when the system gives no memory."""
    import onnxruntime

    def run(*_, **__):
        raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc")

    onnxruntime.InferenceSession.run = onnxruntime.InferenceSession.run_with_iobinding = run


def no_threads(root: str) -> None:
    """What Python says when the system gives none."""
    import qexport.exporter.build as builder

    def act(*_, **__):
        raise RuntimeError("can't start new thread")

    builder.save_onnx = act


def crowded(root: str) -> None:
    """All descriptors but a few are taken."""
    import resource

    soft = 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
    while len(os.listdir("/proc/self/fd")) < soft:
        os.dup(0)
    assert Path(root).is_dir()
