"""F, files: disks that are full or fail, outputs that cannot be, and commands that are killed while they write."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import embedders

from faults.case import Case, Ended, Room
from faults.invariants import damage

Plant = Callable[[Room], list[str]]
KILLED = -9


def building(room: Room) -> list[str]:
    """The good build."""
    return room.build()


def rebuilding(room: Room) -> list[str]:
    """The good build where there is an artefact of another build already."""
    data = str(room.good / "calib.npz")
    first = room.run(room.build_of(room.good / "model.onnx", "--calib", data, "--recipe", "float32", "--no-cache"))
    assert first.code == 0, first.stderr
    shutil.copy(room.artefact / "model.onnx", room.root / "before")
    return room.build()


def building_again(room: Room) -> list[str]:
    """The good build where there is its artefact already."""
    first = room.run(room.build())
    assert first.code == 0, first.stderr
    return room.build()


def exporting(room: Room) -> list[str]:
    """An export where there is one already."""
    argv = ["export", str(room.good / "model.onnx"), "-o", str(room.artefact)]
    first = room.run(argv)
    assert first.code == 0, first.stderr
    return argv


def embedding(room: Room, output: Path) -> list[str]:
    """Vectors of some texts."""
    texts = [part for letter in "abcdefghij" for part in ("--text", letter)]
    return ["embed", str(embedders.folder(room.inputs / "encoder")), *texts, "-o", str(output)]


def nothing_published(room: Room, ended: Ended) -> None:
    """Not even an empty folder."""
    assert list(room.out.iterdir()) == [], list(room.out.iterdir())


def still_old(room: Room, ended: Ended) -> None:
    """The earlier artefact is there."""
    assert (room.artefact / "model.onnx").read_bytes() == (room.root / "before").read_bytes()


# ---------------------------------------------------------------- F01

FULL = [
    Case(f"F01_{name}_{place}", plant, 9, "size limit", hook="hooks_files:limited", env={"FAULT": str(place)})
    for name, plant in (("build", building_again), ("export", exporting))
    for place in range(-(12 if name == "build" else 3), 0)
]
"""One for each file of an artefact, by size."""
FULL += [
    Case(f"F01_from_{size}_bytes", building, 9, "size limit", after=nothing_published, limits={"FSIZE": size})
    for size in (0, 1, 500)
]


# ---------------------------------------------------------------- F02


def full_device(room: Room) -> list[str]:
    """A name of a file that leads to a device without space."""
    (room.out / "v.jsonl").symlink_to("/dev/full")
    return embedding(room, room.out / "v.jsonl")


def gone(room: Room, ended: Ended) -> None:
    """The link is one of ours: away with it."""
    (room.out / "v.jsonl").unlink()


def into(make: Callable[[Room], Path]) -> Plant:
    """The good build into another place."""

    def plant(room: Room) -> list[str]:
        output = str(make(room))
        return [output if word == str(room.artefact) else word for word in room.build()]

    return plant


def a_file(room: Room) -> Path:
    """The name of a file."""
    (room.inputs / "file").write_bytes(b"kept")
    return room.inputs / "file"


def with_strangers(room: Room) -> Path:
    """A folder of somebody's work."""
    (room.inputs / "thesis").mkdir()
    (room.inputs / "thesis/chapter").write_text("years")
    return room.inputs / "thesis"


def read_only(room: Room) -> Path:
    """A folder in which nothing can be made."""
    (room.out / "locked").mkdir(mode=0o555)
    return room.out / "locked/a"


def inside_a_file(room: Room) -> Path:
    """Below a file."""
    return a_file(room) / "a"


def of_the_input(room: Room) -> Path:
    """The folder of model and data."""
    return room.good


def link_to_the_input(room: Room) -> Path:
    """Another name of it."""
    (room.inputs / "link").symlink_to(room.good)
    return room.inputs / "link"


def deep(room: Room) -> Path:
    """In folders that are not there yet."""
    return room.out / "one/two/three"


def embed_into_a_folder(room: Room) -> list[str]:
    """A folder where a file is needed."""
    (room.out / "v.npy").mkdir()
    return embedding(room, room.out / "v.npy")


def no_folder(room: Room, ended: Ended) -> None:
    """It is still empty."""
    (room.out / "v.npy").rmdir()


WRONG = [
    Case("F02_full", full_device, 9, "no space", after=gone),
    Case("F02_folder", embed_into_a_folder, 2, after=no_folder),
    Case("F02_file", into(a_file), 2, "is a file"),
    Case("F02_device", into(lambda room: Path("/dev/null")), 2, "is a file"),
    Case("F02_strangers", into(with_strangers), 2, "no build wrote"),
    Case("F02_below_a_file", into(inside_a_file), 2),
    Case("F02_read_only", into(read_only), 9, "permission denied", limits={"uid": 65534}),
    Case("F02_input", into(of_the_input), 2, "holds the input"),
    Case("F02_link_to_input", into(link_to_the_input), 2, "holds the input"),
    Case("F02_parents", into(deep), 9, "disk|size limit", after=nothing_published, limits={"FSIZE": 500}),
]


# ---------------------------------------------------------------- F03

POINTS = [
    ("lock", "out"),
    ("mkdir", "cache/qexport/statistics"),
    ("create", "cache/qexport/statistics/*"),
    ("rename", "cache/qexport/statistics/*"),
    ("sync-folder", "cache/qexport/statistics"),
    ("mkdir", "out/.a.stage-*"),
    ("create", "out/*/model.onnx"),
    ("write", "out/*/result.json"),
    ("fsync", "out/*/manifest.json"),
    ("sync-folder", "out/.a.stage-*"),
    ("exchange", "out/a"),
    ("sync-folder", "out"),
    ("remove", "out/.a.stage-*"),
]
"""Steps of a build, one of each kind, in its order."""


