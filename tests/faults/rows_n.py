"""N, fetching: hubs that cut, stall, fail, lie, lead astray and move; models that want to run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from faults.case import Case, Ended, Room
from faults.server import CONFIG, FILES, LATER, PIECE, TAKEN, WEIGHTS, Model, hub


def name(room: Room, behaviour: str) -> str:
    """A model of this room alone."""
    return f"{room.root.name}/{behaviour}"


def model(room: Room, behaviour: str) -> Model:
    """The same, on the server's side."""
    return hub().model(name(room, behaviour))


def fetching(behaviour: str, revision: str = "", change: dict[str, bytes | None] | None = None) -> Callable:
    """Fetch a model of which some files are others, or are not there."""

    def plant(room: Room) -> list[str]:
        (room.inputs / "hub").write_text(hub().address, "utf-8")
        files = {**model(room, behaviour).files, **(change or {})}
        model(room, behaviour).files = {key: content for key, content in files.items() if content is not None}
        return ["fetch", name(room, behaviour) + revision, "-o", str(room.artefact)]

    return plant


def whole(room: Room, ended: Ended) -> None:
    """All files are there, and no other."""
    names = {path.name for path in room.artefact.iterdir()}
    assert names == {*TAKEN, "qexport.lock.json", "manifest.json"}
    assert all((room.artefact / each).read_bytes() == FILES[each] for each in TAKEN)


def nothing(room: Room, ended: Ended) -> None:
    """Nothing is published, nobody else was called."""
    assert not room.artefact.exists()
    asked = [host for host, *_ in ended.events("socket.getaddrinfo")]
    assert set(asked) <= {"127.0.0.1"}, asked


def from_the_middle(behaviour: str, *starts: int | None) -> Callable[[Room, Ended], None]:
    """It is whole, and what had arrived was not asked for again."""

    def after(room: Room, ended: Ended) -> None:
        whole(room, ended)
        wanted = [None if start is None else f"bytes={start}-" for start in starts]
        assert model(room, behaviour).ranges() == wanted, model(room, behaviour).ranges()

    return after


def goes_on(room: Room, ended: Ended) -> None:
    """The next run has what arrived in whole pieces, and asks for the rest alone."""
    nothing(room, ended)
    argv = fetching("good")(room)
    again = room.run(argv, case("N01", "", 0))
    assert again.code == 0, again.stderr
    from_the_middle("good", 2 * PIECE)(room, again)


def case(row: str, id: str, code: int, says: str = "", **more: object) -> Case:
    """A case whose network is this machine."""
    after = whole if code == 0 else nothing
    fixed = {"hook": "server:here", "network": True, "again": follow, "after": after, **more}
    plant = fixed.pop("plant", None) or fetching(id)
    return replace(Case(f"{row}_{id}", plant, code, says), **fixed)


def follow(room: Room) -> list[str]:
    """A good run; what a fetch has left over is not its to remove."""
    return ["check", str(room.good / "model.onnx")]


MENDED = [
    case("N01", "good", 0),
    case("N01", "git", 0),
    case("N01", "cut", 0, after=from_the_middle("cut", None, 10_000)),
    case("N01", "cut_no_ranges", 0),
    case("N01", "failing", 0),
    case("N01", "overloaded", 0),
    case("N01", "damaged_once", 0, after=from_the_middle("damaged_once", None, None)),
    case("N01", "elsewhere", 0),
]
REFUSED = [
    case("N01", "stalled", 9, "too slow: nothing has come", after=goes_on),
    case("N01", "trickle", 9, "too slow: it sends"),
    case("N01", "failing_always", 9, "it answers 503"),
    case("N01", "overloaded_for_long", 9, "it answers 429, and wants to be left alone for 5 minutes"),
    case("N01", "cut_always", 11, "it ends after 0 bytes"),
    case("N01", "short", 11, f"it ends after {len(WEIGHTS) - 100} bytes"),
    case("N01", "long", 11, f"it goes on after {len(WEIGHTS)} bytes"),
    case("N01", "damaged", 11, "its digest is"),
    case("N01", "to_http", 11, "not encrypted"),
    case("N01", "to_file", 11, "no https:// address"),
    case("N01", "to_ftp", 11, "not encrypted"),
    case("N01", "to_itself", 11, "in a circle"),
    case("N01", "no_list", 11, "damaged"),
    case("N01", "missing", 2, "no such model"),
    case("N01", "no_model", 2, "no such model"),
    case("N01", "not_yours", 2, "HF_TOKEN"),
    case("N01", "no_hub", 2, "HF_ENDPOINT", hook="", network=False, again=None),
]


# ---------------------------------------------------------------- N02


def moved(*more: str) -> Callable[[Room], list[str]]:
    """Fetch a branch that has moved since it was fetched."""

    def plant(room: Room) -> list[str]:
        argv = fetching("branch")(room)
        first = room.run(argv, case("N02", "", 0))
        assert first.code == 0, first.stderr
        model(room, "branch").commit = LATER
        return [*argv, *more]

    return plant


def pinned(commit: str, text: str) -> Callable[[Room, Ended], None]:
    """The lock names the commit, and a warning says so."""

    def after(room: Room, ended: Ended) -> None:
        whole(room, ended)
        assert json.loads((room.artefact / "qexport.lock.json").read_text())["commit"] == commit
        assert text in ended.stdout.decode()

    return after


COMMIT = "1" * 40
MOVING = [
    case("N02", "first", 0, after=pinned(COMMIT, "can move")),
    case("N02", "moved", 0, plant=moved(), after=pinned(COMMIT, f"has moved to {LATER}")),
    case("N02", "update", 0, plant=moved("--update"), after=pinned(LATER, "can move")),
    case("N02", "commit", 0, plant=fetching("x", f"@{LATER}"), after=pinned(LATER, "")),
]


# ---------------------------------------------------------------- N03

CODE = CONFIG[:-1] + b', "auto_map": {"AutoModel": "modules.Model"}}'


def unasked(behaviour: str) -> Callable[[Room, Ended], None]:
    """Weights were not even asked for."""

    def after(room: Room, ended: Ended) -> None:
        nothing(room, ended)
        assert model(room, behaviour).ranges() == []

    return after


def brings(change: dict[str, bytes | None]) -> dict[str, object]:
    """A model with other files, which is refused before its weights."""
    return {"plant": fetching("brings", change=change), "after": unasked("brings")}


def folder(room: Room) -> str:
    """A folder that wants its own code run."""
    place = room.inputs / "code"
    place.mkdir()
    (place / "config.json").write_bytes(CODE)
    (place / "model.safetensors").write_bytes(WEIGHTS)
    return str(place)


WANTING = [
    case("N03", "code", 4, "auto_map", **brings({"config.json": CODE})),
    case("N03", "code_of_tokenizer", 4, "auto_map", **brings({"tokenizer_config.json": CODE})),
    case("N03", "pickle", 4, "pickle.*pytorch_model.bin", **brings({"model.safetensors": None})),
    Case("N03_build", lambda room: room.build_of(folder(room)), 4, "auto_map"),
    Case("N03_export", lambda room: ["export", folder(room), "-o", str(room.artefact)], 4, "auto_map"),
]

CASES = [*MENDED, *REFUSED, *MOVING, *WANTING]
