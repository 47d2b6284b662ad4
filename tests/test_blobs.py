"""The cache of a hub, whose files are links: followed to the blob of the right content, and nowhere else."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
from pathlib import Path

import pytest

from qexport.errors import IntegrityError, ModelInvalid, UnsafeInput
from qexport.safe_io import check_blob, demand_inside, open_companion

CONTENT = b"weights" * 100


@pytest.fixture
def snapshot(tmp_path) -> Path:
    """The folder of a revision, with a file of its own; ``blobs`` are beside ``snapshots``."""
    folder = tmp_path / "models--a--b/snapshots/0123abcd"
    folder.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").mkdir()
    (folder / "plain").write_bytes(b"plain")
    return folder


def git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def blob(snapshot: Path, content: bytes = CONTENT, name: str = "") -> Path:
    path = snapshot.parents[1] / "blobs" / (name or hashlib.sha256(content).hexdigest())
    path.write_bytes(content)
    return path


def link(snapshot: Path, target: Path | str) -> str:
    (snapshot / "w.bin").symlink_to(os.path.relpath(target, snapshot))
    return "w.bin"


def read(snapshot: Path, name: str) -> bytes:
    with open_companion(snapshot, name) as file:
        return file.read()


@pytest.mark.parametrize("name", [hashlib.sha256(CONTENT).hexdigest(), git(CONTENT)], ids=["sha256", "git"])
def test_a_link_to_a_blob_of_its_name_is_followed_as_often_as_it_is_read(snapshot, name):
    companion = link(snapshot, blob(snapshot, CONTENT, name))
    assert [read(snapshot, companion) for _ in range(2)] == [CONTENT] * 2
    check_blob(snapshot / companion)


def test_what_is_no_link_is_opened_as_everywhere(snapshot):
    assert read(snapshot, "plain") == b"plain"
    with pytest.raises(ModelInvalid):
        open_companion(snapshot, "absent")


@pytest.mark.parametrize("name", [hashlib.sha256(b"other").hexdigest(), git(b"other")], ids=["sha256", "git"])
def test_a_blob_of_another_content_is_refused_before_a_byte_of_it_is_handed_out(snapshot, name):
    companion = link(snapshot, blob(snapshot, CONTENT, name))
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(IntegrityError, match=name):
        open_companion(snapshot, companion)
    assert len(os.listdir("/proc/self/fd")) <= before
    with pytest.raises(IntegrityError, match=name):
        check_blob(snapshot / companion)


def test_a_blob_that_changes_after_it_was_found_right_is_looked_at_again(snapshot):
    path = blob(snapshot)
    companion = link(snapshot, path)
    assert read(snapshot, companion) == CONTENT
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(IntegrityError):
        open_companion(snapshot, companion)


def outside(snapshot: Path) -> Path:
    path = snapshot.parents[2] / hashlib.sha256(CONTENT).hexdigest()
    path.write_bytes(CONTENT)
    return path


def linked_blob(snapshot: Path) -> Path:
    path = snapshot.parents[1] / "blobs" / hashlib.sha256(CONTENT).hexdigest()
    path.symlink_to(outside(snapshot))
    return path


def linked_blobs(snapshot: Path) -> Path:
    path = outside(snapshot)
    (snapshot.parents[1] / "blobs").rmdir()
    (snapshot.parents[1] / "blobs").symlink_to(path.parent)
    return snapshot.parents[1] / "blobs" / path.name


def with_a_second_name(snapshot: Path) -> Path:
    path = blob(snapshot)
    (snapshot.parents[2] / "second").hardlink_to(path)
    return path


def of_no_digest(snapshot: Path) -> Path:
    return blob(snapshot, CONTENT, "secret")


@pytest.mark.parametrize("target", [outside, linked_blob, linked_blobs, with_a_second_name, of_no_digest])
def test_no_other_link_is_followed(snapshot, target):
    companion = link(snapshot, target(snapshot))
    with pytest.raises(UnsafeInput):
        open_companion(snapshot, companion)


def test_a_link_that_is_swapped_for_a_file_while_it_is_read_is_refused(snapshot, monkeypatch):
    companion = link(snapshot, blob(snapshot))

    def readlink(path, **_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)  # as of what is no link any more

    monkeypatch.setattr(os, "readlink", readlink)
    for look in (
        lambda: open_companion(snapshot, companion),
        lambda: check_blob(snapshot / companion),
        lambda: demand_inside(snapshot / companion, snapshot),
    ):
        with pytest.raises(UnsafeInput, match="changes while it is read"):
            look()


def test_links_are_followed_in_such_a_cache_alone(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "blobs").mkdir()
    target = tmp_path / "blobs" / hashlib.sha256(CONTENT).hexdigest()
    target.write_bytes(CONTENT)
    with pytest.raises(UnsafeInput, match="symbolic link"):
        open_companion(folder, link(folder, target))
