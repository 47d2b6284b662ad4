"""What builds keep, told to count from the first second on, and builds that take their time."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from pathlib import Path

import qexport.exporter.build as builder
from faults import hooks_files
from qexport.exporter.resume import journal
from qexport.safe_io import Cache


def all_counts(root: str) -> None:
    """Nothing is too short to be kept."""
    journal.WORTH = 0.0


def slow(root: str) -> None:
    """A second and a half between the recipe and what follows."""
    _late(root, 1.5)


def hangs(root: str) -> None:
    """As long as nobody ends it."""
    _late(root, 60.0)


def _late(root: str, seconds: float) -> None:
    all_counts(root)
    real = builder.settle

    def settle(*args, **options):
        time.sleep(seconds)
        return real(*args, **options)

    builder.settle = settle


def tells_when(root: str) -> None:
    """Write down that we wait for the folder of the build, and when it is ours."""
    all_counts(root)
    real = Cache.hold

    @contextmanager
    def hold(self, kind, key, seconds, waiting):
        with real(self, kind, key, seconds, Path(root, "tmp/waits").touch):
            Path(root, "tmp/since").write_text(str(time.monotonic()))
            yield

    Cache.hold = hold


def killed(root: str) -> None:
    """SIGKILL as ``FAULT`` says, of a build that keeps all that it can."""
    all_counts(root)
    hooks_files.killed(root)


def failing(root: str) -> None:
    """An error of the disk as ``FAULT`` says, in such a build."""
    all_counts(root)
    hooks_files.failing(root)


def tensorrt(root: str) -> None:
    """Let engines be built by a stand-in."""
    sys.path.insert(0, str(Path(__file__).parent / "modules"))
