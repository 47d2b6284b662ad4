"""Data that does not fit the model: every message lists what was expected and what was found."""

from __future__ import annotations

import os

import numpy as np
import pytest
from helpers import npy_bytes, npz_bytes, write, zip_bytes

from qexport.calibration.reading.data import DataSpec, ImageSpec, InputSpec, open_dataset
from qexport.calibration.reading.evaluation import open_evaluation
from qexport.errors import DataInvalid, UnsafeInput

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
X = (InputSpec("x", F32, (None, 3)),)
TEXT = (InputSpec("input_ids", I64, (None, None)),)
PICTURE = (InputSpec("pixels", F32, (None, 3, 4, 4)),)
VALUES = np.arange(12, dtype=np.float32).reshape(4, 3)

MISFITS = {
    "missing": (
        {"y": VALUES},
        r"'x' is missing, 'y' is not an input of the model: expected 'x' float32\[\?, 3\], found",
    ),
    "extra": ({"x": VALUES, "z": VALUES}, r"'z' is not an input of the model: .*found 'x' .*; 'z' float32\[4, 3\]"),
    "shape": ({"x": VALUES[:, :2]}, r"the shape of 'x' does not fit: .*found 'x' float32\[4, 2\]"),
    "rank": ({"x": VALUES[..., None]}, r"the shape of 'x' does not fit: .*found 'x' float32\[4, 3, 1\]"),
    "no axis": ({"x": np.float32(1)}, r"the shape of 'x' does not fit: .*found 'x' float32\[\]"),
    "integers": ({"x": VALUES.astype(np.int64)}, r"'x' is int64: expected 'x' float32"),
    "nothing": ({"x": VALUES[:0]}, r"'x' is empty"),
    "no arrays": ({}, r"'x' is missing: .*found no arrays"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_d04_data_that_does_not_fit_is_answered_with_expected_and_found(tmp_path, name):
    arrays, message = MISFITS[name]
    with pytest.raises(DataInvalid, match=message):
        open_dataset(write(tmp_path / "data.npz", npz_bytes(**arrays)), X, DataSpec())


@pytest.mark.parametrize(
    ("found", "wanted"), [("int64", "int32"), ("float32", "int64"), ("uint64", "int64"), ("complex64", "float32")]
)
def test_d04_values_are_not_narrowed(tmp_path, found, wanted):
    path = write(tmp_path / "data.npz", npz_bytes(x=VALUES.astype(found)))
    with pytest.raises(DataInvalid, match=found):
        open_dataset(path, (InputSpec("x", np.dtype(wanted), (None, 3)),), DataSpec())


def test_d04_inputs_must_have_the_same_number_of_samples(tmp_path):
    path = write(tmp_path / "data.npz", npz_bytes(x=VALUES, y=VALUES[:3]))
    with pytest.raises(DataInvalid, match=r"numbers of samples differ: .*'x' float32\[4, 3\]; 'y' float32\[3, 3\]"):
        open_dataset(path, (*X, InputSpec("y", F32, (None, 3))), DataSpec())


def test_d04_one_unnamed_array_is_not_enough_for_two_inputs(tmp_path):
    with pytest.raises(DataInvalid, match="'x' is missing, 'y' is missing"):
        open_dataset(write(tmp_path / "x.npy", npy_bytes(VALUES)), (*X, InputSpec("y", F32, (None, 3))), DataSpec())


def test_d04_a_scalar_input_cannot_take_samples(tmp_path):
    path = write(tmp_path / "data.npz", npz_bytes(x=np.float32(1)))
    with pytest.raises(DataInvalid, match="the shape of 'x' does not fit"):
        open_dataset(path, (InputSpec("x", F32, ()),), DataSpec())


@pytest.mark.parametrize("labels", [[0, 1, 2], [[0], [1], [2], [3]], [0.0, 1.0, 2.0, 3.0], [0, 1, -1, 0]])
def test_d04_labels_must_be_one_class_per_sample(tmp_path, labels):
    path = write(tmp_path / "data.npz", npz_bytes(x=VALUES, labels=np.array(labels)))
    with pytest.raises(DataInvalid, match="label"):
        open_evaluation(path, X, DataSpec())


@pytest.mark.parametrize("name", ["data.npz", "data.csv", "tokenizer", "pictures"])
def test_d04_a_fifo_is_not_waited_for(tmp_path, name):
    (tmp_path / "pictures").mkdir()
    path = tmp_path / ("pictures/a.png" if name == "pictures" else name)
    os.mkfifo(path)
    given_path = {"tokenizer": write(tmp_path / "a.txt", "a"), "pictures": path.parent}.get(name, path)
    inputs = {"pictures": PICTURE, "data.npz": X}.get(name, TEXT)
    with pytest.raises((UnsafeInput, DataInvalid)):
        open_dataset(given_path, inputs, DataSpec(image=ImageSpec()), tokenizer=path)


def test_d04_names_in_messages_are_escaped(tmp_path):
    path = write(tmp_path / "data.npz", zip_bytes("\x1b[31mx\u202e.npy", npy_bytes(VALUES)))
    with pytest.raises(DataInvalid) as caught:
        open_dataset(path, X, DataSpec())
    assert "\x1b" not in str(caught.value)
    assert "\u202e" not in str(caught.value)
