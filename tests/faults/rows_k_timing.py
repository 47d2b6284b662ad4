"""K02, timing caches: damaged, or of another GPU. The engine is built without them, and they are kept beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx

from faults.case import Case, Ended, Room
from faults.rows_k_build import result
from faults.rows_k_cache import keep
from qexport.safe_io import Cache

HOOK = "hooks_build:tensorrt"
STRICT = "--strict-cache"


def building(room: Room, *more: str) -> list[str]:
    """A build with an engine, of the good model in the operator set that TensorRT reads."""
    model = room.inputs / "model.onnx"
    if not model.exists():
        proto = onnx.load(room.good / "model.onnx")
        proto.opset_import[0].version = 20
        onnx.save(proto, model)
    return room.build_of(model, "--calib", str(room.good / "calib.npz"), "--target", "tensorrt", *more)


def timings(room: Room) -> Path:
    """Where they are kept."""
    (path,) = (path for path in (room.cache / "qexport/timing").iterdir() if path.suffix != ".bad")
    return path


def after_a_build(change: Callable[[Room, Path], None], *more: str) -> Callable[[Room], list[str]]:
    """The same again, after something has happened to the timings."""

    def plant(room: Room) -> list[str]:
        keep(room, "timing", building(room), Case("", lambda _: [], hook=HOOK))
        change(room, timings(room))
        return building(room, *more)

    return plant


def nothing(room: Room, path: Path) -> None:
    """They are as they were."""


def random(room: Room, path: Path) -> None:
    """Something else is there."""
    path.write_bytes(bytes(range(256)) * 8)


def cut(room: Room, path: Path) -> None:
    """Their end is missing."""
    path.write_bytes(path.read_bytes()[:-4])


def foreign(room: Room, path: Path) -> None:
    """Sound ones that were taken on another GPU."""
    assert Cache(room.cache / "qexport").entry("timing", path.name).write(b"timings/1 that GPU")


def garbage(room: Room, path: Path) -> None:
    """Soundly kept, but nothing that the builder knows."""
    assert Cache(room.cache / "qexport").entry("timing", path.name).write(b"no timings")


def used(room: Room, ended: Ended) -> None:
    """The builder took them, and added to them."""
    assert result(room.artefact)["engine"]["timings"] == "used"
    assert timings(room).read_bytes().endswith(b"this GPU measured measured")


def without(state: str, why: str) -> Callable[[Room, Ended], None]:
    """It was built without them, which is said; they lie beside new ones, which the next build takes."""

    def after(room: Room, ended: Ended) -> None:
        told = result(room.artefact)
        assert told["engine"]["timings"] == state
        assert any(why in warning for warning in told["warnings"]), told["warnings"]
        (bad,) = (room.cache / "qexport/timing").glob("*.bad")
        assert not bad.read_bytes().endswith(b"this GPU measured")
        assert timings(room).read_bytes().endswith(b"this GPU measured")
        assert room.run(building(room, STRICT), Case("", lambda _: [], hook=HOOK)).code == 0
        assert result(room.artefact)["engine"]["timings"] == "used"

    return after


CASES = [
    Case("K02_sound", after_a_build(nothing), 0, after=used, hook=HOOK),
    Case("K02_random", after_a_build(random), 0, after=without("new", "damaged"), hook=HOOK),
    Case("K02_cut", after_a_build(cut), 0, after=without("new", "damaged"), hook=HOOK, slow=True),
    Case("K02_foreign", after_a_build(foreign), 0, after=without("refused", "does not take"), hook=HOOK),
    Case("K02_garbage", after_a_build(garbage), 0, after=without("refused", "does not take"), hook=HOOK, slow=True),
    Case("K02_strict", after_a_build(random, STRICT), 11, "damaged", hook=HOOK),
]
