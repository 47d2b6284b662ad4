"""Files and folders: read without following the model's links, written so that nobody sees a part."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from qexport.errors import Busy, ModelInvalid, QexportError, ResourceExhausted, UnsafeInput, UsageError
from qexport.safe_io import (
    digest_bytes,
    digest_file,
    locking,
    open_beneath,
    publish,
    publishing,
    read_bytes,
    read_text,
    replace_file,
    write_bytes,
    write_json,
    write_text,
    writing,
)
from qexport.safe_io.locking import locked_folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- reading


def test_a_file_is_read_whole(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert read_bytes(tmp_path / "a") == b"abc"
    assert read_text(tmp_path / "a") == "abc"


def test_the_digest_of_a_file_is_the_digest_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert digest_file(tmp_path / "a") == digest_bytes(b"abc")
    assert digest_bytes(b"abc") == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_file_over_the_limit_is_refused_with_both_numbers(tmp_path):
    (tmp_path / "a").write_bytes(b"abcd")
    assert read_bytes(tmp_path / "a", limit=4) == b"abcd"
    with pytest.raises(ResourceExhausted, match="4 bytes, the limit is 3"):
        read_bytes(tmp_path / "a", limit=3)


def test_a_file_that_tells_no_size_is_read_up_to_the_limit():
    assert os.stat("/proc/self/status").st_size == 0
    assert read_bytes("/proc/self/status", limit=1 << 20).startswith(b"Name:")
    with pytest.raises(ResourceExhausted, match="more than 10 bytes"):
        read_bytes("/proc/self/status", limit=10)


def test_text_that_is_not_utf8_is_a_usage_error_with_the_offset(tmp_path):
    (tmp_path / "a").write_bytes(b"ab\xff")
    with pytest.raises(UsageError, match="offset 2"):
        read_text(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "error"), [("missing", UsageError), ("folder", UsageError), ("fifo", UnsafeInput), ("file/x", UsageError)]
)
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path, name, error):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(error):
        read_bytes(tmp_path / name)


def test_a_link_that_a_person_named_is_followed(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("a")
    assert read_bytes(tmp_path / "link") == b"abc"


# ---------------------------------------------------------------- open_beneath


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with every kind of entry, and a secret beside it."""
    (tmp_path / "secret").write_bytes(b"secret")
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (folder / "plain").write_bytes(b"plain")
    (folder / "sub" / "inner").write_bytes(b"inner")
    (folder / "link").symlink_to("../secret")
    (folder / "inside").symlink_to("plain")
    (folder / "parent").symlink_to("..")
    (folder / "hard").hardlink_to(tmp_path / "secret")
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(folder)
        server.bind("socket")
        os.chdir(here)
    return folder


def test_a_plain_file_below_the_root_is_opened(root):
    with open_beneath(root, "plain") as file:
        assert file.read() == b"plain"
    with open_beneath(root, "./sub//inner") as file:
        assert file.read() == b"inner"


@pytest.mark.parametrize(
    "relative",
    [
        "../secret",
        "sub/../../secret",
        "sub/../plain",
        "..",
        "..\\secret",
        "\\secret",
        "C:secret",
        "/etc/hostname",
        "link",
        "inside",
        "parent/secret",
        "hard",
        "fifo",
        "socket",
        "sub",
        "plain/x",
        "",
        ".",
        "a\0b",
    ],
)
def test_nothing_else_is_opened(root, relative):
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UnsafeInput):
        open_beneath(root, relative)
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("relative", ["absent", "sub/absent", "absent/x", "x" * 300])
def test_a_missing_file_makes_the_model_invalid(root, relative):
    with pytest.raises(ModelInvalid, match="does not exist"):
        open_beneath(root, relative)


def test_a_name_in_the_wrong_case_is_pointed_out(root):
    with pytest.raises(ModelInvalid, match="there is 'plain': names are case-sensitive"):
        open_beneath(root, "Plain")


@pytest.mark.parametrize("trap", ["lone", "hard", "fifo"])
def test_a_file_that_is_swapped_for_a_trap_at_the_last_moment_is_refused(root, trap, monkeypatch):
    """The exchange happens between the look at the file and its opening, where a race would have to hit."""
    (root.parent / "alone").write_bytes(b"secret")
    (root / "lone").symlink_to("../alone")
    real = os.open

    def swap_and_open(path, *args, **kwargs):
        if path == "plain":
            publishing.exchange(root / "plain", root / trap)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", swap_and_open)
    with pytest.raises(UnsafeInput):
        open_beneath(root, "plain")


# ---------------------------------------------------------------- one file


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    write_bytes(tmp_path / "a", b"old")
    write_text(tmp_path / "a", "nü")
    write_json(tmp_path / "b", {"x": [1, "ü"]})
    assert set(content(tmp_path)) == {"a", "b"}
    assert (tmp_path / "a").read_text("utf-8") == "nü"
    assert json.loads((tmp_path / "b").read_bytes()) == {"x": [1, "ü"]}


def test_json_never_holds_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a", float("nan"))
    assert not content(tmp_path)


