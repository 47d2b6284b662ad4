"""Fetch a model from a hub: its list, the small files, a look at them, the weights; published whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from qexport.errors import IntegrityError, ModelInvalid, UnsafeInput
from qexport.exporter.families.folder import CONFIG, Folder, demand_no_code
from qexport.exporter.hub.connection import Hub, address_of_file, address_of_list
from qexport.exporter.hub.download import copy, download, forget
from qexport.exporter.hub.listing import (
    COMMIT,
    LOCK,
    SMALL,
    Listed,
    Pinned,
    choose,
    parse_name,
    read_listing,
    read_pinned,
)
from qexport.exporter.options import Progress, Silent
from qexport.safe_io import Cache, Stage, publish


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was fetched.

    Attributes:
        folder: Where it is.
        pinned: Model, revision, commit and files.
        warnings: What should be known.
    """

    folder: Path
    pinned: Pinned
    warnings: tuple[str, ...]


def fetch(
    name: str,
    output: str | Path,
    hub: Hub,
    *,
    cache: Cache | None = None,
    update: bool = False,
    progress: Progress | None = None,
) -> Fetched:
    """Fetch the files that make a model, each with the digest that the hub lists, into a folder.

    A folder that was fetched before stays at its commit unless ``update`` says otherwise.

    Args:
        name: ``REPO`` or ``REPO@REVISION``: a branch, a tag or a commit.
        output: Folder to make, or to replace where an earlier fetch made it.
        hub: Where from.
        cache: Keeps what has arrived until everything has.
        update: Whether a branch that has moved is followed.
        progress: Who hears about stages.

    Raises:
        UsageError: There is no such model; or ``output`` cannot be written.
        UnsafeInput: It wants its own code run, or its weights are pickles.
        IntegrityError: Something is not what was announced or pinned.
        ResourceExhausted: The hub does not answer, or the disk is full.
    """
    kept, stages, folder = cache or Cache(), progress or Silent(), Path(output)
    with publish(output) as stage:
        with stages.stage("list"):
            pinned, warnings = _resolve(hub, name, read_pinned(folder), update=update)
        with stages.stage("fetch", len(pinned.files)) as advance:
            for file in pinned.files:  # the small ones stand first
                if file.name not in SMALL:
                    _demand_no_code(stage.path, f"{pinned.repo}@{pinned.commit}")
                _take(hub, pinned, file, (folder, stage, kept))
                advance()
        stage.write_json(LOCK, pinned.as_dict())
        stage.write_manifest()
    forget(kept, pinned.files)
    return Fetched(folder, pinned, (*warnings, *kept.doubts))


def _resolve(hub: Hub, name: str, before: Pinned | None, *, update: bool) -> tuple[Pinned, list[str]]:
    """Which commit is meant, and its files; what there is to say about that."""
    repo, revision = parse_name(name)
    found = _list(hub, repo, revision)
    warnings = []
    fixed = COMMIT.fullmatch(revision)
    if fixed and found.commit != revision:
        raise IntegrityError(f"the hub has another commit than {revision}: {found.commit}", where=repo)
    if before is not None and (update or before.repo != repo or revision not in (before.revision, before.commit)):
        before = None
    if before is not None and found.commit != before.commit:
        moved = f"{revision} of {repo} has moved to {found.commit}; {LOCK} keeps {before.commit}"
        warnings.append(f"{moved}: --update takes the new one")
        found = replace(_list(hub, repo, before.commit), revision=revision)
    if before is not None and not _agree(before, found):
        hint = "somebody has changed the commit or the lock; --update takes what the hub has now"
        raise IntegrityError(f"commit {before.commit} is not what {LOCK} says", where=repo, hint=hint)
    if before is None and not fixed:
        warnings.append(f"{revision} of {repo} can move: it is {found.commit} now, which {LOCK} keeps")
    return found, warnings


def _agree(before: Pinned, found: Pinned) -> bool:
    """Whether it is the same commit, and its files are what they were."""
    then = {file.name: file for file in before.files}
    return found.commit == before.commit and all(then.get(file.name, file) == file for file in found.files)


def _list(hub: Hub, repo: str, revision: str) -> Pinned:
    commit, files = read_listing(hub.json(address_of_list(repo, revision)), repo)
    return Pinned(repo, revision, commit, choose(files, f"{repo}@{commit}"))


def _take(hub: Hub, pinned: Pinned, file: Listed, places: tuple[Path, Stage, Cache]) -> None:
    """Put a file into the stage, from the folder that was there or from the hub."""
    old, stage, cache = places
    if "/" in file.name:
        stage.make_folder(file.name.partition("/")[0])
    if not copy(file, old, stage):
        download(hub, address_of_file(pinned.repo, pinned.commit, file.name), file, stage, cache)


def _demand_no_code(folder: Path, where: str) -> None:
    """``UnsafeInput`` where settings ask for code, ``ModelInvalid`` where they are none."""
    try:
        demand_no_code(folder, Folder(folder).json(CONFIG))
    except (UnsafeInput, ModelInvalid) as error:
        raise type(error)(error.what, where=where, hint=error.hint) from error
