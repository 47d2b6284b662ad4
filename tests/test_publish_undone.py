"""Publishing that fails when the names are exchanged already: it is undone."""

from __future__ import annotations

import errno
import os

import pytest

from qexport.errors import ResourceExhausted
from qexport.safe_io import publish, publishing


def put(stage, data):
    """One file and the manifest that claims it."""
    stage.write_bytes("data.bin", data)
    stage.write_json("manifest.json", {"schema": "qexport.manifest/1", "files": list(stage.files)})


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=["disk", "user"])
@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_names_that_cannot_be_flushed_are_put_back(tmp_path, monkeypatch, error, swaps, old):
    """Who is told of a failure finds what was there before, also when it comes after the exchange."""
    out = tmp_path / "new" / "out"
    if old:
        with publish(out) as stage:
            put(stage, b"old")
    sync = publishing.sync_folder

    def fail(folder):
        if folder == out.parent:
            assert (out / "data.bin").read_bytes() == b"new"
            raise error
        sync(folder)

    monkeypatch.setattr(publishing, "sync_folder", fail)
    if not swaps:
        monkeypatch.setattr(publishing, "exchange", lambda one, other: False)
    with pytest.raises((ResourceExhausted, KeyboardInterrupt)), publish(out) as stage:
        put(stage, b"new")
    if old:
        assert (out / "data.bin").read_bytes() == b"old"
        assert os.listdir(out.parent) == ["out"]
    else:
        assert os.listdir(tmp_path) == []
