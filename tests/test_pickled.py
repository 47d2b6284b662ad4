"""Pickled checkpoints: refused unless asked for, and never executed."""

from __future__ import annotations

import os
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from qexport.errors import ModelInvalid, UnsafeInput, UsageError
from qexport.exporter.doors.pickled import read_pickled

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

WEIGHTS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "a.brain": torch.tensor([1.0, 3.140625, float("inf")], dtype=torch.bfloat16),
    "a.steps": torch.tensor(7),
    "a.turned": torch.arange(6.0).reshape(2, 3).T,
}


class Payload:
    """A pickle of it makes a folder when it is read by the reader for everything."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


class Command:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.system, (f"mkdir {self.folder}",)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(WEIGHTS, path)
    return path


def compare(found):
    assert list(found) == list(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        np.testing.assert_array_equal(found[name].astype(np.float64), tensor.double().numpy())
    assert found["a.half"].dtype == np.float16
    assert found["a.brain"].dtype == ml_dtypes.bfloat16
    assert found["a.steps"].shape == ()


def test_pickles_are_refused_unless_somebody_asks(checkpoint):
    with pytest.raises(UnsafeInput, match=r"can run code.*safetensors"):
        read_pickled(checkpoint)


def test_all_types_and_shapes_come_back(checkpoint):
    compare(read_pickled(checkpoint, allow_pickle=True))


def test_files_of_the_old_form_are_read_as_well(tmp_path):
    path = tmp_path / "old.pt"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    compare(read_pickled(path, allow_pickle=True))


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_beside_what_training_keeps_are_found(tmp_path, key):
    path = tmp_path / "last.ckpt"
    torch.save({"epoch": 3, key: WEIGHTS, "optimizer": {"lr": 0.1}}, path)
    compare(read_pickled(path, allow_pickle=True))


def test_tensors_that_share_memory_share_it_still(tmp_path):
    path = tmp_path / "tied.bin"
    table = torch.randn(4, 3)
    torch.save({"embed": table, "head": table, "rows": table[1:3]}, path)
    found = read_pickled(path, allow_pickle=True)
    assert np.shares_memory(found["embed"], found["head"])
    assert np.shares_memory(found["embed"], found["rows"])
    np.testing.assert_array_equal(found["rows"], table[1:3].numpy())


@pytest.mark.parametrize("kind", [Payload, Command])
@pytest.mark.parametrize("new", [True, False])
def test_a_payload_is_named_and_not_run(tmp_path, kind, new):
    path, folder = tmp_path / "evil.bin", tmp_path / "was_here"
    torch.save({"w": torch.ones(2), "x": kind(folder)}, path, _use_new_zipfile_serialization=new)
    with pytest.raises(UnsafeInput, match=r"numbers alone: it wants (posix|nt|os)\.?") as caught:
        read_pickled(path, allow_pickle=True)
    assert not folder.exists()
    assert caught.value.exit_code == 4


def test_the_payloads_of_these_tests_do_run_elsewhere(tmp_path):
    path, folder = tmp_path / "evil.bin", tmp_path / "was_here"
    torch.save({"x": Payload(folder)}, path)
    torch.load(path, weights_only=False)
    assert folder.is_dir()


def test_the_environment_cannot_switch_the_other_reader_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, folder = tmp_path / "evil.bin", tmp_path / "was_here"
    torch.save({"x": Payload(folder)}, path)
    with pytest.raises(UnsafeInput):
        read_pickled(path, allow_pickle=True)
    assert not folder.exists()


def test_a_whole_module_is_no_checkpoint_of_numbers(tmp_path):
    path = tmp_path / "module.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UnsafeInput, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_pickled(path, allow_pickle=True)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("new", [True, False])
def test_files_that_end_early_are_refused(tmp_path, share, new):
    path = tmp_path / "cut.bin"
    torch.save({"w": torch.randn(100, 100)}, path, _use_new_zipfile_serialization=new)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UnsafeInput, match="not a checkpoint"):
        read_pickled(path, allow_pickle=True)


@pytest.mark.parametrize("data", [b"\x80\x02]q", b"<html>", struct.pack("<Q", 1 << 60), b"PK\x03\x04" + bytes(90)])
def test_other_files_are_refused(tmp_path, data):
    path = tmp_path / "other.bin"
    path.write_bytes(data)
    with pytest.raises(UnsafeInput):
        read_pickled(path, allow_pickle=True)


def test_what_has_no_tensors_by_name_is_no_model(tmp_path):
    path = tmp_path / "list.pt"
    torch.save([torch.ones(2)], path)
    with pytest.raises(ModelInvalid, match="no tensors by name"):
        read_pickled(path, allow_pickle=True)


def test_a_sparse_tensor_is_named(tmp_path):
    path = tmp_path / "sparse.pt"
    torch.save({"w": torch.eye(3).to_sparse()}, path)
    with pytest.raises(ModelInvalid, match=r"'w' cannot be an array.*sparse_coo"):
        read_pickled(path, allow_pickle=True)


def test_a_missing_file_is_a_mistake_of_the_caller(tmp_path):
    with pytest.raises(UsageError):
        read_pickled(tmp_path / "none.bin", allow_pickle=True)
