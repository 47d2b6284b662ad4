"""Publish a folder: stage it beside its final name, exchange both in one step, remove the old content."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from qexport.errors import QexportError, UsageError
from qexport.safe_io.locking import locked_folder, try_lock
from qexport.safe_io.points import reach
from qexport.safe_io.reading import open_beneath, open_file, read_bytes
from qexport.safe_io.translate import translated
from qexport.safe_io.writing import Sink, beside, create, stem, sync_folder, to_json

MANIFEST = "manifest.json"
_SCHEMA = "qexport.manifest/"  # other programs have files of that name too
_MOST_JSON = 256 << 20
_LEFTOVER = re.compile(r"\.(?P<stem>.+)\.(?P<kind>stage|old)-[0-9a-f]{16}")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Stage:
    """A folder under construction.

    Attributes:
        path: The staging folder.
        files: Name of each finished file to its bytes and digest.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, tuple[int, str]] = {}
        self._folders: set[str] = set()

    def make_folder(self, name: str) -> None:
        """Make a folder, whose files are then created as ``NAME/FILE``; once more does nothing."""
        if name not in self._folders:
            self._demand_new(name)
            with translated(name):
                _make([self.path / name])
            self._folders.add(name)

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """Open a new file for sequential writing; it is counted, digested and flushed to the disk at the end.

        Raises:
            UsageError: ``name`` is a path or was written before.
            ResourceExhausted: No space.
        """
        self._demand_new(name)
        with translated(name):
            fd = create(self.path / name)
            try:
                sink = Sink(fd, self.path / name)
                yield sink  # type: ignore[misc]  # a RawIOBase has all that BinaryIO asks of a writer
                self.files[name] = sink.finish()
            finally:
                os.close(fd)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Add a file."""
        with self.create(name) as file:
            file.write(data)

    def write_text(self, name: str, text: str) -> None:
        """Add a UTF-8 file."""
        with self.create(name) as file:
            file.write(text.encode("utf-8"))

    def write_json(self, name: str, value: object) -> None:
        """Add an indented JSON file; ``ValueError`` for NaN and Inf."""
        data = to_json(value)
        with self.create(name) as file:
            file.write(data)

    def write_manifest(self) -> None:
        """Add ``manifest.json``, last of all: size and digest of every file."""
        files = {name: {"bytes": size, "digest": digest} for name, (size, digest) in sorted(self.files.items())}
        self.write_json(MANIFEST, {"schema": f"{_SCHEMA}1", "files": files})

    def copy(self, source: str | os.PathLike[str], name: str) -> None:
        """Add a copy of a regular file."""
        with open_file(source) as original, self.create(name) as file:
            shutil.copyfileobj(original, file, 1 << 20)

    def adopt(self, name: str) -> None:
        """Count and digest a file that another process has put into the folder and flushed to the disk."""
        self._demand_new(name)
        with translated(name):
            reach("adopt", self.path / name)
        with open_beneath(self.path, name) as file, translated(name):
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            self.files[name] = (file.tell(), f"sha256:{digest}")

    def _demand_new(self, name: str) -> None:
        folder, slash, own = name.rpartition("/")
        if own in ("", ".", "..") or "\0" in name or name in self.files or (slash and folder not in self._folders):
            raise UsageError(f"{name!r} is not a new file name", where=str(self.path))


@contextmanager
def publish(directory: str | os.PathLike[str], *, inputs: Iterable[str | os.PathLike[str]] = ()) -> Iterator[Stage]:
    """Stage a folder and put it in the place of ``directory`` in one step when the block ends well.

    When the block raises, or the process dies, ``directory`` holds what it held before. Staging folders of processes
    that died are removed the next time. Write ``manifest.json`` last; its ``files`` names what is ours to replace.

    Args:
        directory: The folder to make or to replace; its parents are made, and removed again when the block raises.
        inputs: Files the work reads; none may lie in ``directory``.

    Raises:
        UsageError: ``directory`` is a file or a mount point, holds an input, or files that no build wrote.
        ResourceExhausted: No space, no permission.
    """
    with translated(directory):
        target = _named(directory)
        made = [folder for folder in target.parents if not folder.exists()]
        inputs = list(inputs)
        _demand_ours(target, inputs)  # before anything is made
    stage, lock = beside(target, "stage"), None
    try:
        with translated(directory):
            _make(made)
            lock = _open_stage(target, stage)
        _demand_ours(target, inputs)  # again: an old folder may have come back
        yield Stage(stage)
        with translated(directory):
            for folder in (*(Path(entry.path) for entry in os.scandir(stage) if entry.is_dir()), stage):
                sync_folder(folder)
            with locked_folder(target.parent), _replaced(stage, target):
                sync_folder(target.parent)
            made = []
    finally:
        _remove(stage)  # what failed, or the old content after the exchange
        if lock is not None:
            os.close(lock)
        for folder in made:
            with suppress(OSError):  # somebody else has put something there
                os.rmdir(folder)


def _make(missing: list[Path]) -> None:
    """Make folders, the innermost of which stands first."""
    for folder in reversed(missing):
        reach("mkdir", folder)
        folder.mkdir(exist_ok=True)


def _named(directory: str | os.PathLike[str]) -> Path:
    """The folder itself, links followed; ``UsageError`` for what cannot be the name of one."""
    where = os.fspath(directory)
    if "\0" in where:
        raise UsageError("not a name of a folder", where=where)
    target = Path(os.path.realpath(directory))
    if not target.name:
        raise UsageError("the output is a mount point", where=where, hint="choose a folder inside it")
    with suppress(FileNotFoundError):
        os.stat(target)  # for what else it says: too long a name, a loop of links
    return target


def _demand_ours(target: Path, inputs: Iterable[str | os.PathLike[str]]) -> None:
    where = str(target)
    if target.exists() and not target.is_dir():
        raise UsageError("the output is a file, a folder is needed", where=where)
    if os.path.ismount(target):
        raise UsageError("the output is a mount point", where=where, hint="choose a folder inside it")
    for path in map(os.path.realpath, inputs):
        if target == Path(path) or target in Path(path).parents:
            raise UsageError(f"the output folder holds the input {path!r}", where=where, hint="choose another folder")
    strangers = _strangers(target)
    if strangers:
        what = f"the output folder holds files that no build wrote: {', '.join(map(repr, strangers[:3]))}"
        raise UsageError(what, where=where, hint="choose a new folder, or move them away")


def _strangers(target: Path) -> list[str]:
    """Names in ``target`` that its manifest does not claim; all of them when there is no readable manifest of ours.

    What is claimed is a file, or ``FOLDER/FILE``: a folder of a file's name was made by somebody else.
    """
    if not target.exists():
        return []
    names = {entry.name: entry.is_file(follow_symlinks=False) for entry in os.scandir(target)}
    claimed = {MANIFEST, *_claimed(target)} if names.get(MANIFEST) else set()
    for folder in {name.partition("/")[0] for name in claimed if "/" in name} & names.keys():
        if (target / folder).is_dir() and not (target / folder).is_symlink():
            del names[folder]
            inner = os.scandir(target / folder)
            names |= {f"{folder}/{entry.name}": entry.is_file(follow_symlinks=False) for entry in inner}
    return sorted(name for name, is_file in names.items() if not is_file or name not in claimed)


def _claimed(target: Path) -> set[str]:
    """Names that a manifest of ours vouches for; none where it is another program's, or damaged."""
    try:
        manifest = json.loads(read_bytes(target / MANIFEST, limit=_MOST_JSON))
        return set(manifest["files"]) if str(manifest["schema"]).startswith(_SCHEMA) else set()
    except (QexportError, OSError, ValueError, RecursionError, KeyError, TypeError):
        return set()


