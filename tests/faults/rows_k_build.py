"""K, builds: two that are equal, and one that is ended while another waits for it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from faults.case import Case, Ended, Room, Running

OTHERS: dict[Path, Running] = {}
"""Rooms in which another command is under way."""
KILLED: dict[Path, float] = {}
"""Rooms in which it was ended, and when."""
BEFORE: dict[Path, dict[str, str]] = {}
"""Rooms to what a build has made there before."""
DESCRIPTORS: dict[Path, int] = {}
"""Rooms whose build the tests hold themselves."""


def result(folder: Path) -> dict[str, Any]:
    """What a build found out."""
    told: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return told


def digests(folder: Path) -> dict[str, str]:
    """What must be the same: everything but times, and what tells them."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: info["digest"] for name, info in files.items() if name.startswith(("model.onnx", "tokenizer"))}


def held_folder(room: Room, seconds: float = 20.0) -> Path:
    """The folder of a build that somebody holds, as soon as there is one."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for folder in (room.cache / "qexport/builds").glob("*"):
            with suppress(FileNotFoundError):
                descriptor = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return folder
                finally:
                    os.close(descriptor)
        time.sleep(0.01)
    raise AssertionError("nobody holds a build")


# ---------------------------------------------------------------- K04


def beside_another(hook: str):
    """The good build while an equal one is under way that publishes elsewhere."""

    def plant(room: Room) -> list[str]:
        how = Case("", lambda _: [], hook=f"hooks_build:{hook}")
        OTHERS[room.root] = room.start(room.build("-o", str(room.tmp / "b")), how)
        held_folder(room)
        return room.build()

    return plant


def did_it_once(room: Room, ended: Ended) -> None:
    """The other one worked, this one took what it left."""
    other = OTHERS.pop(room.root).wait()
    assert other.code == 0, other.stderr
    first, second = result(room.tmp / "b"), result(room.artefact)
    assert first["resumed"] == []
    assert second["resumed"] == ["recipe", "verify", "latency"]
    assert second["quality"] == first["quality"]
    assert second["latency"] == first["latency"]
    assert digests(room.artefact) == digests(room.tmp / "b")
    shutil.rmtree(room.tmp / "b")


def held_by_us(room: Room) -> list[str]:
    """An equal build takes longer than one waits."""
    how = Case("", lambda _: [], hook="hooks_build:all_counts")
    assert room.run(room.build(), how).code == 0
    (folder,) = (room.cache / "qexport/builds").iterdir()
    DESCRIPTORS[room.root] = os.open(folder, os.O_RDONLY)
    fcntl.flock(DESCRIPTORS[room.root], fcntl.LOCK_EX)
    return room.build("--lock-timeout", "0.3")


def let_go(room: Room, ended: Ended) -> None:
    """It is done."""
    os.close(DESCRIPTORS.pop(room.root))


EQUAL = [
    Case("K04_equal", beside_another("slow"), 0, after=did_it_once, hook="hooks_build:all_counts"),
    Case("K04_too_long", held_by_us, 10, r"another process holds the lock.*wait", after=let_go),
]


# ---------------------------------------------------------------- K05


def beside_a_dying_one(room: Room) -> list[str]:
    """The good build while an equal one hangs, and is killed as soon as this one waits."""
    argv = beside_another("hangs")(room)

    def kill() -> None:
        end = time.monotonic() + 20
        while not (room.tmp / "waits").exists() and time.monotonic() < end:
            time.sleep(0.01)
        KILLED[room.root] = time.monotonic()
        os.kill(OTHERS[room.root].pid, signal.SIGKILL)

    Thread(target=kill, daemon=True).start()
    return argv


def went_on(room: Room, ended: Ended) -> None:
    """Within two seconds."""
    waited = float((room.tmp / "since").read_text()) - KILLED.pop(room.root)
    assert 0 < waited < 2, waited
    assert OTHERS.pop(room.root).wait().code == -signal.SIGKILL
    for path in room.tmp.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


DYING = [Case("K05_killed", beside_a_dying_one, 0, after=went_on, hook="hooks_build:tells_when")]

# ---------------------------------------------------------------- K01, K03: what builds keep


def after_an_equal_one(change: Callable[[Path], None], *more: str):
    """The good build again, after something has happened to what the recipe has made."""

    def plant(room: Room) -> list[str]:
        how = Case("", lambda _: [], hook="hooks_build:all_counts")
        assert room.run(room.build(), how).code == 0
        (entry,) = (room.cache / "qexport/builds").glob("*/recipe-*")
        change(entry)
        BEFORE[room.root] = digests(room.artefact)
        return room.build(*more)

    return plant


def flip(entry: Path) -> None:
    """One bit of a weight is another."""
    content = entry.read_bytes()
    entry.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])


def link(entry: Path) -> None:
    """It leads elsewhere."""
    entry.rename(entry.with_name("elsewhere"))
    entry.symlink_to("elsewhere")


def made_again(room: Room, ended: Ended) -> None:
    """The recipe was run again, which is said, and the bytes are the same."""
    told = result(room.artefact)
    assert told["resumed"] == ["verify", "latency"]
    assert any("damaged" in warning for warning in told["warnings"]), told["warnings"]
    assert digests(room.artefact) == BEFORE.pop(room.root)


COUNTS = "hooks_build:all_counts"
UNSOUND = [
    Case("K01_build_flip", after_an_equal_one(flip), 0, after=made_again, hook=COUNTS),
    Case("K01_build_flip_strict", after_an_equal_one(flip, "--strict-cache"), 11, "damaged", hook=COUNTS, slow=True,
         again=lambda room: room.build("--no-cache")),
    Case("K03_build_link", after_an_equal_one(link), 4, "symbolic link", hook=COUNTS, slow=True,
         again=lambda room: room.build("--no-cache")),
]  # fmt: skip

CASES = [*EQUAL, *DYING, *UNSOUND]