def same_bytes(room: Room, ended: Ended) -> None:
    """The next run makes what a build that nobody disturbs makes."""
    found = []
    for more in ((), ("--no-cache",)):
        again = room.run(room.build(*more))
        assert again.code == 0, again.stderr
        assert not damage(room.artefact)
        found.append((room.artefact / "model.onnx").read_bytes())
    assert found[0] == found[1]


def killed(point: str, pattern: str) -> Case:
    """A build over an artefact that is killed at a step."""
    name = f"F03_{point}_{pattern.replace('/', '_').replace('*', '')}"
    env = {"FAULT": f"{point} {pattern}"}
    return Case(name, rebuilding, KILLED, after=same_bytes, hook="hooks_files:killed", env=env)


KILLS = [killed(point, pattern) for point, pattern in POINTS]
KILLS += [
    Case(
        f"F03_export_{point}",
        exporting,
        KILLED,
        hook="hooks_files:killed",
        env={"FAULT": f"{point} {pattern}"},
    )
    for point, pattern in (("fsync", "out/*/model.onnx"), ("exchange", "out/a"), ("remove", "out/.a.stage-*"))
]
KILLS += [
    Case(
        f"F03b_{point}",
        rebuilding,
        KILLED,
        after=still_old,
        hook="hooks_files:killed_after_weights",
        env={"FAULT": f"{point} {pattern}"},
    )
    for point, pattern in (("fsync", "out/*/model.onnx.data"), ("create", "out/*/model.onnx"), ("exchange", "out/a"))
]


# ---------------------------------------------------------------- F09

FAILURES = [
    ("mkdir", "out/.a.stage-*"),
    ("create", "out/*/model.onnx"),
    ("write", "out/*/model.onnx"),
    ("fsync", "out/*/model.onnx"),
    ("fsync", "out/*/manifest.json"),
    ("sync-folder", "out/.a.stage-*"),
    ("exchange", "out/a"),
    ("sync-folder", "out"),
]
FAILING = [
    Case(
        f"F09_{point}_{pattern.rpartition('/')[2].replace('*', '')}",
        rebuilding,
        9,
        "input/output error",
        after=still_old,
        hook="hooks_files:failing",
        env={"FAULT": f"{point} {pattern}"},
    )
    for point, pattern in FAILURES
]


def whole(room: Room, ended: Ended) -> None:
    """All of it is there."""
    assert not damage(room.artefact)


FAILING += [
    Case("F09_short_writes", building, 0, after=whole, hook="hooks_files:short_writes"),
    Case("F09_interrupted", building, 0, after=whole, hook="hooks_files:interrupted"),
]


# ---------------------------------------------------------------- F10, F11


def modes(file: int, folder: int) -> Callable[[Room, Ended], None]:
    """Every file of the artefact has one mode, the folder another; the cache is its owner's alone."""

    def after(room: Room, ended: Ended) -> None:
        found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in room.artefact.iterdir()}
        assert set(found.values()) == {file}, found
        assert stat.S_IMODE(room.artefact.stat().st_mode) == folder
        kept = [path for path in room.cache.rglob("*") if path.is_file()]
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in kept)

    return after


def private_inputs(room: Room) -> list[str]:
    """Modes of what is read are not those of what is written."""
    (room.inputs / "calib.npz").write_bytes((room.good / "calib.npz").read_bytes())
    (room.inputs / "model.onnx").write_bytes((room.good / "model.onnx").read_bytes())
    for path in room.inputs.iterdir():
        path.chmod(0o600)
    return room.build_of(room.inputs / "model.onnx", "--calib", str(room.inputs / "calib.npz"))


MODES = [
    Case(f"F10_umask_{umask:03o}", private_inputs, 0, after=modes(file, folder), limits={"umask": umask})
    for umask, file, folder in ((0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775))
]


def own_source(room: Room) -> list[str]:
    """Export the model of an artefact in place of the artefact."""
    argv = exporting(room)
    return ["export", str(room.artefact / "model.onnx"), *argv[2:]]


def other_name_of_the_source(room: Room) -> list[str]:
    """Export in place of the very file that is read, under another name of it."""
    argv = exporting(room)
    shutil.copy(room.artefact / "model.onnx", room.root / "before")
    os.link(room.artefact / "model.onnx", room.inputs / "model.onnx")
    return ["export", str(room.inputs / "model.onnx"), *argv[2:]]


def right_bytes(room: Room, ended: Ended) -> None:
    """Both names have what the file had, and are two files now."""
    before = (room.root / "before").read_bytes()
    assert (room.inputs / "model.onnx").read_bytes() == before
    assert (room.artefact / "model.onnx").read_bytes() == before
    assert not (room.artefact / "model.onnx").samefile(room.inputs / "model.onnx")


SOURCES = [
    Case("F11_own_source", own_source, 2, "holds the input"),
    Case("F11_other_name", other_name_of_the_source, 0, after=right_bytes),
]

QUICK = {
    "F01_build_-1",
    "F01_export_0",
    "F01_from_500_bytes",
    "F03_rename_cache_qexport_statistics_",
    "F03_exchange_out_a",
}
QUICK |= {"F03_export_fsync", "F03b_create", "F09_fsync_model.onnx", "F09_short_writes"}
"""Of the sweeps, those that always run; they build several times each."""

SWEEPS = [replace(case, slow=case.id not in QUICK) for case in (*FULL, *KILLS, *FAILING)]
CASES = [*SWEEPS, *WRONG, *MODES, *SOURCES]
