"""Text as data: every format gives the same token ids, pairs carry a task, and bad lines are named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from qexport.calibration.reading.data import DataSpec, FileDataset, InputSpec, open_dataset
from qexport.calibration.reading.evaluation import open_evaluation
from qexport.errors import DataInvalid

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
WORDS = ["[UNK]", "[CLS]", "[SEP]", "a", "man", "dog", "runs", "eats", "the", "fast"]
TEXT = tuple(InputSpec(name, I64, (None, None)) for name in ("input_ids", "attention_mask", "token_type_ids"))
IDS = TEXT[:1]
X = (InputSpec("x", F32, (None, 3)),)


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


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def ids(dataset: FileDataset) -> list[list[int]]:
    return [sample["input_ids"].tolist() for sample in dataset]


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


# ---------------------------------------------------------------- D04: text that does not fit


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "name,body\nx,y\n", "no column text or sentence or .*found 'name', 'body'"),
        ("a.csv", "text\n", "holds no text"),
        ("a.csv", "", "holds no text"),
        ("a.csv", "text,n\na,1\nb\n", "line 3 has 1 columns, expected 2"),
        ("a.csv", 'text\n"a\n', "unexpected end of data"),
        ("a.csv", "text\n" + "a" * 200_000, "field larger than field limit"),
        ("a.txt", b"a b\n\xff\xfe\n", "utf-8"),
        ("a.txt", "a" * (2 << 20), "a line is longer than"),
        ("a.jsonl", '{"text": "a"}\n{"text": 1}\n', "line 2: 'text' is 1, expected a text"),
        ("a.jsonl", '{"text": "a"}\n{"words": "a"}\n', "line 2: 'text' is None, expected a text"),
        ("a.jsonl", '{"text": "a"}\n["a"]\n', "line 2 is not an object"),
        ("a.jsonl", '{"text": "a"\n', "cannot be read"),
        ("a.jsonl", "[" * 100_000, "cannot be read"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "line 1: the text is not Unicode"),
    ],
)
def test_d04_text_that_cannot_be_read_names_the_line(tmp_path, tokenizer, name, content, message):
    with pytest.raises(DataInvalid, match=message):
        open_dataset(write(tmp_path / name, content), IDS, DataSpec(), tokenizer=tokenizer)


def test_d04_text_without_a_tokenizer_says_how_to_give_one(tmp_path):
    with pytest.raises(DataInvalid, match=r"needs a tokenizer \(set data\.tokenizer"):
        open_dataset(write(tmp_path / "a.txt", "a"), IDS, DataSpec())


@pytest.mark.parametrize("content", [None, b"{}", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_d04_a_file_that_is_no_tokenizer_is_invalid(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        write(path, content)
    with pytest.raises(DataInvalid, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        open_dataset(write(tmp_path / "a.txt", "a"), IDS, DataSpec(), tokenizer=path)


@pytest.mark.parametrize("inputs", [X, (*IDS, *X), IDS[:0], (InputSpec("input_ids", I64, (None, None, 2)),)])
def test_d04_text_is_not_for_a_model_that_reads_something_else(tmp_path, tokenizer, inputs):
    with pytest.raises(DataInvalid, match="text gives input_ids, attention_mask, token_type_ids"):
        open_dataset(write(tmp_path / "a.txt", "a"), inputs, DataSpec(), tokenizer=tokenizer)


@pytest.mark.parametrize("content", ["a,b,1\nb,a,x\n", "a,b,1\nb,a,nan\n", "a,b,2\nb,a,2\n"])
def test_d04_scores_must_be_numbers_that_differ(tmp_path, tokenizer, content):
    with pytest.raises(DataInvalid, match="score"):
        open_evaluation(write(tmp_path / "a.csv", content), IDS, DataSpec(), tokenizer=tokenizer)


def test_d04_a_text_without_tokens_is_named(tmp_path):
    made = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": "  "}\n')
    with pytest.raises(DataInvalid, match="line 3: the text has no tokens"):
        open_dataset(path, IDS, DataSpec(), tokenizer=tmp_path)
