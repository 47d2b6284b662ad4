"""Rooms: made, looked at before and after, removed."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx

from faults.case import Case, Driver, Room

FOLDERS = ("inputs", "out", "cache", "home", "tmp", "cwd", "good")
FREE = ("out", "cache", "tmp")
"""What a command may change."""

Facts = tuple[object, ...]
Seen = Mapping[str, Facts]
"""Path below the room to what it is."""

MODEL = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 32] x) => (float[n, 32] y) { h = MatMul(x, w)
  y = Relu(h) }"""


def make(root: Path, driver: Driver, case: Case | None = None) -> Room:
    """Make a room and the good model and data in it."""
    room = Room(root, driver, case)
    for name in FOLDERS:
        (root / name).mkdir(parents=True)
    (room.good / "model.onnx").write_bytes(good_model())
    (room.good / "calib.npz").write_bytes(good_data())
    return room


@functools.cache
def good_model() -> bytes:
    """A product of 32 by 32 and a Relu."""
    proto = onnx.parser.parse_model(MODEL)
    weight = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    data: bytes = proto.SerializeToString()
    return data


@functools.cache
def good_data() -> bytes:
    """16 samples for it."""
    file = io.BytesIO()
    np.savez(file, x=np.random.default_rng(1).standard_normal((16, 32)).astype(np.float32))
    return file.getvalue()


def give(room: Room, uid: int) -> None:
    """Let another user own the room."""
    for folder, names, files in os.walk(room.root):
        for name in (".", *names, *files):
            os.chown(os.path.join(folder, name), uid, uid, follow_symlinks=False)


def remove(room: Room) -> None:
    """Remove it, whatever modes it was left with."""
    for folder, names, _ in os.walk(room.root):
        for name in names:
            if not os.path.islink(os.path.join(folder, name)):
                os.chmod(os.path.join(folder, name), 0o700)
    shutil.rmtree(room.root, ignore_errors=True)


def look(folder: Path) -> Seen:
    """What is there: for files mode, size, time of the last change and digest; for folders the mode."""
    return {os.path.relpath(path, folder): _facts(path) for path in _walk(folder)}


def _walk(folder: Path) -> Iterator[str]:
    for where, names, files in os.walk(folder):
        for name in (*names, *files):
            yield os.path.join(where, name)


def _facts(path: str) -> Facts:
    found = os.lstat(path)
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFREG:
        return (oct(found.st_mode), found.st_size, found.st_mtime_ns, _digest(path))
    if kind == stat.S_IFLNK:
        return (oct(found.st_mode), os.readlink(path))
    return (oct(found.st_mode),)


def _digest(path: str) -> str:
    """Of what is stored, and where; holes are not read."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        end = 0
        with suppress(OSError):  # ENXIO: nothing but a hole from here
            while True:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                digest.update(f"{start}:{end}:".encode())
                os.lseek(file.fileno(), start, os.SEEK_SET)
                for at in range(start, end, 1 << 20):
                    digest.update(os.read(file.fileno(), min(1 << 20, end - at)))
    return digest.hexdigest()
