"""The cache of Hugging Face, whose files are links: ``snapshots/REVISION/FILE`` to ``blobs/DIGEST`` of their content.

Such a link is followed where every other one is refused, because its name says what has to be found behind it.
"""

from __future__ import annotations

import hashlib
import os
import re
from io import BufferedReader
from pathlib import Path

from qexport.errors import IntegrityError, UnsafeInput
from qexport.safe_io.reading import open_beneath, open_file, safe_parts

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_GIT_LENGTH = 40
_BLOBS = "blobs"

_found: set[tuple[str, int, int, int, int]] = (
    set()
)  # which files had the content of their name, as long as they are the same


def open_companion(root: Path, relative: str) -> BufferedReader:
    """Open the file ``relative`` below ``root`` as ``open_beneath``, or the blob that it is a link to in such a cache.

    The blob is opened without following any further link, and read whole once, before it is handed out.

    Raises:
        UnsafeInput: As ``open_beneath``: any other link.
        ModelInvalid: There is no such file.
        IntegrityError: The blob has not the content that it is named by.
        ResourceExhausted: It cannot be read.
    """
    file = root.joinpath(*safe_parts(relative))
    real = _real(file)
    name = real.name
    home = next((blobs for blobs in _blobs(root) if file.is_symlink() and real == blobs / name), None)
    if home is None or not _DIGEST.fullmatch(name):
        return open_beneath(root, relative)
    stream = open_beneath(home.parent, f"{_BLOBS}/{name}")
    try:
        _demand_content(stream, name, str(file))
    except BaseException:
        stream.close()
        raise
    return stream


def demand_inside(file: Path, folder: Path) -> None:
    """Raise ``UnsafeInput`` when a file, its links followed, is neither in the folder nor in its cache's ``blobs``.

    A folder from elsewhere could otherwise make its companions links to private files, and they are copied to the
    artefact.
    """
    if "\0" in str(file):
        raise UnsafeInput("not the name of a file", where=str(file))
    root, real = _real(folder), _real(file)
    if not any(place in real.parents for place in (root, *_blobs(root))):
        hint = "copy the folder with its links resolved (cp -rL) and use the copy"
        raise UnsafeInput("leads out of its folder", where=str(file), hint=hint)


def check_blob(file: Path, digest: str | None = None) -> None:
    """Raise ``IntegrityError`` when a link into a cache that names files by their content finds another content.

    ``digest`` is that of the file, where it is known.
    """
    name = _real(file).name
    if not file.is_symlink() or not _DIGEST.fullmatch(name):
        return
    if digest is None or len(name) == _GIT_LENGTH:
        with open_file(file) as stream:
            digest = _content_name(stream, name)
    if digest.removeprefix("sha256:") != name:
        raise _damaged(name, str(file))


def _real(path: Path) -> Path:
    """Where a path leads; ``UnsafeInput`` where a link is swapped for a file while it is read."""
    try:
        return Path(os.path.realpath(path))
    except OSError as error:
        raise UnsafeInput("a link that changes while it is read", where=str(path)) from error


def _blobs(folder: Path) -> list[Path]:
    """Where files of the folder may lie in such a cache: for every snapshot that it is in, the blobs beside it."""
    root = _real(folder)
    return [above.parent.parent / _BLOBS for above in (root, *root.parents) if above.parent.name == "snapshots"]


def _demand_content(stream: BufferedReader, name: str, where: str) -> None:
    """Read an open blob, unless that was done, and go back to its start."""
    status = os.fstat(stream.fileno())
    state = (name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if state in _found:
        return
    if _content_name(stream, name) != name:
        raise _damaged(name, where)
    stream.seek(0)
    _found.add(state)


def _content_name(stream: BufferedReader, like: str) -> str:
    """What the cache calls such a content: its SHA-256, or for small files what git does."""
    if len(like) != _GIT_LENGTH:
        return hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha1(b"blob %d\0" % os.fstat(stream.fileno()).st_size, usedforsecurity=False)
    for piece in iter(lambda: stream.read(1 << 20), b""):
        digest.update(piece)
    return digest.hexdigest()


def _damaged(name: str, where: str) -> IntegrityError:
    hint = "the download was damaged; remove it from the cache and fetch it again"
    return IntegrityError(
        f"the content does not have the digest {name} that the cache names it by", where=where, hint=hint
    )
