"""Samples that a function gives, D09, and data files that are held against a digest beside them, D03."""

from __future__ import annotations

import hashlib
import itertools
import subprocess

import numpy as np
import pytest
from helpers import save_model

from qexport.calibration.reading import data as data_module
from qexport.calibration.reading.data import DataSpec, InputSpec, open_dataset
from qexport.calibration.reading.evaluation import open_evaluation
from qexport.errors import DataInvalid, IntegrityError, ResourceExhausted, UsageError
from qexport.exporter.load import load_source
from qexport.exporter.recipe_files import load_recipe
from qexport.exporter.samples import open_samples

X = (InputSpec("x", np.dtype(np.float32), (None, 3)),)
IDS = (
    InputSpec("input_ids", np.dtype(np.int64), (None, None)),
    InputSpec("attention_mask", np.dtype(np.int64), (None, None)),
)
VALUES = np.arange(30, dtype=np.float32).reshape(10, 3)


def rows():
    return ({"x": row} for row in VALUES)


def opened(make, spec=None, inputs=X):
    return open_dataset(make, inputs, spec or DataSpec())


# ---------------------------------------------------------------- functions


def test_samples_of_a_function_are_those_of_a_file_with_the_same_numbers(tmp_path):
    np.savez(tmp_path / "a.npz", x=VALUES)
    given, read = opened(rows), opened(tmp_path / "a.npz")
    assert given.digest == read.digest
    assert given.digests == read.digests
    for _ in range(2):
        np.testing.assert_array_equal([sample["x"] for sample in given], VALUES)
    assert given.name == "rows()"
    assert given.warnings == ()


def test_a_function_may_fill_the_same_buffer_again_and_again():
    def refilled():
        buffer = np.empty(3, np.float32)
        for row in VALUES:
            buffer[:] = row
            yield {"x": buffer}

    np.testing.assert_array_equal([sample["x"] for sample in list(opened(refilled))], VALUES)


