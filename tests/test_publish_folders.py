"""Folders inside of a folder that is published."""

from __future__ import annotations

import os

import pytest

from qexport.errors import UsageError
from qexport.safe_io import publish


def test_a_folder_is_staged_and_replaced_with_its_files(tmp_path):
    for text in ("old", "new"):
        with publish(tmp_path / "out") as stage:
            stage.make_folder("a")
            stage.make_folder("a")
            stage.write_text("a/b", text)
            for name in ("a/..", "a/", "a/b", "a/c/d", "c/b"):
                with pytest.raises(UsageError, match="not a new file name"):
                    stage.write_text(name, "x")
            stage.write_manifest()
        assert (tmp_path / "out/a/b").read_text() == text
    assert sorted(os.listdir(tmp_path / "out")) == ["a", "manifest.json"]


@pytest.mark.parametrize("stranger", ["a/c", "a/d/e", "b"])
def test_a_folder_with_a_stranger_in_it_is_not_replaced(tmp_path, stranger):
    with publish(tmp_path / "out") as stage:
        stage.make_folder("a")
        stage.write_text("a/b", "x")
        stage.write_manifest()
    (tmp_path / "out" / stranger).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / stranger).write_text("mine")
    with pytest.raises(UsageError, match="no build wrote"), publish(tmp_path / "out"):
        pass


def test_a_link_in_the_place_of_a_staged_folder_is_a_stranger(tmp_path):
    with publish(tmp_path / "out") as stage:
        stage.make_folder("a")
        stage.write_text("a/b", "x")
        stage.write_manifest()
    os.rename(tmp_path / "out/a", tmp_path / "elsewhere")
    (tmp_path / "out/a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="no build wrote: 'a'"), publish(tmp_path / "out"):
        pass
