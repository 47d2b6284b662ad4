"""F03 and F09, all of them: a build that keeps all it can, killed and failed at every step it takes on every file."""

from __future__ import annotations

import os
import re
import shutil
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

from faults.case import Case, Ended, Room
from faults.rows_k_build import digests, result

KILLED = -9
ORDER = ("recipe", "verify", "latency", "engine")
"""What a build keeps, in its order."""
RTX = ("--target", "tensorrt-rtx")
UNDISTURBED: dict[tuple[str, ...], dict[str, str]] = {}
"""Digests of a build that nobody disturbs, by what it is told beside."""

FILES = ("model.onnx", "result.json", "report.md", "report.json", "report.html", "README.md", "manifest.json")
FILES += tuple(f"report-{table}.parquet" for table in ("nodes", "activations", "weights", "points", "samples"))
STATISTICS = "cache/qexport/statistics"
BUILDS = "cache/qexport/builds"
KEPT = {"statistics": f"{STATISTICS}/*", **{name: f"{BUILDS}/*{name}-*" for name in ORDER[:3]}}
POINTS = [
    ("lock", "out"),
    *(("mkdir", folder) for folder in ("out/.a.stage-*", "cache/qexport", BUILDS, f"{BUILDS}/*", STATISTICS)),
    ("lock", f"{BUILDS}/*"),
    *((point, pattern) for pattern in KEPT.values() for point in ("create", "write", "fsync", "rename")),
    *(("sync-folder", folder) for folder in (STATISTICS, f"{BUILDS}/*")),
    *((point, f"out/.a.stage-*/{name}") for name in FILES for point in ("create", "write", "fsync")),
    ("sync-folder", "out/.a.stage-*"),
    ("rename", "out/a"),
    ("sync-folder", "out"),
]
LAST = POINTS[-1]
"""When this fails the artefact is there, and nobody knows whether it would be after a loss of power."""
ALWAYS = {("rename", KEPT["recipe"]), ("create", KEPT["latency"]), ("fsync", "out/.a.stage-*/manifest.json")}
"""What is swept without ``--table`` too."""
ENGINES = [("create", f"{BUILDS}/*engine-*"), ("rename", f"{BUILDS}/*engine-*"), ("adopt", "out/*/engine.plan")]
ENGINES += [("fsync", "out/*/manifest.json")]


def counting(argv: list[str]) -> Case:
    """How commands run that keep all they can."""
    return Case("", lambda _: argv, hook="hooks_build:all_counts")


def kept(room: Room) -> dict[str, Path]:
    """What is in the cache of the one build, by stage."""
    files = [path for path in (room.cache / "qexport/builds").glob("*/*") if not path.name.startswith(".")]
    return {path.name.rpartition("-")[0]: path for path in files}


def goes_on(*more: str):
    """The next run takes all that was kept, does one stage again at most, and makes the same bytes."""

    def after(room: Room, ended: Ended) -> None:
        before = kept(room)
        begun = [args[1] for args in ended.events("qexport.io") if args[1].startswith(str(room.cache))]
        worked = {name for name in ORDER for path in begun if re.search(rf"/\.?{name}-[0-9a-f]{{32}}", path)}
        assert len(worked - set(before)) <= 1, (worked, before)
        assert worked >= set(before)
        again = room.run(room.build(*more), counting([]))
        assert again.code == 0, again.stderr
        assert result(room.artefact)["resumed"] == [name for name in ORDER if name in before]
        assert digests(room.artefact) == undisturbed(room, more)
        if "engine" in before:
            assert before["engine"].read_bytes().endswith((room.artefact / "engine.plan").read_bytes())

    return after


def undisturbed(room: Room, more: tuple[str, ...]) -> dict[str, str]:
    """What must come out; made once, without a cache."""
    if more not in UNDISTURBED:
        assert room.run(room.build(*more, "--no-cache")).code == 0
        UNDISTURBED[more] = digests(room.artefact)
    return UNDISTURBED[more]


