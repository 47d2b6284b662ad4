"""K, the cache: damaged, poisoned, held, full or not to be written. The build ends well, or says what is wrong."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from faults.case import Case, Ended, Room
from qexport.safe_io import Cache

STRICT = "--strict-cache"
KEPT: dict[str, dict[str, bytes | None]] = {}
"""What the build of a room has kept, by kind and key."""
ROOT = os.geteuid() == 0
ANYBODY = 65534


def entries(room: Room) -> list[Path]:
    """What a build has kept."""
    return sorted(path for path in (room.cache / "qexport/statistics").iterdir() if path.is_file())


def keep(room: Room, kind: str, argv: list[str], how: Case | None = None) -> None:
    """Let there be what a build keeps of a kind, which is run once for all rooms."""
    cache = Cache(room.cache / "qexport")
    if kind not in KEPT:
        first = room.run(argv, how)
        assert first.code == 0, first.stderr
        KEPT[kind] = {each.key: cache.entry(kind, each.key).read() for each in cache.entries() if each.kind == kind}
    for key, content in KEPT[kind].items():
        assert content
        assert cache.entry(kind, key).write(content)


def after_a_build(change: Callable[[Room, Path], None], *more: str) -> Callable[[Room], list[str]]:
    """The good build again, after one that has kept its measurements, and something that happened to one of them."""

    def plant(room: Room) -> list[str]:
        keep(room, "statistics", room.build())
        change(room, entries(room)[0])
        return room.build(*more)

    return plant


def fresh(change: Callable[[Room, Path], None], *more: str) -> Callable[[Room], list[str]]:
    """The good build with a cache folder that something happened to before."""

    def plant(room: Room) -> list[str]:
        folder = room.cache / "qexport"
        folder.mkdir()
        change(room, folder)
        return room.build(*more)

    return plant


def warns(*texts: str) -> Callable[[Room, Ended], None]:
    """The result says so, and the artefact is there; the next run has nothing to say."""

    def after(room: Room, ended: Ended) -> None:
        told = (room.artefact / "result.json").read_text()
        for text in texts:
            assert text in told, told[-2000:]

    return after


def warns_once(text: str) -> Callable[[Room, Ended], None]:
    """The next run has nothing to say."""

    def after(room: Room, ended: Ended) -> None:
        warns(text)(room, ended)
        model = (room.artefact / "model.onnx").read_bytes()
        assert room.run(room.build(STRICT)).code == 0
        assert text not in (room.artefact / "result.json").read_text()
        assert (room.artefact / "model.onnx").read_bytes() == model

    return after


# ---------------------------------------------------------------- K01


def flip(room: Room, entry: Path) -> None:
    """One bit is another."""
    sound = entry.read_bytes()
    entry.write_bytes(sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:])


def cut(room: Room, entry: Path) -> None:
    """Its end is missing."""
    entry.write_bytes(entry.read_bytes()[:-100])


def other(room: Room, entry: Path) -> None:
    """A sound entry of another model under this name."""
    entry.write_bytes(entry.read_bytes().replace(entry.name.encode(), b"0" * len(entry.name), 1))


def older(room: Room, entry: Path) -> None:
    """What version 0 would have written."""
    entry.write_bytes(entry.read_bytes().replace(b"qexport-cache/1", b"qexport-cache/0", 1))


DAMAGE = {"flip": (flip, "damaged"), "cut": (cut, "damaged"), "other": (other, "another key")}
DAMAGE |= {"older": (older, "another version")}
UNSOUND = [
    Case(f"K01_{name}", after_a_build(do), 0, after=warns_once(text), slow=name not in ("flip", "older"))
    for name, (do, text) in DAMAGE.items()
]
UNSOUND += [
    Case(f"K01_{name}_strict", after_a_build(do, STRICT), 11, text, slow=name not in ("flip", "other"))
    for name, (do, text) in DAMAGE.items()
]


# ---------------------------------------------------------------- K03


def healed(room: Room) -> list[str]:
    """What follows: without the cache, which stays as it is."""
    return room.build("--no-cache")


def link(room: Room, entry: Path) -> None:
    """An entry that leads elsewhere."""
    os.rename(entry, room.inputs / "elsewhere")
    entry.symlink_to(room.inputs / "elsewhere")


def writeable(room: Room, path: Path) -> None:
    """Anybody may write it."""
    path.chmod(0o777)


def given_away(room: Room, path: Path) -> None:
    """Somebody else owns it."""
    os.chown(path, ANYBODY, ANYBODY)


def linked_folder(room: Room, folder: Path) -> None:
    """The folder is elsewhere."""
    folder.rmdir()
    (room.inputs / "elsewhere").mkdir()
    folder.symlink_to(room.inputs / "elsewhere")


POISON = [
    Case("K03_entry_link", after_a_build(link), 4, "symbolic link", again=healed),
    Case("K03_entry_writeable", after_a_build(writeable), 4, "others can write", again=healed),
    Case("K03_folder_writeable", fresh(writeable), 4, "others can write", again=healed),
    Case("K03_folder_link", fresh(linked_folder), 4, "a link or a file", again=healed),
]
if ROOT:
    POISON += [
        Case("K03_entry_foreign", after_a_build(given_away), 4, "another user", again=healed),
        Case("K03_folder_foreign", fresh(given_away), 4, "another user", again=healed),
    ]


# ---------------------------------------------------------------- K06, K07


HELD: dict[Path, int] = {}
"""Rooms whose output somebody holds, to the descriptor."""


def held(room: Room) -> list[str]:
    """Somebody holds the lock of the folder in which the result is made."""
    HELD[room.root] = os.open(room.out, os.O_RDONLY)
    fcntl.flock(HELD[room.root], fcntl.LOCK_EX)
    return room.build()


def let_go(room: Room, ended: Ended) -> None:
    """They are done."""
    os.close(HELD.pop(room.root))


def closed(room: Room, folder: Path) -> None:
    """Nobody may write it."""
    folder.chmod(0o555)


WAITING = [
    Case("K06_held", held, 10, r"another process holds the lock.*wait", after=let_go, hook="hooks_files:impatient"),
    Case("K06_no_locks", lambda room: room.build(), 0, hook="hooks_files:no_locks"),
    Case("K06_read_only", fresh(closed), 0, after=warns("nothing was kept", "denied"), limits={"uid": ANYBODY}),
    Case(
        "K07_full",
        lambda room: room.build(),
        0,
        after=lambda room, ended: (warns("nothing was kept", "no space")(room, ended), _no_entry(room)),
        hook="hooks_files:full",
        env={"FAULT": "write cache/*"},
    ),
]


def _no_entry(room: Room) -> None:
    assert entries(room) == [], entries(room)


CASES = [*UNSOUND, *POISON, *WAITING]
