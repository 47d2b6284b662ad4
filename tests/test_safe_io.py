"""Files and folders: read without following the model's links, written so that nobody sees a part."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from qexport.errors import ModelInvalid, QexportError, ResourceExhausted, UnsafeInput, UsageError
from qexport.safe_io import (
    digest_bytes,
    digest_file,
    open_beneath,
    publish,
    publishing,
    read_bytes,
    read_text,
    write_bytes,
    write_json,
    write_text,
)


def put(stage, name="data.bin", data=b"new"):
    """One file and the manifest that claims it."""
    stage.write_bytes(name, data)
    stage.write_json("manifest.json", {"files": list(stage.files)})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def masked(umask: int):
    before = os.umask(umask)
    try:
        yield
    finally:
        os.umask(before)


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
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UnsafeInput):
        open_beneath(root, relative)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("relative", ["absent", "sub/absent", "absent/x", "x" * 300])
def test_a_missing_file_makes_the_model_invalid(root, relative):
    with pytest.raises(ModelInvalid, match="does not exist"):
        open_beneath(root, relative)


def test_a_name_in_the_wrong_case_is_pointed_out(root):
    with pytest.raises(ModelInvalid, match="there is 'plain': names are case-sensitive"):
        open_beneath(root, "Plain")


def test_a_file_that_is_swapped_for_a_link_never_leads_out(root):
    """One thread swaps a file and a link to the secret; readers see the file or an error, never the secret."""
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            publishing.exchange(root / "plain", root / "link")

    thread = threading.Thread(target=swap)
    thread.start()
    seen = set()
    try:
        for _ in range(3000):
            try:
                with open_beneath(root, "plain") as file:
                    seen.add(file.read())
            except UnsafeInput:
                seen.add("refused")
    finally:
        stop.set()
        thread.join()
    assert seen == {b"plain", "refused"}


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
    with publish(tmp_path / ("y" * 255)) as stage:
        put(stage)
    assert {path.name[0] for path in tmp_path.iterdir()} == {"x", "y"}


def test_f02_a_full_device_is_reported_and_stays_a_device():
    with pytest.raises(ResourceExhausted, match="no space"):
        write_bytes("/dev/full", b"data")
    assert Path("/dev/full").is_char_device()
    write_bytes("/dev/null", b"data")
    assert Path("/dev/null").is_char_device()


# ---------------------------------------------------------------- publishing


def test_a_new_folder_appears_whole_with_digests(tmp_path):
    with publish(tmp_path / "deep" / "out") as stage:
        put(stage)
        assert not (tmp_path / "deep" / "out").exists()
        assert stage.files["data.bin"] == (3, digest_bytes(b"new"))
    assert set(content(tmp_path / "deep" / "out")) == {"data.bin", "manifest.json"}
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_an_old_artefact_is_replaced_in_one_step(tmp_path):
    with publish(tmp_path / "out") as stage:
        put(stage, "old.bin", b"old")
    opened = os.open(tmp_path / "out", os.O_RDONLY)
    with publish(tmp_path / "out") as stage:
        put(stage)
        assert "old.bin" in content(tmp_path / "out")
    os.close(opened)
    assert set(content(tmp_path / "out")) == {"data.bin", "manifest.json"}
    assert os.listdir(tmp_path) == ["out"]


def test_without_the_exchange_call_two_renames_do_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "exchange", lambda one, other: False)
    for data in (b"1", b"2"):
        with publish(tmp_path / "out") as stage:
            put(stage, data=data)
    assert content(tmp_path / "out")["data.bin"] == b"2"
    assert os.listdir(tmp_path) == ["out"]


def test_readers_never_see_a_missing_or_mixed_folder(tmp_path):
    """While two writers publish in turn, every look finds one complete version."""
    with publish(tmp_path / "out") as stage:
        put(stage, data=b"0")
    stop = threading.Event()
    problems = []

    def watch():
        while not stop.is_set():
            try:
                folder = os.open(tmp_path / "out", os.O_RDONLY)
                names = set(os.listdir(folder))
                os.close(folder)
            except OSError as error:
                problems.append(error)
                continue
            if names not in ({"data.bin", "manifest.json"}, set()):  # empty: the old one while it is removed
                problems.append(names)

    thread = threading.Thread(target=watch)
    thread.start()
    for number in range(100):
        with publish(tmp_path / "out") as stage:
            put(stage, data=b"%d" % number)
    stop.set()
    thread.join()
    assert not [p for p in problems if not isinstance(p, set)]
    assert not [p for p in problems if p not in ({"data.bin"}, {"manifest.json"})]


def failing_build(out: Path, error: type[BaseException]):
    def attempt():
        with publish(out) as stage:
            put(stage)
            raise error

    return attempt


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_when_the_block_raises_the_old_artefact_stays(tmp_path, error):
    with publish(tmp_path / "out") as stage:
        put(stage, data=b"old")
    before = content(tmp_path / "out")
    attempt = failing_build(tmp_path / "out", error)
    with pytest.raises(error):
        attempt()
    assert content(tmp_path / "out") == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\0b", "twice"])
def test_a_staged_name_is_a_new_plain_name(tmp_path, name):
    with publish(tmp_path / "out") as stage:
        stage.write_text("twice", "x")
        with pytest.raises(UsageError, match="not a new file name"):
            stage.write_text(name, "y")
    assert content(tmp_path / "out") == {"twice": b"x"}


def test_a_file_is_copied_into_the_stage(tmp_path):
    (tmp_path / "source").write_bytes(b"x" * 3_000_000)
    with publish(tmp_path / "out") as stage:
        stage.copy(tmp_path / "source", "copy")
    assert stage.files["copy"] == (3_000_000, digest_file(tmp_path / "source"))


def test_a_folder_that_no_build_wrote_is_never_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"files that no build wrote: .thesis\.tex"), publish(out):
        pytest.fail("the block must not run")
    assert set(content(out)) == {"thesis.tex"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_strange_file_in_an_artefact_is_never_removed(tmp_path):
    out = tmp_path / "out"
    with publish(out) as stage:
        put(stage)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"), publish(out):
        pytest.fail("the block must not run")
    (out / "notes.txt").unlink()
    with publish(out) as stage:
        put(stage)


@pytest.mark.parametrize("manifest", ["", "{", "[]", '{"files": 3}', "{}"])
def test_a_manifest_of_somebody_else_is_not_ours(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "work").write_text("x")
    with pytest.raises(UsageError), publish(tmp_path):
        pytest.fail("the block must not run")


def test_f02_the_output_must_be_a_folder_that_holds_no_input(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"), publish(tmp_path / "file"):
        pytest.fail("the block must not run")
    with publish(tmp_path / "out") as stage:
        put(stage)
    before = content(tmp_path / "out")
    for source in (tmp_path / "out" / "data.bin", tmp_path / "out"):
        with pytest.raises(UsageError, match="holds the input"), publish(tmp_path / "out", inputs=[source]):
            pytest.fail("the block must not run")
    assert content(tmp_path / "out") == before
    with pytest.raises(UsageError, match="mount point"), publish("/proc"):
        pytest.fail("the block must not run")


def test_a_link_to_the_output_folder_stays_a_link(tmp_path):
    with publish(tmp_path / "real") as stage:
        put(stage, data=b"old")
    (tmp_path / "link").symlink_to("real")
    with publish(tmp_path / "link") as stage:
        put(stage)
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real")["data.bin"] == b"new"


def test_the_stage_of_a_living_process_is_left_alone(tmp_path):
    with publish(tmp_path / "out") as first:
        put(first, data=b"first")
        with publish(tmp_path / "out") as second:
            put(second, data=b"second")
        assert first.path.exists()
    assert content(tmp_path / "out")["data.bin"] == b"first"


def test_what_a_killed_process_left_is_collected_the_next_time(tmp_path):
    with publish(tmp_path / "out") as stage:
        put(stage, data=b"old")
    script = """
        import os, signal, sys
        from qexport.safe_io import publish
        with publish(sys.argv[1]) as stage:
            stage.write_text("part", "x")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run(script, tmp_path / "out").returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    assert content(tmp_path / "out")["data.bin"] == b"old"
    (tmp_path / ".other.stage-0123456789abcdef").mkdir()  # of another artefact: not ours to remove
    with publish(tmp_path / "out") as stage:
        put(stage)
    assert sorted(os.listdir(tmp_path)) == [".other.stage-0123456789abcdef", "out"]