def killed(point: str, pattern: str, *more: str, slow: bool = True) -> Case:
    """A build that is killed when it comes to a step."""
    where = re.sub(r"[/.]+", "_", pattern.replace("*", "x")).strip("_")
    return Case(
        f"F03_{'engine' if more else 'sweep'}_{point}_{where}",
        lambda room: room.build(*more),
        KILLED,
        after=goes_on(*more),
        hook="hooks_build:killed",
        env={"FAULT": f"{point} {pattern}"},
        limits={"wall": 120, "rss": 2000},
        slow=slow,
    )


def is_whole(room: Room, ended: Ended) -> None:
    """No step of a build is left out, and none of the list is never taken."""
    taken = {(args[0], os.path.relpath(args[1], room.root)) for args in ended.events("qexport.io")}
    missed = [step for step in taken if not any(step[0] == p and fnmatch(step[1], where) for p, where in POINTS)]
    assert not missed, missed
    never = [step for step in POINTS if not any(step[0] == p and fnmatch(where, step[1]) for p, where in taken)]
    assert not never, never


WHOLE = [Case("F03_sweep", lambda room: room.build(), 0, after=is_whole, hook="hooks_build:all_counts")]
SWEEP = [killed(*step, slow=step not in ALWAYS) for step in POINTS]


def only_not_kept(room: Room, ended: Ended) -> None:
    """The artefact is what it would have been, and there is a word about the cache."""
    assert digests(room.artefact) == undisturbed_elsewhere(room)
    assert any("cache" in warning for warning in result(room.artefact)["warnings"])


def undisturbed_elsewhere(room: Room) -> dict[str, str]:
    """The same as ``undisturbed``, with the artefact left as it is."""
    room.artefact.rename(room.tmp / "kept")
    wanted = undisturbed(room, ())
    if room.artefact.exists():
        shutil.rmtree(room.artefact)
    (room.tmp / "kept").rename(room.artefact)
    return wanted


def nothing_new(room: Room, ended: Ended) -> None:
    """No artefact, and no stage that another one would have to remove."""
    assert list(room.out.iterdir()) == []


def failed(point: str, pattern: str) -> Case:
    """A build for which a step fails: a cache it can do without."""
    of_cache = pattern.startswith("cache")
    where = re.sub(r"[/.]+", "_", pattern.replace("*", "x")).strip("_")
    return Case(
        f"F09_sweep_{point}_{where}",
        lambda room: room.build(),
        0 if of_cache else 9,
        "" if of_cache else "input/output error",
        after=only_not_kept if of_cache else None if (point, pattern) == LAST else nothing_new,
        hook="hooks_build:failing",
        env={"FAULT": f"{point} {pattern}"},
        slow=True,
    )


def decides_alike(room: Room, ended: Ended) -> None:
    """Layers are chosen by measured times: the next run has those of the killed one, and so the same bytes."""
    (dead,) = room.out.glob(".a.stage-*")
    before = (dead / "model.onnx").read_bytes()
    again = room.run(careful(room))
    assert again.code == 0, again.stderr
    told = result(room.artefact)
    assert "latency" in told["resumed"], told["resumed"]
    assert (room.artefact / "model.onnx").read_bytes() == before


def careful(room: Room) -> list[str]:
    """A build in which int8 that does not pay goes back, which is left to chance for so small a model."""
    return room.build("--set", "export.never_worse=true")


BY_TIMES = [
    Case(
        f"F03_times_{point}",
        careful,
        KILLED,
        after=decides_alike,
        hook="hooks_files:killed",
        env={"FAULT": f"{point} out/*/manifest.json"},
        slow=point != "fsync",
    )
    for point in ("create", "fsync")
]
WITH_ENGINE = [killed(*step, *RTX) for step in ENGINES if find_spec("tensorrt_rtx")]
FAILED = [failed(*step) for step in POINTS if step[0] != "lock"]  # K06: without locks it goes on
CASES = [*WHOLE, *SWEEP, *BY_TIMES, *WITH_ENGINE, *FAILED]
