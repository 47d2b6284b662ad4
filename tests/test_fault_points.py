"""A small program that publishes, writes and keeps: killed, or failed, at every step that it announces."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qexport.errors import IntegrityError, QexportError
from qexport.safe_io import EVENT, Cache, of_one_version, open_file, publish, read_bytes, write_bytes

CRASHED = 99
OLD, NEW = b"old" * 100, b"new" * 200


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No power fails here: what is written need not reach the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def program(root: Path, data: bytes = NEW) -> None:
    """Everything that safe_io writes: a folder in new folders, one in the place of another, a file, a cache entry."""
    for out in (root / "deep/er/out", root / "out"):
        with publish(out) as stage:
            stage.write_bytes("data", data)
            (stage.path / "adopted").write_bytes(data)
            stage.adopt("adopted")
            stage.write_text("model", str(len(data)))
            stage.write_manifest()
    write_bytes(root / "file", data)
    assert Cache(root / "cache").entry("statistics", "0a").write(data) or data == OLD


def child(work: Callable[[], None]) -> int:
    """Run something in a process of its own: its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = CRASHED
        try:
            work()
            code = 0
        except QexportError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at(number: int, act: Callable[[str, str], None]) -> None:
    """Act when this process announces its step of this number."""
    left = [number]

    def hook(event: str, args: tuple[str, ...]) -> None:
        if event == EVENT:
            left[0] -= 1
            if left[0] == -1:
                act(args[0], args[1])

    sys.addaudithook(hook)