def _open_stage(target: Path, stage: Path) -> int:
    """Make and lock a staging folder; the lock tells the living from the dead and ends with the process."""
    with locked_folder(target.parent):
        with suppress(OSError):  # leftovers that cannot be removed do not stop the work
            _collect(target)
        reach("mkdir", stage)
        os.mkdir(stage)
        lock = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try_lock(lock)
    return lock


def _collect(target: Path) -> None:
    """Remove what dead processes left beside ``target``; put back a folder that was moved away and never replaced."""
    for entry in sorted(target.parent.iterdir()):
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None or match["stem"] != stem(target) or not entry.is_dir() or _alive(entry):
            continue
        if match["kind"] == "old" and not target.exists():
            reach("rename", target)
            os.rename(entry, target)
        else:
            _remove(entry)


def _alive(stage: Path) -> bool:
    """Whether somebody writes a stage; so it seems where nobody can tell."""
    fd = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return try_lock(fd) is not True
    finally:
        os.close(fd)


@contextmanager
def _replaced(stage: Path, target: Path) -> Iterator[None]:
    """Rename, or exchange with what is there; without the system call, two renames that the next run can repair.

    All of it is undone when the block raises.
    """
    if not target.exists():
        with _renamed(stage, target):
            yield
    elif exchange(stage, target):
        try:
            yield
        except BaseException:
            exchange(stage, target)
            raise
    else:
        old = beside(target, "old")
        with _renamed(target, old), _renamed(stage, target):
            yield
        _remove(old)


@contextmanager
def _renamed(one: Path, other: Path) -> Iterator[None]:
    """Rename, and back when the block raises."""
    reach("rename", other)
    os.rename(one, other)
    try:
        yield
    except BaseException:
        os.rename(other, one)
        raise


def _remove(folder: Path) -> None:
    """Remove a folder of ours with what is in it, as far as that goes."""
    if os.path.lexists(folder):
        with suppress(OSError):
            reach("remove", folder)
        shutil.rmtree(folder, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically (Linux ``renameat2``); ``False`` where kernel, library or file system lack it."""
    reach("exchange", other)
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), os.fspath(other))