def test_a_folder_that_was_moved_away_and_never_replaced_comes_back(tmp_path):
    with publish(tmp_path / "out") as stage:
        put(stage, data=b"old")
    os.rename(tmp_path / "out", tmp_path / ".out.old-0123456789abcdef")
    with pytest.raises(RuntimeError):
        failing_build(tmp_path / "out", RuntimeError)()
    assert content(tmp_path / "out")["data.bin"] == b"old"
    assert os.listdir(tmp_path) == ["out"]


# ---------------------------------------------------------------- F01, F02, F10


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


FILL = """
    import resource, sys
    from qexport.errors import QexportError
    from qexport.safe_io import publish, write_bytes
    out, file, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    code = 0
    try:
        with publish(out) as stage:
            stage.write_bytes("first", b"a" * 1000)
            with stage.create("second") as sink:
                for _ in range(20):
                    sink.write(b"b" * 100)
            stage.copy(__import__("os").path.join(out, "first"), "third")
            stage.write_json("manifest.json", {"files": sorted(stage.files), "note": "c" * 3000})
    except QexportError as error:
        code = error.exit_code
    try:
        write_bytes(file, b"d" * 2500)
    except QexportError as error:
        code = error.exit_code
    sys.exit(code)
"""


@pytest.mark.parametrize("limit", [0, 1, 999, 1000, 1001, 1999, 2000, 2499, 2500, 3000, 10_000])
def test_f01_no_space_at_any_write_leaves_the_old_files(tmp_path, limit):
    """A size limit stands for a full disk; it strikes every write in turn as it grows."""
    with publish(tmp_path / "out") as stage:
        put(stage, "first", b"old" * 300)
    write_bytes(tmp_path / "file", b"old")
    before = content(tmp_path / "out")
    result = run(FILL, tmp_path / "out", tmp_path / "file", limit)
    enough = limit == 10_000
    assert (result.returncode, result.stderr) == (0 if enough else 9, "")
    assert (content(tmp_path / "out") != before) == enough
    assert (tmp_path / "file").read_bytes() == (b"d" * 2500 if limit >= 2500 else b"old")
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


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


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_f10_modes_follow_the_umask(tmp_path, umask, file, folder):
    (tmp_path / "private").write_bytes(b"x")
    (tmp_path / "private").chmod(0o600)
    with masked(umask):
        write_bytes(tmp_path / "file", b"x")
        write_bytes(tmp_path / "file", b"again")
        with publish(tmp_path / "out") as stage:
            put(stage)
            stage.copy(tmp_path / "private", "copy")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {"data.bin": file, "manifest.json": file, "copy": file}
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == file
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == folder


def test_every_refusal_is_one_of_ours(tmp_path):
    for call in (read_bytes, read_text, digest_file):
        with pytest.raises(QexportError):
            call(tmp_path / "absent")
