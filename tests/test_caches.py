"""The cache: believed where it is sound and ours, passed over where it is not, never in the way."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import Busy, IntegrityError, UnsafeInput
from qexport.safe_io import Cache, caches
from qexport.safe_io.caches import KINDS

DATA = b"measured" * 100
ROOT = os.geteuid() == 0
ANYBODY = 65534


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@contextmanager
def powerless():
    """Root may do everything: be somebody else for a while."""
    if ROOT:
        os.seteuid(ANYBODY)
    try:
        yield
    finally:
        if ROOT:
            os.seteuid(0)


def entry_in(cache, key="0a"):
    entry = cache.entry("statistics", key)
    assert entry.write(DATA)
    return entry


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["0a", "f" * 64, "0a/recipe", "a.b_c-d"])
def test_what_is_kept_comes_back(cache, kind, key):
    entry = cache.entry(kind, key)
    assert entry.read() is None
    assert entry.write(b"first")
    assert entry.write(DATA)
    assert entry.read() == DATA == Cache(cache.folder).entry(kind, key).read()
    assert [(kept.kind, kept.key, kept.path, kept.problem) for kept in cache.verify()] == [(kind, key, entry.path, "")]
    assert cache.doubts == []


def test_a_file_says_what_it_is_and_anybody_can_check_it(cache):
    line, rest = entry_in(cache).path.read_bytes().split(b"\n", 1)
    assert line == b"qexport-cache/1 statistics/0a"
    assert rest == hashlib.sha256(line + b"\n" + DATA).digest() + DATA


def test_a_cache_without_a_folder_keeps_nothing():
    cache = Cache()
    entry = cache.entry("builds", "0a")
    with cache.hold("builds", "0a"):
        assert not entry.write(DATA)
    assert entry.read() is None
    assert (entry.path, cache.entries(), cache.prune(0), cache.doubts) == (None, (), (), [])


@pytest.mark.parametrize("name", ["../x", "a/b/c", "A", "", ".hidden", "a/", "a/.b", "x" * 129, "a\n"])
def test_a_key_cannot_lead_anywhere_else(cache, name):
    with pytest.raises(ValueError, match="no entry is called"):
        cache.entry("statistics", name)


def test_only_its_owner_can_look_into_what_is_made(cache):
    before = os.umask(0)
    try:
        entry_in(cache, "0a/b")
    finally:
        os.umask(before)
    for path in (cache.folder, *cache.folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


# ---------------------------------------------------------------- K01: damage


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 255))
def test_k01_one_damaged_byte_anywhere_is_noticed(tmp_path_factory, place, damage):
    entry = entry_in(Cache(tmp_path_factory.getbasetemp() / "damage"))
    sound = entry.path.read_bytes()
    place %= len(sound)
    entry.path.write_bytes(sound[:place] + bytes([sound[place] ^ damage]) + sound[place + 1 :])
    assert entry.read() is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda sound: sound[:-1], "damaged"),
        (lambda sound: sound + b"x", "damaged"),
        (lambda sound: sound[:50], "damaged"),
        (lambda sound: b"", "damaged"),
        (lambda sound: b"\x89PNG", "an earlier version"),
        (lambda sound: sound.replace(b"/1 ", b"/0 ", 1), "another version"),
        (lambda sound: sound.replace(b"/0a", b"/0b", 1), "another key"),
        (lambda sound: sound.replace(b"statistics", b"builds", 1), "another key"),
    ],
)
def test_k01_what_is_unsound_is_told_and_computed_again(cache, change, says):
    entry = entry_in(cache)
    entry.path.write_bytes(change(entry.path.read_bytes()))
    assert entry.read() is None
    assert entry.read() is None
    (doubt,) = cache.doubts
    assert str(entry.path) in doubt
    assert says in doubt
    assert [says in kept.problem for kept in cache.verify()] == [True]
    with pytest.raises(IntegrityError, match=says):
        Cache(cache.folder, strict=True).entry("statistics", "0a").read()
    assert entry.write(DATA)
    assert entry.read() == DATA


# ---------------------------------------------------------------- K03: others


TRAPS = {
    "link": lambda path, other: path.symlink_to(other),
    "hard link": lambda path, other: path.hardlink_to(other),
    "fifo": lambda path, other: os.mkfifo(path),
    "folder": lambda path, other: path.mkdir(),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_k03_an_entry_that_is_no_plain_file_is_refused_without_waiting(cache, tmp_path, trap):
    entry = entry_in(cache)
    os.rename(entry.path, tmp_path / "elsewhere")
    TRAPS[trap](entry.path, tmp_path / "elsewhere")
    with pytest.raises(UnsafeInput):
        entry.read()


@pytest.mark.parametrize("inner", ["", "statistics", "statistics/0a"])
def test_k03_a_folder_that_is_a_link_is_refused(cache, tmp_path, inner):
    entry = entry_in(cache, "0a/b")
    os.rename(cache.folder / inner, tmp_path / "elsewhere")
    (cache.folder / inner).symlink_to(tmp_path / "elsewhere")
    for attempt in (entry.read, lambda: entry.write(b"new")):
        with pytest.raises(UnsafeInput, match="a link or a file"):
            attempt()
    with pytest.raises(UnsafeInput), cache.hold("statistics", "0a"):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
@pytest.mark.parametrize("inner", ["", "statistics", "statistics/0a", "statistics/0a/b"])
def test_k03_what_others_can_write_is_refused(cache, inner, mode):
    entry = entry_in(cache, "0a/b")
    (cache.folder / inner).chmod(mode)
    with pytest.raises(UnsafeInput, match="others can write"):
        entry.read()
    if not inner.endswith("b"):
        with pytest.raises(UnsafeInput, match="others can write"):
            entry.write(b"new")
        with pytest.raises(UnsafeInput, match="others can write"):
            cache.entries()


@pytest.mark.skipif(not ROOT, reason="only root can give files away")
@pytest.mark.parametrize("inner", ["", "statistics", "statistics/0a", "statistics/0a/b"])
def test_k03_what_belongs_to_somebody_else_is_refused(cache, inner):
    entry = entry_in(cache, "0a/b")
    os.chown(cache.folder / inner, ANYBODY, ANYBODY)
    with pytest.raises(UnsafeInput, match="another user"):
        entry.read()


@pytest.mark.skipif(not ROOT, reason="needs two users")
def test_what_root_has_kept_for_all_is_read_and_not_written(open_folder):
    cache = Cache(open_folder / "cache")
    entry = entry_in(cache)
    for path in (cache.folder, *cache.folder.rglob("*")):
        path.chmod(0o755)
    with powerless():
        assert entry.read() == DATA
        assert not entry.write(b"new")
    assert "nothing was kept" in cache.doubts[0]
    assert entry.read() == DATA


@pytest.fixture
def open_folder():
    """A folder that everybody may enter, unlike those of pytest."""
    folder = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    subprocess.run(["rm", "-r", str(folder)], check=True)


# ---------------------------------------------------------------- K06, K07: locks and room


def test_k06_a_folder_that_cannot_be_written_is_a_doubt_and_nothing_more(open_folder):
    (open_folder / "cache").mkdir(mode=0o555)
    if ROOT:
        os.chown(open_folder / "cache", ANYBODY, ANYBODY)
    open_folder.chmod(0o555)
    for folder in (open_folder / "cache", open_folder / "absent/cache"):
        cache = Cache(folder)
        with powerless(), cache.hold("builds", "0a"):
            assert not cache.entry("statistics", "0a").write(DATA)
            assert cache.entry("statistics", "0a").read() is None
        assert any("permission denied" in doubt for doubt in cache.doubts)


HOLD = """
    import sys, time
    from pathlib import Path
    from qexport.safe_io import Cache
    with Cache(Path(sys.argv[1])).hold("builds", "0a"):
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def holder(cache):
    """Another process that holds a folder."""
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(cache.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_k06_who_waits_too_long_is_told_so(cache, holder):
    waits = []
    says = r"builds/0a: another process holds the lock, for more than 0\.2 s"
    with pytest.raises(Busy, match=says), cache.hold("builds", "0a", 0.2, lambda: waits.append(1)):
        pytest.fail("the block must not run")
    assert waits == [1]
    with cache.hold("builds", "0b", 0.2):
        pass


def test_k05_when_the_holder_is_killed_the_next_one_goes_on(cache, holder):
    holder.send_signal(signal.SIGKILL)
    begun = time.monotonic()
    with cache.hold("builds", "0a", 10):
        assert time.monotonic() - begun < 2


def test_a_folder_that_was_removed_while_somebody_waited_for_it_is_made_anew(cache, monkeypatch):
    locked = []

    def lock(fd, where, *rest):
        locked.append(where)
        if len(locked) == 1:
            os.rmdir(where)
        return True

    monkeypatch.setattr(caches, "lock", lock)
    with cache.hold("builds", "0a"):
        assert (cache.folder / "builds/0a").is_dir()
    assert len(locked) == 2


def test_k06_a_file_system_without_locks_is_a_doubt(cache, monkeypatch):
    def flock(fd, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with cache.hold("builds", "0a"):
        assert cache.entry("builds", "0a/b").write(DATA)
    assert cache.entry("builds", "0a/b").read() == DATA
    assert any("has no locks" in doubt for doubt in cache.doubts)


def test_what_is_held_is_not_pruned(cache):
    entry = cache.entry("builds", "0a/b")
    entry.write(DATA)
    with cache.hold("builds", "0a"):
        assert cache.prune(0) == ()
    assert [kept.key for kept in cache.prune(0)] == ["0a/b"]
    assert not entry.path.parent.exists()


def test_k07_the_least_recent_go_when_there_is_no_room(tmp_path):
    cache = Cache(tmp_path / "cache", limit=3 * (len(DATA) + 100))
    for number, key in enumerate(("0a", "0b", "0c")):
        os.utime(entry_in(cache, key).path, (number, number))
    assert cache.entry("statistics", "0a").read() == DATA  # used: no longer the oldest
    entry_in(cache, "0d")
    assert {kept.key for kept in cache.entries()} == {"0a", "0c", "0d"}
    assert sum(kept.bytes for kept in cache.entries()) <= cache.limit


def test_k07_what_is_larger_than_the_cache_is_not_kept(tmp_path):
    cache = Cache(tmp_path / "cache", limit=len(DATA))
    assert not cache.entry("statistics", "0a").write(DATA)
    assert cache.entries() == ()
    assert "too many for the cache" in cache.doubts[0]


FULL = """
    import resource, sys
    from pathlib import Path
    from qexport.safe_io import Cache
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    cache = Cache(Path(sys.argv[1]))
    print(cache.entry("statistics", "0a").write(b"x" * 1000), cache.doubts)
"""


def test_k07_a_disk_that_is_full_leaves_no_entry(cache):
    command = [sys.executable, "-c", textwrap.dedent(FULL), str(cache.folder)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.startswith("False ['nothing was kept in the cache: ")
    assert cache.entries() == ()
    assert not list((cache.folder / "statistics").iterdir())


# ---------------------------------------------------------------- pruning


def test_strangers_links_and_folders_are_never_removed(cache, tmp_path):
    entry = entry_in(cache)
    (tmp_path / "precious").write_bytes(b"x")
    (cache.folder / "notes.txt").write_text("mine")
    (cache.folder / "statistics/Notes").write_text("mine")
    (cache.folder / "statistics/0b").symlink_to(tmp_path / "precious")
    (cache.folder / "statistics/0c").mkdir()
    assert [kept.key for kept in cache.prune(0)] == ["0a"]
    left = {str(path.relative_to(cache.folder)) for path in cache.folder.rglob("*")}
    assert left == {"notes.txt", "statistics", "statistics/Notes", "statistics/0b", "statistics/0c"}
    assert not entry.path.exists()


def test_files_of_earlier_versions_and_of_killed_processes_are_removed(cache):
    entry = entry_in(cache)
    (cache.folder / f"{'0' * 64}.statistics").write_bytes(b"x")
    (cache.folder / "statistics/.0a.tmp-0123456789abcdef").write_bytes(b"x")
    problems = [kept.problem for kept in cache.entries()]
    assert sorted(problems) == ["", "a process left it that was ended", "an earlier version wrote it"]
    assert len(cache.prune()) == 2
    assert [kept.path for kept in cache.entries()] == [entry.path]


def test_what_was_not_used_for_long_is_removed_on_request(cache):
    for key, age in (("0a", 100), ("0b", 1000)):
        then = time.time() - age
        os.utime(entry_in(cache, key).path, (then, then))
    assert [kept.key for kept in cache.prune(older_than=500)] == ["0b"]
