"""What holds for every case, whatever its fault: eight functions that raise ``Broken``."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.audit import CHANGES, NETWORK
from faults.case import Case, Ended, Room
from faults.room import FREE, Seen, look

WALL, RSS = 20, 1000
"""Seconds and MB that a case may take unless it says otherwise."""

LEFTOVER = re.compile(r"\.(stage|old|tmp)-|\.lock$")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
ANYWHERE = re.compile(r"/dev/(null|full|tty|shm(/.*)?)|/proc/.*")
HERE = re.compile(r"127\.0\.0\.1|::1|localhost|/")
OURS = re.compile(r"(error|hint|warning): |\[ *\d+\.\d s\] |(interrupted|terminated); nothing was published$")
"""Lines of ours on stderr."""
SCHEMA = "qexport.error/1"


class Broken(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True)
class Run:
    """One run of a case, and what was there before."""

    case: Case
    room: Room
    before: Seen
    argv: list[str]
    ended: Ended

    def demand(self, holds: object, name: str, what: object) -> None:
        """Raise ``Broken`` unless it holds, with all that helps to see why."""
        if not holds:
            end = self.ended
            told = f"stdout: {end.stdout[-1500:]!r}\nstderr: {end.stderr[-3000:].decode('utf-8', 'replace')}"
            raise Broken(f"{name}: {what}\n{self.argv}\ncode {end.code}, {end.wall:.2f} s, {end.rss >> 20} MB\n{told}")

    @property
    def as_json(self) -> bool:
        """Whether one object is expected on stdout."""
        return "--json" in self.argv


def old_or_new_output(run: Run) -> None:
    """I1: what is published is what it was before, or whole."""
    before = {name: facts for name, facts in run.before.items() if name.startswith("out/")}
    for entry in sorted(run.room.out.iterdir()):
        if entry.name.startswith("."):
            continue
        inside = f"out/{entry.name}"
        now = {inside: look(run.room.out)[entry.name]}
        now |= {f"{inside}/{name}": facts for name, facts in (look(entry) if entry.is_dir() else {}).items()}
        same = now == {name: before[name] for name in before if name == inside or name.startswith(f"{inside}/")}
        run.demand(same or not damage(entry), "I1", f"{entry.name} is neither old nor whole: {damage(entry)}")
    gone = {name.split("/")[1] for name in before} - set(os.listdir(run.room.out))
    run.demand(not gone, "I1", f"gone: {gone}")


def damage(artefact: Path) -> str:
    """What is wrong with a published folder, by its manifest; empty where nothing is."""
    try:
        files = json.loads((artefact / "manifest.json").read_bytes())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"no manifest: {error!r}"
    names = {path.name for path in artefact.iterdir()} - {"manifest.json"}
    if names != set(files):
        return f"holds {sorted(names)}, the manifest says {sorted(files)}"
    for name, told in files.items():
        data = (artefact / name).read_bytes()
        if told != {"bytes": len(data), "digest": f"sha256:{hashlib.sha256(data).hexdigest()}"}:
            return f"{name} is not what the manifest says"
    return ""


def same_inputs(run: Run) -> None:
    """I2: what was given is as it was, to the byte, the mode and the time."""
    if not run.case.moves_inputs:
        _demand_same(run, "I2", lambda name: name.split("/")[0] in ("inputs", "good"))


def nothing_elsewhere(run: Run) -> None:
    """I3: nothing outside of out, cache and tmp is there that was not, or was touched meanwhile."""
    _demand_same(run, "I3", lambda name: name.split("/")[0] not in (*FREE, "inputs", "good"))
    env = {"HOME": str(run.room.home), "XDG_CACHE_HOME": "/", **run.case.env}
    folders = [*map(run.room.root.joinpath, FREE), *([] if env["XDG_CACHE_HOME"] else [env["HOME"]])]
    for event, *args in run.ended.log:
        written = args[:1] if event == "open" and args[1:] == ["write"] else args if event in CHANGES else []
        for path in written:
            outside = os.path.isabs(path) and not any(f"{path}/".startswith(f"{folder}/") for folder in folders)
            run.demand(not outside or ANYWHERE.fullmatch(path), "I3", f"{event} {path}")


def _demand_same(run: Run, name: str, which: Callable[[str], bool]) -> None:
    before = {path: facts for path, facts in run.before.items() if which(path)}
    now = {path: facts for path, facts in look(run.room.root).items() if which(path)}
    changed = sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))
    run.demand(not changed, name, [(path, before.get(path), now.get(path)) for path in changed[:5]])


def no_network(run: Run) -> None:
    """I4: nobody is called."""
    for event, *args in run.ended.log:
        allowed = run.case.network and any(HERE.search(arg) for arg in args)
        run.demand(event not in NETWORK or allowed, "I4", f"{event} {args}")


def ends_by_itself(run: Run) -> None:
    """I5: the command is not ended by a signal, and its code is the right one."""
    codes = run.case.codes
    run.demand(run.ended.late or run.ended.code >= 0 or run.ended.code in codes, "I5", f"signal {-run.ended.code}")
    run.demand(run.ended.late or run.ended.code in codes, "exit code", f"{run.ended.code}, expected {codes}")


def within_limits(run: Run) -> None:
    """I6: in time, and in memory."""
    wall, rss = run.case.limits.get("wall", WALL), run.case.limits.get("rss", RSS)
    cpu = run.case.limits.get("cpu", run.ended.cpu)
    run.demand(run.ended.cpu <= cpu, "I6", f"took {run.ended.cpu:.2f} s of processor, allowed are {cpu}")
    run.demand(run.ended.wall <= wall, "I6", f"took {run.ended.wall:.2f} s, allowed are {wall}")
    run.demand(run.ended.rss <= rss << 20, "I6", f"took {run.ended.rss >> 20} MB, allowed are {rss}")


def one_cause(run: Run) -> None:
    """I7: one line of cause and one of advice, or one object; nothing that moves a terminal."""
    if run.ended.code < 0:
        return
    out, err = (data.decode("utf-8", "backslashreplace") for data in (run.ended.stdout, run.ended.stderr))
    for text in (out, err):
        run.demand(not CONTROL.search(text), "I7", f"control characters {CONTROL.findall(text)[:5]}")
    run.demand("Traceback (most recent call last)" not in err, "I7", "a traceback")
    lines = err.splitlines()
    errors, hints = ([line for line in lines if line.startswith(word)] for word in ("error: ", "hint: "))
    failed = 1 <= run.ended.code <= 12
    run.demand(len(errors) == (failed and not run.as_json), "I7", f"{len(errors)} lines of error")
    run.demand(len(hints) <= len(errors), "I7", f"{len(hints)} hints")
    others = [line for line in lines if line and not OURS.match(line)]  # click ends the line of a ^C
    run.demand(len([line for line in lines if line.endswith("; nothing was published")]) <= 1, "I7", "told twice")
    run.demand(not others, "I7", f"others speak on stderr: {others[:3]}")
    run.demand(not failed or run.as_json or not out, "I7", f"stdout of a failure: {out[:300]}")
    told = _object(run, out) if run.as_json else {}
    if run.ended.code:
        line = f"{errors[0]} ({''.join(hints)[6:]})" if failed and not told else err
        said = f"{told['where']}: {told['what']} ({told['hint']})" if told else line
        run.demand(re.search(run.case.says, said, re.DOTALL), "I7", f"does not say {run.case.says!r}: {said}")


def _object(run: Run, out: str) -> dict[str, object]:
    """The one object of a command with --json; of an error, if it is one."""
    try:
        told = json.loads(out)
    except ValueError:
        told = None
    run.demand(isinstance(told, dict) and out.count("\n") == 1, "I7", "stdout is not one object in one line")
    if run.ended.code:
        right = told.get("schema") == SCHEMA and told.get("exit_code") == run.ended.code and told.get("what")
        run.demand(right, "I7", f"not an error object: {told}")
        run.demand({"error", "where", "hint"} <= set(told), "I7", f"fields are missing: {sorted(told)}")
    return told  # type: ignore[no-any-return]  # json is anything


def nothing_left(run: Run) -> None:
    """I8: no process outlives the command, and after one more run nothing half done is anywhere."""
    run.demand(not run.ended.left, "I8", f"still running: {run.ended.left}")
    if run.case.again or (_touched(run) and not _clean(run)):
        again = run.case.again(run.room) if run.case.again else run.room.build()
        owner = {name: run.case.limits[name] for name in ("uid",) if name in run.case.limits}
        ended = run.room.run(again, Case("", run.case.plant, limits=owner))
        after = Run(run.case, run.room, run.before, again, ended)
        after.demand(ended.code == 0 and not ended.left, "I8", "the run that follows does not end well")
        found = [name for name in look(run.room.root) if LEFTOVER.search(name)]
        temporary = os.listdir(run.room.tmp) if run.ended.code >= 0 else []
        after.demand(not found and not temporary, "I8", f"left over: {found or temporary}")


def _clean(run: Run) -> bool:
    """Whether it has ended well and there is nothing that the next run would have to remove."""
    found = any(LEFTOVER.search(name) for name in look(run.room.root))
    return run.ended.code == 0 and not found and not os.listdir(run.room.tmp)


def _touched(run: Run) -> bool:
    """Whether the run has changed what it may change."""
    return run.before != look(run.room.root)


ALL: tuple[Callable[[Run], None], ...] = (
    ends_by_itself,
    within_limits,
    one_cause,
    old_or_new_output,
    same_inputs,
    nothing_elsewhere,
    no_network,
)
"""All but ``nothing_left``, which comes last, after what a case asserts itself."""
