"""Calibration and evaluation data: what is read, how it is trimmed, that it is the same on every pass."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from qexport.calibration.reading.data import (
    DataSpec,
    InputSpec,
    input_specs,
    open_dataset,
    sample_digest,
    survey,
)
from qexport.errors import DataInvalid, ModelInvalid, UsageError

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
X = (InputSpec("x", F32, (None, 3)),)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    {".npz": np.savez, ".packed.npz": np.savez_compressed}["".join(path.suffixes)](path, **arrays)
    return path


# ---------------------------------------------------------------- inputs of a model


def make_model(*inputs: ir.Value, initializers: tuple[ir.Value, ...] = ()) -> ir.Model:
    graph = ir.Graph(list(inputs), [], nodes=[], initializers=initializers, opset_imports={"": 19})
    return ir.Model(graph, ir_version=10)


def make_value(name: str, dtype: ir.DataType, shape: list[int | str | None] | None) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=None if shape is None else ir.Shape(shape))


def test_input_specs_give_free_axes_as_none_and_leave_initializers_out():
    weight = make_value("w", ir.DataType.FLOAT, [2])
    weight.const_value = ir.tensor(np.zeros(2, np.float32))
    model = make_model(make_value("ids", ir.DataType.INT64, ["batch", None, 7]), weight, initializers=(weight,))
    assert input_specs(model) == (InputSpec("ids", I64, (None, None, 7)),)


@pytest.mark.parametrize(
    ("dtype", "shape", "message"), [(ir.DataType.STRING, ["n"], "numbers"), (ir.DataType.FLOAT, None, "no shape")]
)
def test_an_input_that_cannot_be_fed_is_refused(dtype, shape, message):
    with pytest.raises(ModelInvalid, match=message):
        input_specs(make_model(make_value("x", dtype, shape)))


# ---------------------------------------------------------------- arrays


@pytest.mark.parametrize("suffix", [".npz", ".packed.npz", ".npy", ".safetensors"])
def test_every_array_format_gives_the_same_samples(tmp_path, suffix):
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    path = tmp_path / f"data{suffix}"
    if suffix == ".npy":
        np.save(path, values)
    elif suffix == ".safetensors":
        save_file({"other": np.zeros((4, 2), np.float16), "x": values}, path)
    else:
        save_arrays(path, {"x": values})
    inputs = (*X, InputSpec("other", np.dtype(np.float16), (None, 2))) if suffix == ".safetensors" else X
    dataset = open_dataset(path, inputs, DataSpec())
    assert len(dataset) == 4
    for _ in range(2):
        np.testing.assert_array_equal([sample["x"] for sample in dataset], values)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ("int32", "int64"),
        ("uint8", "int32"),
        ("bool", "int64"),
        ("float64", "float32"),
        ("float32", "float16"),
        (">f4", "float32"),
    ],
)
def test_values_are_converted_where_nothing_is_lost_but_precision(tmp_path, found, wanted):
    path = save_arrays(tmp_path / "data.npz", {"x": np.array([[0, 1, 0], [1, 1, 0]]).astype(found)})
    dataset = open_dataset(path, (InputSpec("x", np.dtype(wanted), (None, 3)),), DataSpec())
    samples = [sample["x"] for sample in dataset]
    assert {sample.dtype for sample in samples} == {np.dtype(wanted)}
    np.testing.assert_array_equal(samples, [[0, 1, 0], [1, 1, 0]])


def test_labels_the_model_does_not_ask_for_are_left_alone(tmp_path):
    path = save_arrays(tmp_path / "data.npz", {"x": np.eye(3, dtype=np.float32), "labels": np.arange(3)})
    assert [set(sample) for sample in open_dataset(path, X, DataSpec())] == [{"x"}] * 3


def test_a_model_that_reads_bfloat16_is_fed_from_float32(tmp_path):
    model = make_model(make_value("x", ir.DataType.BFLOAT16, ["n", 3]))
    path = save_arrays(tmp_path / "data.npz", {"x": np.eye(3, dtype=np.float32)})
    (sample, *_) = open_dataset(path, input_specs(model), DataSpec())
    assert sample["x"].dtype.name == "bfloat16"


@pytest.mark.parametrize("suffix", [".npz", ".packed.npz", ".npy", ".safetensors"])
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path, suffix):
    values = np.random.default_rng(0).normal(size=(256, 64, 256)).astype(np.float32)  # 16 MiB
    path = tmp_path / f"data{suffix}"
    if suffix == ".npy":
        np.save(path, values)
    elif suffix == ".safetensors":
        save_file({"x": values}, path)
    else:
        save_arrays(path, {"x": values})
    tracemalloc.start()
    for _ in open_dataset(path, (InputSpec("x", F32, (None, 64, 256)),), DataSpec()):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


# ---------------------------------------------------------------- attention masks


def test_padding_behind_the_last_one_of_the_mask_is_cut_off_every_free_axis_of_its_length(tmp_path):
    inputs = (
        InputSpec("input_ids", I64, (None, None)),
        InputSpec("attention_mask", I64, (None, None)),
        InputSpec("bias", F32, (None, None, None, 4)),
    )
    mask = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1]])
    arrays = {"input_ids": np.array([[5, 6, 0, 0], [7, 0, 8, 0], [0, 0, 9, 3]]), "attention_mask": mask}
    arrays["bias"] = np.ones((3, 4, 4, 4), np.float32)
    samples = list(open_dataset(save_arrays(tmp_path / "data.npz", arrays), inputs, DataSpec()))
    assert [sample["input_ids"].tolist() for sample in samples] == [[5, 6], [7, 0, 8], [0, 0, 9, 3]]
    assert [sample["attention_mask"].tolist() for sample in samples] == [[1, 1], [1, 0, 1], [0, 0, 1, 1]]
    assert [sample["bias"].shape for sample in samples] == [(2, 2, 4), (3, 3, 4), (4, 4, 4)]


def test_an_axis_the_model_fixes_is_not_trimmed(tmp_path):
    inputs = tuple(InputSpec(name, I64, (None, 4)) for name in ("input_ids", "attention_mask"))
    arrays = {"input_ids": np.array([[5, 6, 0, 0]]), "attention_mask": np.array([[1, 1, 0, 0]])}
    (sample,) = open_dataset(save_arrays(tmp_path / "data.npz", arrays), inputs, DataSpec())
    assert sample["input_ids"].tolist() == [5, 6, 0, 0]


def test_an_additive_mask_is_kept_because_its_zeros_mean_visible(tmp_path):
    inputs = (InputSpec("attention_mask", F32, (None, None)),)
    path = save_arrays(tmp_path / "data.npz", {"attention_mask": np.array([[-1e4, 0, 0, 0]], np.float32)})
    (sample,) = open_dataset(path, inputs, DataSpec())
    assert sample["attention_mask"].shape == (4,)


def test_a_mask_of_zeros_is_refused(tmp_path):
    inputs = (InputSpec("attention_mask", I64, (None, None)),)
    path = save_arrays(tmp_path / "data.npz", {"attention_mask": np.array([[1, 1], [0, 0]])})
    with pytest.raises(DataInvalid, match=r"sample 1: 'attention_mask' is all zero"):
        open_dataset(path, inputs, DataSpec())


# ---------------------------------------------------------------- the dataset as a whole


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(8)), st.integers(0, 7))
def test_the_digest_does_not_depend_on_the_order_but_on_every_sample(tmp_path_factory, order, changed):
    folder = tmp_path_factory.mktemp("data")
    values = np.arange(24, dtype=np.float32).reshape(8, 3)
    digest = open_dataset(save_arrays(folder / "a.npz", {"x": values}), X, DataSpec()).digest
    assert open_dataset(save_arrays(folder / "b.npz", {"x": values[order]}), X, DataSpec()).digest == digest
    values[changed, 1] += 0.5
    assert open_dataset(save_arrays(folder / "c.npz", {"x": values[order]}), X, DataSpec()).digest != digest


def test_a_sample_digest_sees_names_types_and_shapes():
    base = {"a": np.zeros(4, np.float32), "b": np.ones(2, np.int64)}
    variants = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].view(np.int32), "b": base["b"]},
        {"a": base["a"].reshape(2, 2), "b": base["b"]},
        {"a": base["a"]},
        {"a": np.float32(0).reshape(()), "b": base["b"]},
    ]
    digests = {sample_digest(sample) for sample in (base, *variants)}
    assert len(digests) == 6
    assert sample_digest(dict(reversed(base.items()))) == sample_digest(base)
    assert sample_digest({**base, "a": np.zeros(8, np.float32)[::2]}) == sample_digest(base)


def test_at_most_max_samples_distinct_ones_are_taken(tmp_path):
    values = np.repeat(np.arange(15, dtype=np.float32).reshape(5, 3), 2, axis=0)
    dataset = open_dataset(save_arrays(tmp_path / "data.npz", {"x": values}), X, DataSpec(max_samples=3))
    np.testing.assert_array_equal([sample["x"] for sample in dataset], values[[0, 2, 4]])
    assert dataset.duplicates == 2


def test_doubtful_data_is_allowed_and_reported(tmp_path):
    inputs = (*X, InputSpec("y", F32, (None,)))
    path = save_arrays(tmp_path / "data.npz", {"x": np.zeros((1, 3), np.float32), "y": np.full(1, 2.5, np.float32)})
    assert open_dataset(path, inputs, DataSpec()).warnings == (
        "there is only one sample",
        "input 'x' is 0 everywhere",
        "input 'y' is 2.5 everywhere",
    )


def test_sound_data_has_no_warnings(tmp_path):
    inputs = (*X, InputSpec("attention_mask", I64, (None, None)))
    path = save_arrays(tmp_path / "data.npz", {"x": np.eye(3), "attention_mask": np.ones((3, 2), np.int64)})
    assert open_dataset(path, inputs, DataSpec()).warnings == ()


def test_data_without_samples_is_refused(tmp_path):
    class Nothing:
        files = (tmp_path / "none",)

        def __iter__(self):
            return iter(())

    with pytest.raises(DataInvalid, match="holds no samples"):
        survey(Nothing(), "none", distinct=True)


def test_an_unknown_kind_of_file_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(DataInvalid, match=r"no reader for '\.parquet'.*\.npz.*\.jsonl"):
        open_dataset(write(tmp_path / "data.parquet", ""), X, DataSpec())


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"data\.npz: no such file"):
        open_dataset(tmp_path / "data.npz", X, DataSpec())
