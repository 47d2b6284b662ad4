"""``qexport cache``: what is listed, found damaged, and removed, and what is left alone."""

from __future__ import annotations

import json
import os
import time

import click
import pytest
from helpers import call

from qexport.cli import cli
from qexport.exporter.options import BuildOptions
from qexport.safe_io import Cache

DAY = 86400.0


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache with two sound entries, one of them last used 40 days ago, at the usual place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = Cache(tmp_path / "qexport")
    assert kept.entry("statistics", "a" * 64).write(b"x" * 5000)
    assert kept.entry("builds", f"{'b' * 64}/verify").write(b"y" * 300)
    old = time.time() - 40 * DAY
    os.utime(tmp_path / "qexport/statistics" / ("a" * 64), (old, old))
    return tmp_path / "qexport"


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() or path.is_symlink())


BOTH = [f"builds/{'b' * 64}/verify", f"statistics/{'a' * 64}"]


def test_everything_that_is_kept_is_listed_with_its_size_and_age(folder, capsys):
    code, out, _ = call(capsys, "cache", "ls")
    assert code == 0
    lines = out.splitlines()
    assert [("verify" in line, "40 d" in line) for line in lines if "bbbb" in line or "aaaa" in line] == [
        (True, False),
        (False, True),
    ]
    told = json.loads(call(capsys, "cache", "ls", "--json")[1])
    assert told["schema"] == "qexport.cache/1"
    sizes = {f"{e['kind']}/{e['key']}": e["bytes"] for e in told["entries"]}
    assert sizes == {name: (folder / name).stat().st_size for name in BOTH}
    assert told["bytes"] == sum(sizes.values())


def test_no_cache_is_an_empty_one_and_none_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for command in ("ls", "verify", "prune"):
        code, out, _ = call(capsys, "cache", command)
        assert (code, "0 files" in out) == (0, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_flipped_bit_anywhere_is_exit_code_11_and_pruning_takes_that_file_alone(folder, capsys, place):
    assert call(capsys, "cache", "verify")[0] == 0
    path = folder / BOTH[1]
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    code, _, err = call(capsys, "cache", "verify")
    assert code == 11
    assert "a" * 64 in err
    assert "1 of 2" in err
    assert "b" * 64 not in err


def test_only_what_is_old_or_too_much_is_removed(folder, capsys):
    assert call(capsys, "cache", "prune", "--older-than", "41d")[0] == 0
    assert files(folder) == BOTH
    code, out, _ = call(capsys, "cache", "prune", "--older-than", "39d")
    assert (code, files(folder)) == (0, BOTH[:1])
    assert "removed: 1 files" in out
    assert Cache(folder).entry("statistics", "a" * 64).write(b"x" * 5000)
    size = (folder / BOTH[1]).stat().st_size
    told = json.loads(call(capsys, "cache", "prune", "--max-bytes", str(size), "--json")[1])
    assert [entry["key"] for entry in told["entries"]] == [f"{'b' * 64}/verify"]
    assert files(folder) == BOTH[1:]


def test_the_limit_of_the_environment_is_that_of_prune_too(folder, capsys, monkeypatch):
    monkeypatch.setenv("QEXPORT_CACHE_LIMIT", "1k")
    assert call(capsys, "cache", "prune")[0] == 0
    assert files(folder) == BOTH[:1]
    assert call(capsys, "cache", "prune", "--all")[0] == 0
    assert files(folder) == []
    monkeypatch.setenv("QEXPORT_CACHE_LIMIT", "much")
    code, _, err = call(capsys, "cache", "prune")
    assert (code, "'much' is no size" in err) == (2, True)


@pytest.mark.parametrize("command", ["build", "plan", "sensitivity", "fetch"])
def test_every_command_that_keeps_something_minds_a_limit(command, monkeypatch):
    chosen = cli.get_command(click.Context(cli), command)
    words = {"sensitivity": ["--calib", "c.npz"], "fetch": ["-o", "out"]}.get(command, [])

    def limit(*more):
        return chosen.make_context(command, ["m", *words, *more]).params["cache_limit"]

    assert limit() is None
    monkeypatch.setenv("QEXPORT_CACHE_LIMIT", "5G")
    assert limit() == 5 << 30
    assert limit("--cache-limit", "800M") == 800 << 20


def test_a_build_keeps_to_its_limit(tmp_path):
    assert BuildOptions(cache=tmp_path).open_cache().limit == 20 << 30
    cache = BuildOptions(cache=tmp_path / "cache", cache_limit=1000).open_cache()
    assert not cache.entry("statistics", "a").write(b"x" * 1000)
    assert cache.entry("statistics", "b").write(b"x" * 600)
    assert cache.entry("statistics", "c").write(b"x" * 600)
    assert files(tmp_path / "cache") == ["statistics/c"]


def test_all_goes_but_strangers_links_and_folders_stay(folder, capsys, tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (folder / "statistics" / ("c" * 64)).symlink_to(tmp_path / "elsewhere")
    (folder / "notes.txt").write_text("mine")
    (folder / "photos").mkdir()
    (folder / "photos" / ("d" * 64)).write_text("mine")
    assert call(capsys, "cache", "prune", "--all")[0] == 0
    assert files(folder) == ["notes.txt", f"photos/{'d' * 64}", f"statistics/{'c' * 64}"]
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "arguments",
    [("--older-than", "soon"), ("--older-than", "30"), ("--max-bytes", "-1G"), ("--all", "--older-than", "1d")],
)
def test_ages_and_sizes_that_are_none_remove_nothing(folder, capsys, arguments):
    assert call(capsys, "cache", "prune", *arguments)[0] == 2
    assert files(folder) == BOTH


def test_a_cache_that_others_can_write_is_not_read(folder, capsys):
    folder.chmod(0o777)
    assert call(capsys, "cache", "ls")[0] == 4