def kill(point: str, path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(point: str, path: str) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def fresh(root: Path) -> Path:
    """A folder in which the program has run once."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    program(root, OLD)
    shutil.rmtree(root / "deep")
    return root


def steps(root: Path) -> list[list[str]]:
    """What the program announces: points, and paths below the root without their random parts."""
    told = root.parent / "told"

    def record() -> None:
        found: list[list[str]] = []
        sys.addaudithook(lambda event, args: found.append([*args]) if event == EVENT else None)
        program(root)
        told.write_text(json.dumps(found))

    assert child(record) == 0
    found: list[list[str]] = json.loads(told.read_text())
    return found


def whole(folder: Path) -> bool:
    """Whether a published folder is one version, all of it."""
    data, told = (folder / "data").read_bytes(), (folder / "model").read_text()
    return data in (OLD, NEW) and told == str(len(data)) and data == (folder / "adopted").read_bytes()


def leftovers(root: Path) -> list[str]:
    return [name for _, folders, files in os.walk(root) for name in (*folders, *files) if name.startswith(".")]


def look(root: Path) -> None:
    """Old or new, never a part."""
    assert whole(root / "out")
    assert not (root / "deep/er/out").exists() or whole(root / "deep/er/out")
    assert (root / "file").read_bytes() in (OLD, NEW)
    cache = Cache(root / "cache", strict=True)
    assert cache.entry("statistics", "0a").read() in (OLD, NEW)


def finished(root: Path) -> None:
    """All new, and nothing beside it."""
    look(root)
    assert (root / "file").read_bytes() == (root / "out/data").read_bytes() == NEW
    assert (root / "deep/er/out/data").read_bytes() == NEW
    assert Cache(root / "cache", strict=True).entry("statistics", "0a").read() == NEW
    assert not leftovers(root)


def test_every_kind_of_step_is_announced(tmp_path):
    points = {point for point, _ in steps(fresh(tmp_path / "root"))}
    kinds = {"create", "write", "fsync", "rename", "exchange", "sync-folder", "mkdir", "adopt", "remove", "lock"}
    assert points == kinds


def test_what_gets_its_name_has_reached_the_disk_and_so_does_the_name(tmp_path):
    """After a loss of power too a name leads to all bytes or to the old ones."""
    root, told = fresh(tmp_path / "root"), tmp_path / "told"

    def record() -> None:
        found: list[tuple[str, ...]] = []
        os.fsync = lambda fd: found.append(("flushed", os.readlink(f"/proc/self/fd/{fd}")))
        sys.addaudithook(lambda event, args: found.append(args) if event == EVENT else None)
        program(root)
        told.write_text(json.dumps(found))

    assert child(record) == 0
    unsafe: set[str] = set()
    for point, path in json.loads(told.read_text()):
        if point in ("rename", "exchange"):
            assert not unsafe, (point, path, unsafe)
            unsafe.add(os.path.dirname(path))
        elif point == "create":
            unsafe |= {path, *([os.path.dirname(path)] if ".stage-" in path else [])}
        elif point == "flushed":
            unsafe.discard(path)
    assert not unsafe


def test_f03_killed_at_any_step_it_leaves_old_or_new_and_the_next_run_ends_well(tmp_path):
    root = tmp_path / "root"
    told = steps(fresh(root))
    assert len(told) > 40
    for number in range(len(told)):
        fresh(root)
        code = child(lambda number=number: (at(number, kill), program(root)))
        assert code == -signal.SIGKILL, told[number]
        look(root)
        program(root)
        finished(root)


def test_f09_failed_at_any_step_it_says_so_and_leaves_nothing(tmp_path):
    root = tmp_path / "root"
    for number, (point, path) in enumerate(steps(fresh(root))):
        fresh(root)
        code = child(lambda number=number: (at(number, fail), program(root)))
        tolerated = point == "remove"  # what cannot be removed stops nobody
        kept = "/cache" in path  # a cache that cannot be written neither; the program asserts that it was
        assert code == (0 if tolerated else CRASHED if kept else 9), (point, path)
        look(root)
        assert not leftovers(root), (point, path)
        program(root)
        finished(root)


def test_large_files_announce_a_write_for_every_piece(tmp_path):
    found: list[str] = []

    def work() -> None:
        sys.addaudithook(lambda event, args: found.append(args[0]) if event == EVENT else None)
        write_bytes(tmp_path / "a", bytes(40 << 20))
        os._exit(found.count("write"))

    assert child(work) == 3


# ---------------------------------------------------------------- F03b: readers


def test_f03b_readers_of_several_files_get_one_version_while_others_publish(tmp_path):
    out, stop, mixed = tmp_path / "out", threading.Event(), []

    def write(number: int) -> None:
        with publish(out) as stage:
            stage.write_text("data", str(number))
            stage.write_text("model", str(number))
            stage.write_manifest()

    def read() -> tuple[bytes, bytes]:
        first = read_bytes(out / "data")
        return first, read_bytes(out / "model")

    def watch() -> None:
        while not stop.is_set():
            try:
                data, model = of_one_version(out, read)
            except IntegrityError:
                continue
            mixed.extend([(data, model)] if data != model else [])

    write(0)
    readers = [threading.Thread(target=watch) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(1, 200):
        write(number)
    stop.set()
    for reader in readers:
        reader.join()
    assert not mixed


def test_f03b_a_folder_that_is_replaced_between_two_files_is_read_again(tmp_path):
    out = tmp_path / "out"
    fresh(tmp_path / "root")
    shutil.copytree(tmp_path / "root/out", out)
    turns = []

    def read() -> tuple[bytes, str]:
        data = read_bytes(out / "data")
        if not turns:
            program(tmp_path)
        turns.append(1)
        with open_file(out / "model") as file:
            return data, file.read().decode()

    assert of_one_version(out, read) == (NEW, str(len(NEW)))
    assert len(turns) == 2


def test_f03b_what_fails_while_nobody_writes_fails_as_it_is(tmp_path):
    calls = []

    def read() -> None:
        calls.append(1)
        raise QexportError("no")

    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(QexportError, match="no"):
            of_one_version(folder, read)
    assert len(calls) == 2


def test_f03b_a_folder_that_is_replaced_all_the_time_is_no_version_at_all(tmp_path):
    (tmp_path / "out").mkdir()

    def read() -> None:
        (tmp_path / "other").mkdir()
        os.rename(tmp_path / "other", tmp_path / "out")

    with pytest.raises(IntegrityError, match="replaced 8 times"):
        of_one_version(tmp_path / "out", read)
