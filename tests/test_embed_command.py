"""``qexport embed``: texts in, vectors out, and what it says when that cannot be."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
from embedders import folder, hidden_of, unit
from helpers import call, write

import qexport.runtime
from qexport.exporter.embed import Asked, embed_texts
from qexport.exporter.embedding_files import numbers, read_texts
from qexport.runtime.embedding.options import EmbedOptions


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("encoder") / "model")


def expect(found, *texts):
    np.testing.assert_allclose(found, [unit(hidden_of(text).mean(0)) for text in texts], rtol=1e-5, atol=1e-6)


def test_vectors_go_to_stdout_a_line_for_each_text(path, capsys):
    code, out, err = call(capsys, "embed", str(path), "--text", "a b", "--text", "c", "--text", "a b")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [line["text"] for line in lines] == ["a b", "c", "a b"]
    expect([line["embedding"] for line in lines], "a b", "c", "a b")
    assert "embed (3)" in err


def test_a_file_of_lines_becomes_an_array_with_a_row_for_every_line(path, tmp_path, capsys):
    file = write(tmp_path / "texts.txt", b"\xef\xbb\xbfa b\r\n\nc\x0bd\nj")
    code, out, err = call(
        capsys, "embed", str(path), "--texts", str(file), "-o", str(tmp_path / "out.npy"), "--stats", "--threads", "1"
    )
    assert (code, out) == (0, "")
    found = np.load(tmp_path / "out.npy")
    assert found.dtype == np.float32
    expect(found, "a b", "", "c d", "j")
    assert "4 texts to 4 numbers each by ort-cpu: last_hidden_state, mean pooling" in err
    assert "4 distinct texts, 13 tokens in 1 batches" in err
    assert "cut" not in err


def test_an_array_of_many_windows_is_written_as_it_comes(path, tmp_path):
    texts = [f"{a} {b}" for a in "abcdefghij" for b in "abc"]
    embed_texts(path, texts, Asked(output=tmp_path / "out.npy", options=EmbedOptions(window=7)))
    expect(np.load(tmp_path / "out.npy"), *texts)
    embed_texts(path, texts, Asked(output=tmp_path / "out.jsonl", options=EmbedOptions(window=7)))
    assert [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == texts


def test_a_table_of_pairs_gives_all_first_ones_then_all_second_ones(path, tmp_path, capsys):
    file = write(tmp_path / "pairs.csv", "sentence1,sentence2,score\na,b,1\nc,d,2\n")
    out = tmp_path / "out.jsonl"
    code, told, _ = call(capsys, "embed", str(path), "--texts", str(file), "-o", str(out), "--json")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    expect([line["embedding"] for line in lines], "a", "c", "b", "d")
    report = json.loads(told)
    assert code == 0
    assert (report["schema"], report["texts"], report["width"], report["file"]) == ("qexport.embed/1", 4, 4, str(out))
    assert report["embeddings"] is None
    assert call(capsys, "embed", str(path), "--texts", str(file), "--column", "sentence2", "-o", str(out))[0] == 0
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == ["b", "d"]


def test_json_is_one_object_that_holds_the_vectors_where_no_file_does(path, capsys):
    code, out, _ = call(capsys, "embed", str(path), "--text", "a", "--json", "--no-normalize", "--pooling", "max")
    report = json.loads(out)
    assert code == 0
    np.testing.assert_allclose(report["embeddings"], [hidden_of("a").max(0)], rtol=1e-6)
    assert (report["normalized"], report["pooling"]) == (False, "max")


def test_stdin_is_read_by_a_dash(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n")))
    code, out, _ = call(capsys, "embed", str(path), "--texts", "-")
    assert code == 0
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["a", "b"]


def test_a_vector_for_every_token_goes_to_lines_and_not_to_an_array(tmp_path, capsys):
    path = folder(tmp_path / "model", outputs="float[b,s,4] token_embeddings")
    out = tmp_path / "out.jsonl"
    assert call(capsys, "embed", str(path), "--text", "a b", "--text", "c", "-o", str(out))[0] == 0
    assert [len(json.loads(line)["embedding"]) for line in out.read_text().splitlines()] == [4, 3]
    code, _, err = call(capsys, "embed", str(path), "--text", "a", "-o", str(tmp_path / "out.npy"))
    assert (code, (tmp_path / "out.npy").exists()) == (2, False)
    assert "makes no array" in err


def test_texts_that_were_cut_are_counted(tmp_path, capsys):
    path = folder(tmp_path / "model", most=5)
    code, _, err = call(capsys, "embed", str(path), "--text", "a b c d", "--text", "a", "--stats")
    assert code == 0
    assert "1 texts cut at 5 tokens" in err
    assert call(capsys, "embed", str(path), "--text", "a b c d", "--too-long", "refuse")[0] == 5


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give texts either by --text or by --texts"),
        (["--text", "a", "--texts", "x"], 2, "give texts either by --text or by --texts"),
        (["--texts", "missing.txt"], 2, "no such file"),
        (["--text", "a", "-o", "out.bin"], 2, "the ending '.bin' is not known"),
        (["--text", "a", "--pooling", "median"], 2, "unknown pooling 'median'"),
        (["--text", "a", "--backend", "abacus"], 2, "no backend called 'abacus'"),
        (["--text", "\udcff"], 5, "text 0 is not Unicode"),
        (["--text", "a", "--max-tokens", "2"], 5, "2 tokens leave no room"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(path, capsys, arguments, code, message):
    found, out, err = call(capsys, "embed", str(path), *arguments)
    assert (found, out) == (code, "")
    assert message in err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("texts.txt", b"", "holds no text"),
        ("texts.txt", b"a\nb\xff\n", "not UTF-8 text: bad byte at place 1 of the line"),
        ("texts.csv", b"text,other\n", "holds no text"),
        ("texts.csv", b"other\na\n", "no column text"),
        ("texts.jsonl", b'{"text": 3}\n', "'text' is 3, expected a text"),
    ],
)
def test_files_without_texts_are_refused_with_the_line(path, tmp_path, capsys, name, content, message):
    file = write(tmp_path / name, content)
    code, _, err = call(capsys, "embed", str(path), "--texts", str(file))
    assert code == 5
    assert message in err
    assert name in err


def test_lines_have_no_columns(path, tmp_path, capsys):
    file = write(tmp_path / "texts.txt", "a")
    code, _, err = call(capsys, "embed", str(path), "--texts", str(file), "--column", "text")
    assert code == 2
    assert "lines have no column 'text'" in err


def test_an_old_file_stays_when_embedding_fails(path, tmp_path, capsys):
    out = write(tmp_path / "out.npy", "old")
    assert call(capsys, "embed", str(path), "--text", "a", "--text", "\udcff", "-o", str(out))[0] == 5
    assert out.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.npy"]


def test_numbers_are_the_shortest_that_are_read_as_the_same_float32():
    values = np.random.default_rng(0).standard_normal(500).astype(np.float32) * np.float32(10) ** np.arange(
        -30, 20, 0.1
    )
    values = values.astype(np.float32)
    found = json.loads(json.dumps(numbers(values)))
    np.testing.assert_array_equal(np.array(found, np.float64).astype(np.float32), values)
    assert numbers(np.array([[0.1, 0.2]], np.float32)) == [[0.1, 0.2]]


def test_lines_are_lines_whatever_unicode_calls_one(tmp_path):
    assert read_texts(write(tmp_path / "a", "a\u2028b\nc\x85\n")) == ["a\u2028b", "c\x85"]


def test_the_runtime_offers_embedding_by_name(path):
    expect(qexport.runtime.embed(path, ["a", "b"]), "a", "b")
    assert set(dir(qexport.runtime)) >= {"Batcher", "EmbedOptions", "Embedder", "embed", "open_embedder"}
    with pytest.raises(AttributeError, match="no attribute 'embedd'"):
        qexport.runtime.embedd  # noqa: B018 the point is a name that does not exist