def test_json_holds_names_that_are_no_text_and_gives_them_back(tmp_path):
    name = os.fsdecode(b"caf\xc3\xa9 \xff\xfe\\")
    write_json(tmp_path / "a", {name: name})
    assert json.loads((tmp_path / "a").read_bytes()) == {name: name}
    assert "é" in (tmp_path / "a").read_text("utf-8")


def test_readers_keep_the_file_they_opened_and_links_are_followed(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "link").symlink_to("a")
    with (tmp_path / "a").open("rb") as reader:
        write_bytes(tmp_path / "link", b"new")
        assert reader.read() == b"old"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["folder", "absent/a", "file/a", "fifo", "x" * 300])
def test_a_path_that_cannot_be_a_file_is_a_usage_error(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"kept")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError):
        write_bytes(tmp_path / name, b"new")
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_a_name_as_long_as_the_file_system_allows_works(tmp_path):
    write_bytes(tmp_path / ("x" * 255), b"new")
    assert list(content(tmp_path)) == ["x" * 255]


def test_f02_a_full_device_is_reported_and_stays_a_device():
    with pytest.raises(ResourceExhausted, match="no space"):
        write_bytes("/dev/full", b"data")
    assert Path("/dev/full").is_char_device()
    write_bytes("/dev/null", b"data")
    assert Path("/dev/null").is_char_device()


@pytest.fixture
def open_folder():
    """A folder that everybody may enter, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def powerless():
    """Root may do everything: be somebody else for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_f02_an_output_folder_without_permission_is_resource_exhausted(open_folder):
    open_folder.chmod(0o555)
    for attempt in (lambda: write_bytes(open_folder / "new", b"x"), lambda: publish(open_folder / "out").__enter__()):
        with powerless(), pytest.raises(ResourceExhausted, match=r"permission denied .check the permissions"):
            attempt()
    assert not list(open_folder.iterdir())


def test_m17_an_unreadable_file_is_resource_exhausted(open_folder):
    (open_folder / "secret").write_bytes(b"x")
    (open_folder / "secret").chmod(0)
    for attempt in (lambda: read_bytes(open_folder / "secret"), lambda: open_beneath(open_folder, "secret")):
        with powerless(), pytest.raises(ResourceExhausted, match="permission denied"):
            attempt()


def test_every_refusal_is_one_of_ours(tmp_path):
    for call in (read_bytes, read_text, digest_file):
        with pytest.raises(QexportError):
            call(tmp_path / "absent")


def test_a_file_that_is_written_in_pieces_is_there_when_all_of_them_are(tmp_path):
    place = tmp_path / "a"
    place.write_bytes(b"old")
    with replace_file(place) as file:
        assert file.write(b"one ") == 4
        file.write(b"two")
        assert place.read_bytes() == b"old"
    assert content(tmp_path) == {"a": b"one two"}


def test_a_file_whose_pieces_fail_stays_as_it_was(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(TypeError), replace_file(tmp_path / "a") as file:
        file.writelines([b"new", None])
    assert content(tmp_path) == {"a": b"old"}


def test_pieces_go_straight_to_a_device():
    with replace_file("/dev/null") as file:
        assert file.write(b"abc") == 3


KILLED = """
    import os, signal, sys
    from qexport.safe_io import replace_file
    with replace_file(sys.argv[1]) as file:
        file.write(b"part")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_with_the_next_write_of_the_same_file(tmp_path):
    place = tmp_path / "a"
    place.write_bytes(b"old")
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(place)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert len(content(tmp_path)) == 2
    write_bytes(tmp_path / "b", b"of another file")
    assert len(content(tmp_path)) == 3
    write_bytes(place, b"new")
    assert content(tmp_path) == {"a": b"new", "b": b"of another file"}


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    with replace_file(tmp_path / "a") as first:
        first.write(b"first")
        write_bytes(tmp_path / "a", b"second")
        (tmp_path / ".a.tmp-strange").write_bytes(b"x")
    assert content(tmp_path) == {"a": b"first", ".a.tmp-strange": b"x"}


def test_a_folder_that_somebody_holds_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "PATIENCE", 0.1)
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(Busy, match=r"another process holds the lock, for more than 0\.1 s"):
        publish(tmp_path / "out").__enter__()
    os.close(holder)
    assert not content(tmp_path)
    write_bytes(tmp_path / "a", b"x")


def test_a_file_is_written_into_a_folder_that_somebody_holds(tmp_path):
    with locked_folder(tmp_path):
        began = time.monotonic()
        write_bytes(tmp_path / "engine.plan", b"plan")
    assert time.monotonic() - began < 5
    assert (tmp_path / "engine.plan").read_bytes() == b"plan"


def test_a_file_that_was_taken_for_a_dead_one_before_it_was_locked_is_made_anew(tmp_path, monkeypatch):
    made = []

    def collected(path, mode=0o666, create=writing.create):
        fd = create(path, mode)
        made.append(path)
        if len(made) == 1:
            path.unlink()
        return fd

    monkeypatch.setattr(writing, "create", collected)
    write_bytes(tmp_path / "a", b"whole")
    assert len(made) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"whole"
