"""Calibration and evaluation data: what is read, how it is trimmed, that it is the same on every pass."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from qexport.calibration.data import (
    DataSpec,
    FileDataset,
    ImageSpec,
    InputSpec,
    input_specs,
    open_dataset,
    sample_digest,
    survey,
)
from qexport.calibration.evaluation import open_evaluation
from qexport.errors import DataInvalid, ModelInvalid, UsageError

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
WORDS = ["[UNK]", "[CLS]", "[SEP]", "a", "man", "dog", "runs", "eats", "the", "fast"]
X = (InputSpec("x", F32, (None, 3)),)
PICTURE = (InputSpec("pixels", F32, (None, 3, 4, 4)),)
TEXT = tuple(InputSpec(name, I64, (None, None)) for name in ("input_ids", "attention_mask", "token_type_ids"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.enable_padding(length=16)  # as many published files have it; reading must switch it off
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    {".npz": np.savez, ".packed.npz": np.savez_compressed}["".join(path.suffixes)](path, **arrays)
    return path


def ids(dataset: FileDataset) -> list[list[int]]:
    return [sample["input_ids"].tolist() for sample in dataset]


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


# ---------------------------------------------------------------- text

LINES = ["a man runs", "the dog eats fast", "a dog"]
FORMATS = {
    "header.csv": "id,text\n" + "".join(f"{n},{line}\n" for n, line in enumerate(LINES)),
    "sentence.csv": "sentence\n" + "\n".join(LINES),
    "quoted.csv": 'text,n\n"a man runs",1\n"the dog\neats fast",2\n"a dog",3\n',
    "keys.jsonl": "\n".join(json.dumps({"text": line, "n": 1}) for line in LINES),
    "plain.txt": "\n\n".join(LINES) + "\n",
    "bom.txt": "\ufeff" + "\r\n".join(LINES),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_text_format_gives_the_same_token_ids(tmp_path, tokenizer, name):
    dataset = open_dataset(write(tmp_path / name, FORMATS[name]), TEXT, DataSpec(), tokenizer=tokenizer)
    assert ids(dataset) == [[1, 3, 4, 6, 2], [1, 8, 5, 7, 9, 2], [1, 3, 5, 2]]
    for sample in dataset:
        assert set(sample) == {"input_ids", "attention_mask", "token_type_ids"}
        assert {array.dtype for array in sample.values()} == {I64}
        assert sample["attention_mask"].all()
        assert not sample["token_type_ids"].any()


PAIRS = {
    "bare.csv": "a man,a dog,4.5\nthe dog,a man runs,1\n",
    "named.csv": "score,sentence2,sentence1\n4.5,a dog,a man\n1,a man runs,the dog\n",
    "pairs.jsonl": '{"sentence1":"a man","sentence2":"a dog","score":4.5}\n'
    '{"sentence1":"the dog","sentence2":"a man runs","score":"1"}\n',
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_become_all_first_sentences_then_all_second_ones_and_a_spearman_task(tmp_path, tokenizer, name):
    path = write(tmp_path / name, PAIRS[name])
    evaluation = open_evaluation(path, TEXT, DataSpec(max_samples=1), tokenizer=tokenizer)
    assert ids(evaluation.dataset) == [[1, 3, 4, 2], [1, 8, 5, 2], [1, 3, 5, 2], [1, 3, 4, 6, 2]]
    assert evaluation.task is not None
    assert evaluation.task.name == "spearman"
    assert evaluation.task.score(np.array([[1, 0], [0, 1], [1, 0], [1, 0]], np.float32)) == pytest.approx(100)
    assert evaluation.task.score(np.array([[1, 0], [0, 1], [0, 1], [0, 1]], np.float32)) == pytest.approx(-100)


def test_equal_sentences_count_once_in_calibration_and_each_time_in_evaluation(tmp_path, tokenizer):
    path = write(tmp_path / "pairs.csv", "a man,a man,5\na man,a dog,1\n")
    assert len(open_dataset(path, TEXT, DataSpec(), tokenizer=tokenizer)) == 2
    assert len(open_evaluation(path, TEXT, DataSpec(), tokenizer=tokenizer).dataset) == 4


def test_pairs_without_a_score_and_plain_text_have_no_task(tmp_path, tokenizer):
    for name, text in {"a.csv": "sentence1,sentence2\na man,a dog\n", "b.txt": "a man\n"}.items():
        assert open_evaluation(write(tmp_path / name, text), TEXT, DataSpec(), tokenizer=tokenizer).task is None


def test_the_recipe_names_column_length_and_tokenizer(tmp_path, tokenizer):
    path = write(tmp_path / "data.csv", "text,body\nx,a man runs the dog eats\n")
    spec = DataSpec(text="body", max_length=4, tokenizer=str(tokenizer))
    assert ids(open_dataset(path, TEXT, spec, tokenizer=tmp_path / "missing.json")) == [[1, 3, 4, 2]]
    assert ids(open_dataset(path, TEXT, spec.model_copy(update={"tokenizer": str(tmp_path)}))) == [[1, 3, 4, 2]]


def test_a_fixed_sequence_axis_is_padded_up_to_and_cut_at(tmp_path, tokenizer):
    inputs = tuple(InputSpec(name, np.dtype(np.int32), (None, 4)) for name in ("input_ids", "attention_mask"))
    path = write(tmp_path / "data.txt", "dog\na man runs fast\n")
    samples = list(open_dataset(path, inputs, DataSpec(), tokenizer=tokenizer))
    assert [sample["input_ids"].tolist() for sample in samples] == [[1, 5, 2, 0], [1, 3, 4, 2]]
    assert [sample["attention_mask"].tolist() for sample in samples] == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert samples[0]["input_ids"].dtype == np.int32


# ---------------------------------------------------------------- images


def save_pictures(folder: Path) -> np.ndarray:
    pixels = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 3), np.uint8)
    folder.mkdir()
    for name, picture in zip(["b.png", "a.bmp", "c.PNG"], pixels, strict=True):
        Image.fromarray(picture).save(folder / name)
    write(folder / "notes.md", "not a picture")
    return pixels[[1, 0, 2]]


IMAGE = ImageSpec(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_folder_and_an_npz_of_the_same_pixels_are_the_same_data(tmp_path, layout):
    pixels = save_pictures(tmp_path / "pictures")
    save_arrays(tmp_path / "data.npz", {"images": pixels, "labels": np.array([2, 0, 1])})
    shape = (None, 3, 4, 4) if layout == "NCHW" else (None, 4, 4, 3)
    inputs = (InputSpec("pixels", F32, shape),)
    spec = DataSpec(image=IMAGE.model_copy(update={"layout": layout}))
    folder, archive = (open_dataset(tmp_path / name, inputs, spec) for name in ("pictures", "data.npz"))
    assert folder.digest == archive.digest
    wanted = (pixels / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    wanted = wanted.transpose(0, 3, 1, 2) if layout == "NCHW" else wanted
    np.testing.assert_allclose([sample["pixels"] for sample in folder], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "side"), [(None, 4), (2, 2), ((2, 2), 2)])
def test_pictures_are_scaled_to_cover_and_cut_at_the_centre(tmp_path, size, side):
    (tmp_path / "p").mkdir()
    picture = np.zeros((8, 48, 3), np.uint8)
    picture[:, 16:32] = 200
    Image.fromarray(picture).save(tmp_path / "p" / "wide.png")
    save_arrays(tmp_path / "data.npz", {"images": picture[None]})
    inputs = (InputSpec("pixels", F32, (None, 3, side, side)),)
    for name in ("p", "data.npz"):
        (sample,) = open_dataset(tmp_path / name, inputs, DataSpec(image=ImageSpec(size=size, scale=1)))
        np.testing.assert_array_equal(sample["pixels"], np.full((3, side, side), 200, np.float32))


def test_an_integer_input_takes_grey_pixels_as_they_are(tmp_path):
    pixels = np.arange(32, dtype=np.uint8).reshape(2, 4, 4, 1)
    inputs = (InputSpec("pixels", np.dtype(np.uint8), (None, 1, None, None)),)
    dataset = open_dataset(save_arrays(tmp_path / "data.npz", {"images": pixels}), inputs, DataSpec(image=ImageSpec()))
    np.testing.assert_array_equal([sample["pixels"] for sample in dataset], pixels.transpose(0, 3, 1, 2))


def test_float_arrays_named_images_go_to_an_input_of_that_name_untouched(tmp_path):
    inputs = (InputSpec("images", F32, (None, 3, 4, 4)),)
    values = np.random.default_rng(2).normal(size=(2, 3, 4, 4)).astype(np.float32)
    dataset = open_dataset(save_arrays(tmp_path / "data.npz", {"images": values}), inputs, DataSpec(image=ImageSpec()))
    np.testing.assert_array_equal([sample["images"] for sample in dataset], values)


@pytest.mark.parametrize("name", ["images", "pixels"])
def test_labels_make_a_top1_task(tmp_path, name):
    arrays = {"images": save_pictures(tmp_path / "p"), "labels": np.array([2, 0, 1], np.uint8)}
    spec = DataSpec(image=IMAGE)
    if name == "pixels":
        arrays["pixels"], spec = arrays.pop("images").transpose(0, 3, 1, 2).astype(np.float32), DataSpec()
    evaluation = open_evaluation(save_arrays(tmp_path / "data.npz", arrays), PICTURE, spec)
    assert evaluation.task is not None
    assert evaluation.task.name == "top1"
    assert evaluation.task.score(np.eye(3)[[2, 0, 0]]) == pytest.approx(200 / 3)


@pytest.mark.parametrize("values", [{"std": (0.0,)}, {"mean": (float("nan"),)}, {"mean": ()}, {"colour": 1}])
def test_an_impossible_image_section_is_refused(values):
    with pytest.raises(ValidationError):
        ImageSpec(**values)


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


def test_sound_data_has_no_warnings(tmp_path, tokenizer):
    path = write(tmp_path / "data.txt", "\n".join(LINES))
    assert open_dataset(path, TEXT, DataSpec(), tokenizer=tokenizer).warnings == ()


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
