"""What cases do inside of a command's process before it begins: functions of the room's folder."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path


def tell_limits(root: str) -> None:
    """For the record: how many files may be open, which mode new ones have."""
    umask = os.umask(0)
    os.umask(umask)
    sys.audit("qexport.io", "limits", resource.getrlimit(resource.RLIMIT_NOFILE)[0], oct(umask), os.geteuid())


def tell_package(root: str) -> None:
    """For the record: which package runs."""
    import qexport.cli

    sys.audit("qexport.io", "package", qexport.__file__, qexport.cli.__file__)


# ---------------------------------------------------------------- one for each invariant, which must find it


def leave_half_an_artefact(root: str) -> None:
    """I1."""
    Path(root, "out/a").mkdir()
    Path(root, "out/a/model.onnx").write_bytes(b"half")


def touch_an_input(root: str) -> None:
    """I2."""
    os.utime(Path(root, "good/model.onnx"), (1, 1))


def write_home_and_clean_up(root: str) -> None:
    """I3: a listing afterwards shows nothing."""
    Path(root, "home/x").touch()
    Path(root, "home/x").unlink()


def ask_the_network(root: str) -> None:
    """I4: the event alone, so that nothing is really asked."""
    sys.audit("socket.getaddrinfo", "example.org", 443)


def die(root: str) -> None:
    """I5."""
    os.kill(os.getpid(), signal.SIGSEGV)


def take_memory(root: str) -> None:
    """I6: 300 MB, really touched."""
    assert len(b"x" * (300 << 20))


def take_time(root: str) -> None:
    """I6."""
    time.sleep(3)


def print_colours(root: str) -> None:
    """I7."""
    os.write(2, b"\x1b[31mred\n")


def leave_a_process(root: str) -> None:
    """I8: in a session of its own, so that no signal of a terminal would reach it."""
    subprocess.Popen(["sleep", "60"], start_new_session=True, stdin=subprocess.DEVNULL)


def leave_a_dead_stage(root: str) -> None:
    """As a build does that is killed: the next one removes it."""
    Path(root, "out/.a.stage-0123456789abcdef").mkdir()


def leave_a_stage(root: str) -> None:
    """I8: of a name that no later run looks after."""
    Path(root, "out/.b.stage-0123456789abcdef").mkdir()
