"""F, processes: signals, and native code that dies, hangs, or takes all there is."""

from __future__ import annotations

import json

import numpy as np

from faults.case import Case, Ended, Room

SAMPLES = 64
QUICK = 9.0  # seconds: a build of a second, two for cleaning up, and a slow machine
SOON = 3.5  # seconds from a signal on: the two that there are, and a slow machine


def building(room: Room) -> list[str]:
    """A build that calibrates in several groups of samples."""
    data = room.inputs / "calib.npz"
    np.savez(data, x=np.random.default_rng(0).standard_normal((SAMPLES, 32)).astype(np.float32))
    return room.build_of(room.good / "model.onnx", "--calib", str(data), "--set", f"calibrate.samples={SAMPLES}")


def limited(*more: str):
    """The same with limits."""
    return lambda room: [*building(room), *more]


def quickly(room: Room, ended: Ended) -> None:
    """At once, with nothing published."""
    assert ended.wall < QUICK, ended.wall
    assert not room.artefact.exists()


def soon(room: Room, ended: Ended) -> None:
    """Two seconds after the signal, with nothing published."""
    *_, last = (float(when) for name, when, *_ in ended.events("qexport.io") if name == "signal")
    assert ended.at - last < SOON, ended.at - last
    assert not room.artefact.exists()


def kept(room: Room, ended: Ended) -> None:
    """What was measured before is not lost, and nothing is published; how soon is for the other cases."""
    assert not room.artefact.exists()
    assert any(path.is_file() for path in (room.cache / "qexport" / "statistics").iterdir()), sorted(
        (room.cache).rglob("*")
    )


def bundled(room: Room, ended: Ended) -> None:
    """There is something to report."""
    quickly(room, ended)
    (file,) = (room.cache / "qexport" / "crashes").iterdir()
    told = json.loads(file.read_text())
    assert told["stage"] == "recipe"
    assert any("hooks_process.py" in line for line in told["stack"])
    assert "build" in told["arguments"]
    assert str(file) in (ended.stderr + ended.stdout).decode()


SIGNALS = [
    Case("F04_sigint_in_calibrate", building, 130, "interrupted", after=kept, hook="hooks_process:interrupted"),
    Case("F04_sigterm_in_calibrate", building, 143, "terminated", after=kept, hook="hooks_process:terminated"),
    Case(
        "F04_sigterm_in_native_code",
        building,
        143,
        "terminated",
        after=soon,
        hook="hooks_process:terminated_in_native_code",
    ),
    Case("F04_second_interrupt", building, 130, "interrupted", after=soon, hook="hooks_process:interrupted_twice"),
    Case(
        "F04_sigterm_while_writing",
        building,
        143,
        "terminated",
        after=soon,
        hook="hooks_process:terminated_while_the_engine_is_built",
    ),
]
MEMORY = [
    Case(
        "F05_limit",
        limited("--limit-memory", "600M"),
        9,
        r"it took \d+ MiB, and may take 600 MiB.*--limit-memory",
        after=quickly,
        hook="hooks_process:takes_memory",
        limits={"rss": 1500},
    ),
    Case(
        "F05_killed", building, 9, r"memory ran out: it took \d+ MiB", quickly, hook="hooks_process:killed_for_memory"
    ),
    Case("F05_bad_alloc", building, 9, "bad_alloc", quickly, hook="hooks_process:bad_alloc"),
]
DEATHS = [
    Case("F06_segfault", building, 12, "SIGSEGV", bundled, hook="hooks_process:segfault"),
    Case("F06_mapped_weights_cut", building, 12, "SIGBUS", bundled, hook="hooks_process:shrinking_weights"),
]
HANGS = [
    Case(
        "F07_hang",
        limited("--limit-time", "4"),
        9,
        "did not end within 4 s.*--limit-time",
        quickly,
        hook="hooks_process:hangs",
    ),
]
SPENT = [
    Case("F08_descriptors", building, 9, "open files|gives no more", hook="hooks_process:crowded"),
    Case("F08_threads", building, 9, "no more threads", quickly, hook="hooks_process:no_threads"),
    *(Case(f"F08_processes_{most}", building, 9, "[Tt]hread", quickly, limits={"uid": 65534, "NPROC": most})
      for most in (0, 3)),
]  # fmt: skip
CASES = [*SIGNALS, *MEMORY, *DEATHS, *HANGS, *SPENT]