def test_values_that_are_no_arrays_are_converted_and_padding_is_cut_as_in_files():
    ids = opened(lambda: [{"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]}], inputs=IDS)
    assert [sample["input_ids"].tolist() for sample in ids] == [[5, 6]]
    with pytest.raises(DataInvalid, match="'attention_mask' is all zero"):
        opened(lambda: [{"input_ids": [5, 6], "attention_mask": [0, 0]}], inputs=IDS)


MISFITS = [
    (
        lambda: [{"x": np.zeros((1, 3), "f")}],
        r"shape of 'x' does not fit.*expected 'x' float32\[\?, 3\].*without the b",
    ),
    (lambda: [{"y": VALUES[0]}], "'x' is missing, 'y' is not an input"),
    (lambda: [{"x": VALUES[0], "y": VALUES[0]}], "'y' is not an input of the model"),
    (lambda: [{"x": np.array(["a", "b", "c"])}], "'x' is <U1"),
    (lambda: [{"x": [object()] * 3}], "'x' is object"),
    (lambda: [VALUES[0]], "expected a dictionary of arrays, found ndarray"),
    (lambda: [{"x": VALUES[0]}, {"x": [1, np.nan, 2]}], "sample 1, input 'x': holds NaN"),
    (lambda: [{"x": [[1, 2], [3]]}], "sample 0, input 'x': is no array"),
    (list, "holds no samples"),
    (lambda: 7, r"sample 0: the function .* raised TypeError"),
]


@pytest.mark.parametrize(("make", "says"), MISFITS)
def test_samples_that_do_not_fit_are_refused_with_their_number(make, says):
    with pytest.raises(DataInvalid, match=says):
        opened(make)


@pytest.mark.parametrize("at", [0, 1, 7])
def test_d09_a_function_that_raises_is_invalid_data_at_that_sample(at):
    def failing():
        yield from itertools.islice(rows(), at)
        raise OSError("the disk is gone")

    with pytest.raises(DataInvalid, match=rf"failing\(\): sample {at}: .* raised OSError: the disk is gone") as caught:
        opened(failing)
    assert isinstance(caught.value.__cause__, OSError)


def forever():
    return ({"x": np.full(3, number, np.float32)} for number in itertools.count())


def test_d09_a_function_without_an_end_is_read_up_to_max_samples():
    assert len(opened(forever, DataSpec(max_samples=5))) == 5


@pytest.mark.parametrize("opener", [open_dataset, open_evaluation])
def test_d09_a_function_without_an_end_is_capped(monkeypatch, opener):
    monkeypatch.setattr(data_module, "MAX_SAMPLES", 50)
    with pytest.raises(ResourceExhausted, match=r"forever\(\): more than 50 samples.*data.max_samples"):
        opener(forever, X, DataSpec())


def test_samples_beyond_all_measure_are_refused():
    wide = (InputSpec("x", np.dtype(np.float32), (None, None)),)
    with pytest.raises(ResourceExhausted, match="'x' takes 268435460 bytes"):
        opened(lambda: [{"x": np.broadcast_to(np.float32(0), (1 << 26) + 1)}], inputs=wide)


def test_a_function_that_gives_something_else_the_second_time_is_noticed():
    turns = itertools.count()
    data = opened(lambda: [{"x": VALUES[0] + next(turns)}])
    with pytest.raises(IntegrityError, match=r"the data changed.*the same samples at every call"):
        list(data)
    once = rows()
    with pytest.raises(IntegrityError, match="the data changed"):
        list(opened(lambda: once))


@pytest.mark.parametrize("data", [[{"x": VALUES[0]}], rows(), 5])
def test_what_is_no_function_is_refused_with_what_to_do(data):
    with pytest.raises(UsageError, match=r"a path or a function, not as .*returns the samples anew"):
        opened(data)


def test_a_recipe_calibrates_and_judges_on_functions(tmp_path):
    def calibration():
        return ({"x": row} for row in np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32))

    def held_out():
        return ({"x": row} for row in np.random.default_rng(1).standard_normal((20, 32)).astype(np.float32))

    found = open_samples(load_source(save_model(tmp_path / "m.onnx")), load_recipe("int8"), calibration, held_out)
    assert found.calibration.name == "calibration()"
    assert found.judge.held_out
    assert len(found.judge.data) == 20


# ---------------------------------------------------------------- digests beside files


def saved(folder):
    np.save(folder / "a.npy", VALUES)
    return folder / "a.npy"


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


NOTES = [
    "{digest}  a.npy\n",
    "{digest} *a.npy\n",
    "{digest}\n",
    "{capitals}  a.npy\n",
    "{digest}  ./a.npy\r\n",
    "{other}  b.npy\n{digest}  a.npy\n",
]


@pytest.mark.parametrize("note", NOTES)
def test_d03_a_flipped_bit_is_noticed_where_a_digest_lies_beside_the_file(tmp_path, note):
    path = saved(tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "a.npy.sha256").write_text(note.format(digest=digest, capitals=digest.upper(), other="0" * 64))
    assert len(opened(path)) == 10
    assert len(open_evaluation(path, X, DataSpec()).dataset) == 10
    flipped(path)
    with pytest.raises(IntegrityError, match=r"a\.npy: has the digest sha256:.*a\.npy\.sha256 says another"):
        opened(path)
    with pytest.raises(IntegrityError):
        open_evaluation(path, X, DataSpec())


def test_what_sha256sum_writes_is_read(tmp_path):
    path = saved(tmp_path)
    with (tmp_path / "a.npy.sha256").open("wb") as note:
        subprocess.run(["sha256sum", "a.npy"], cwd=tmp_path, stdout=note, check=True)
    assert len(opened(path)) == 10
    flipped(path)
    with pytest.raises(IntegrityError):
        opened(path)


def test_without_a_digest_a_flipped_bit_goes_unnoticed(tmp_path):
    flipped(saved(tmp_path))
    assert len(opened(tmp_path / "a.npy")) == 10


@pytest.mark.parametrize("text", ["", "nonsense\n", "0" * 64 + "  b.npy\n", "0" * 63 + "\n", "\xff\n"])
def test_a_note_that_says_nothing_of_the_file_is_refused(tmp_path, text):
    path = saved(tmp_path)
    (tmp_path / "a.npy.sha256").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataInvalid, match=r"holds no digest of 'a\.npy'"):
        opened(path)


def test_a_note_that_contradicts_itself_is_refused(tmp_path):
    path = saved(tmp_path)
    (tmp_path / "a.npy.sha256").write_text("0" * 64 + "  a.npy\n" + "1" * 64 + "  a.npy\n")
    with pytest.raises(DataInvalid, match="holds several"):
        opened(path)
