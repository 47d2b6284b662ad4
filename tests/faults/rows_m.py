"""M, models that are refused: the tables of the admission tests, each as a file that the command line is given."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import onnx
import test_admit_files as files
import test_admit_graphs as graphs
import test_admit_numbers as numbers

from faults.case import Case, Ended, Room

SECRET = b"\xa5SECRET\x5a" * 8
NEVER_OPENED = {"secret", "hostname", "link", "hard", "fifo"}


def folder(room: Room) -> Path:
    """A folder for a model, with a good external file of 64 bytes in it and traps around."""
    model = room.inputs / "model"
    (model / "sub").mkdir(parents=True)
    (room.inputs / "secret").write_bytes(SECRET)
    (model / "w.bin").write_bytes(bytes(64))
    (model / "short").write_bytes(bytes(60))
    (model / "link").symlink_to("../secret")
    (model / "inside").symlink_to("w.bin")
    (model / "up").symlink_to("..")
    (model / "hard").hardlink_to(room.inputs / "secret")
    os.mkfifo(model / "fifo")
    return model


def planted(room: Room, model: onnx.ModelProto | bytes) -> Path:
    """A model, or other bytes, in that folder."""
    path = folder(room) / "m.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def checking(model: onnx.ModelProto | bytes) -> Callable[[Room], list[str]]:
    """Check a model."""
    return lambda room: ["check", str(planted(room, model))]


def building(model: onnx.ModelProto | bytes) -> Callable[[Room], list[str]]:
    """Build it."""
    return lambda room: room.build_of(planted(room, model))


def inspecting(model: onnx.ModelProto | bytes, *flags: str) -> Callable[[Room], list[str]]:
    """Inspect it."""
    return lambda room: ["inspect", "--layers", *flags, str(planted(room, model))]


def nothing_of_it(room: Room, ended: Ended) -> None:
    """What lies outside of the folder was neither opened nor shown."""
    opened = {Path(path).name for path, _ in ended.events("open")}
    assert "m.onnx" in opened
    assert opened.isdisjoint(NEVER_OPENED), opened & NEVER_OPENED
    assert b"SECRET" not in ended.stdout + ended.stderr


def external(entries: dict[str, object]) -> onnx.ModelProto:
    """A model whose weight lies outside as these entries say."""
    model = files.small()
    files.point(model.graph.initializer[0], **entries)
    return model


def hidden(place: str) -> onnx.ModelProto:
    """A model with a path that leads out somewhere in it."""
    model = files.small()
    tensor = files.HIDING_PLACES[place](model)
    tensor.data_type, tensor.dims[:] = files.FLOAT, [4]
    files.point(tensor, "../secret")
    return model


def three(id: str, code: int, says: str, model: onnx.ModelProto | bytes, after: object = None) -> Iterable[Case]:
    """A fault for each of the commands that read a model, under the names ``id``, ``id_build`` and ``id_inspect``."""
    for way, end in ((checking, ""), (building, "_build"), (inspecting, "_inspect")):
        limits = {"wall": 1} if id.startswith("M11") else {}
        yield Case(id + end, way(model), code, says, after=after, limits=limits)  # type: ignore[arg-type]  # or None


Row = tuple[str, int, str, "onnx.ModelProto | bytes", object]


def rows() -> Iterable[Row]:
    """Id, exit code, message, model, what else must hold."""
    for id, code, data, says in files.FILES:
        yield id.replace("P01", "M03").replace("P02", "M03"), code, says, data, None
    yield "M04_ort", 3, "an onnxruntime .ort file", b"\x20\0\0\0ORTM" + bytes(64), None
    yield "M04_tflite", 3, "a TensorFlow Lite file", b"\x1c\0\0\0TFL3" + bytes(64), None
    size = len(files.PLAIN)
    tail = random.Random(2).sample(range(size - 64, size), 16)
    for at in sorted({*(size * part // 64 for part in range(1, 64)), *tail}):
        yield f"M02_cut_at_{at}", 3, "truncated, damaged|no outputs|ONNX", files.PLAIN[:at], None
    for id, code, entries, says in files.EXTERNAL:
        outside = id[:3] in ("M05", "M06", "M07", "M08", "M09", "M10", "M11")
        yield id, code, says.replace("model/absent", "absent"), external(entries), nothing_of_it if outside else None
    for place in files.HIDING_PLACES:
        yield f"M19_{place}", 4, "leaves the folder", hidden(place), nothing_of_it
    for id, code, model, says in graphs.BAD:
        deep = "|not a readable ONNX file" if id.startswith("M25_nest") else ""  # protobuf itself goes 100 deep
        yield ("M27" + id[3:] if id.startswith("P") else id), code, says + deep, model, None
    for id, model, says in numbers.BAD:
        yield id, 3, says, model, None


def every() -> Iterable[Case]:
    """All commands in both forms for the first two faults of a row, ``check`` in one of them for the others."""
    seen: dict[str, int] = {}
    for id, code, says, model, after in rows():
        seen[id[:3]] = seen.get(id[:3], 0) + 1
        cases = list(three(id, code, says, model, after))
        yield from cases if seen[id[:3]] <= 2 else [replace(cases[0], both=False)]


def good() -> Iterable[Case]:
    """What is unusual but right is let in."""
    for id, model in (*graphs.GOOD, *numbers.GOOD):
        row = "M27" if (id, model) in graphs.GOOD else "M29"
        yield Case(id if id.startswith("M") else f"{row}_good_{id}", checking(model))


CASES = [*every(), *good()]
