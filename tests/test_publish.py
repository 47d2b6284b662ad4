"""Publishing a folder: readers find the old artefact or the new one, whatever happens in between."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from qexport.errors import UsageError
from qexport.safe_io import digest_bytes, digest_file, publish, publishing, write_bytes


def put(stage, name="data.bin", data=b"new"):
    """One file and the manifest that claims it."""
    stage.write_bytes(name, data)
    stage.write_json("manifest.json", {"schema": "qexport.manifest/1", "files": list(stage.files)})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def masked(umask: int):
    before = os.umask(umask)
    try:
        yield
    finally:
        os.umask(before)


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


@pytest.mark.parametrize("others", [(), ("deep/mine",), ("deep/er/mine",)])
def test_f02_folders_that_were_made_for_it_go_when_the_block_raises(tmp_path, others):
    def attempt():
        with publish(tmp_path / "deep/er/out") as stage:
            put(stage)
            for name in others:
                (tmp_path / name).touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        attempt()
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    expected = {part for name in others for part in (name, *map(str, Path(name).parents)) if part != "."}
    assert found == expected


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


def test_where_nothing_may_be_written_nothing_is_tried(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(publishing, "reach", lambda point, path: made.append(path))
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", "/dev/null", tmp_path):
        with pytest.raises(UsageError), publish(out):
            pytest.fail("the block must not run")
    assert made == []


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "{",
        "[]",
        "[" * 9999,
        '{"files": 3}',
        "{}",
        '{"files": ["work"]}',
        '{"schema": "npm/1", "files": {"work": 1}}',
    ],
)
def test_a_manifest_of_somebody_else_is_not_ours(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "work").write_text("x")
    with pytest.raises(UsageError), publish(tmp_path):
        pytest.fail("the block must not run")
    assert (tmp_path / "work").read_text() == "x"


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_manifest_that_is_no_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "manifest.json")
    with pytest.raises(UsageError, match="no build wrote"), publish(tmp_path):
        pytest.fail("the block must not run")


def test_a_folder_in_the_place_of_a_file_is_never_removed(tmp_path):
    out = tmp_path / "out"
    with publish(out) as stage:
        put(stage)
    (out / "data.bin").unlink()
    (out / "data.bin").mkdir()
    (out / "data.bin/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"data\.bin"), publish(out):
        pytest.fail("the block must not run")
    assert (out / "data.bin/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["/", "a\0b", "x" * 256, "loop", "file/out"])
def test_what_cannot_be_a_folder_is_refused_before_the_work(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError), publish(tmp_path / name):
        pytest.fail("the block must not run")
    assert set(os.listdir(tmp_path)) == {"loop", "file"}


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


def test_what_comes_back_is_looked_at_as_what_was_there(tmp_path):
    moved = tmp_path / ".out.old-0123456789abcdef"
    moved.mkdir()
    (moved / "thesis").write_text("years")
    with pytest.raises(UsageError, match="no build wrote: 'thesis'"), publish(tmp_path / "out") as stage:
        put(stage)
    assert (tmp_path / "out/thesis").read_text() == "years"


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
            told = {"schema": "qexport.manifest/1", "files": sorted(stage.files), "note": "c" * 3000}
            stage.write_json("manifest.json", told)
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


def test_a_name_as_long_as_the_file_system_allows_works(tmp_path):
    with publish(tmp_path / ("y" * 255)) as stage:
        put(stage)
    assert os.listdir(tmp_path) == ["y" * 255]
