"""Embedding: batches of the least cost, pooling by its definition, and the same vectors whatever runs together."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from embedders import TABLE, WORDS, folder, hidden_of, ids_of, opened, spied, unit
from encoder_models import truth
from encoder_models import write as write_encoder
from helpers import exported
from hypothesis import given, settings
from hypothesis import strategies as st

from qexport.errors import BuildFailed, DataInvalid, UsageError
from qexport.runtime.embedding.embedder import CPU_TOKENS, embed
from qexport.runtime.embedding.options import EmbedOptions, EmbedStats
from qexport.runtime.embedding.packing import pack
from qexport.runtime.embedding.pooling import POOLINGS
from qexport.runtime.session import SessionOptions

LETTERS = list(WORDS)[3:]
TEXTS = st.lists(st.lists(st.sampled_from(LETTERS), max_size=12).map(" ".join), max_size=12)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("encoder") / "model")


# ---------------------------------------------------------------- packing


def splits(items):
    """Every way to put items into batches."""
    if not items:
        yield []
        return
    first, *rest = items
    for split in splits(rest):
        yield [[first], *split]
        for place, batch in enumerate(split):
            yield [*split[:place], [first, *batch], *split[place + 1 :]]


def cost(batches, lengths, overhead):
    return sum(overhead + len(batch) * max(lengths[i] for i in batch) for batch in batches)


def allowed(batch, lengths, budget, most):
    fits = len(batch) * max(lengths[i] for i in batch) <= budget and len(batch) <= (most or len(batch))
    return fits or len(batch) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=7), st.integers(1, 80), st.none() | st.integers(1, 4), st.integers(0, 20))
def test_no_other_split_costs_less(lengths, budget, most, overhead):
    found = [batch.tolist() for batch in pack(lengths, budget, most, overhead)]
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert all(allowed(batch, lengths, budget, most) for batch in found)
    every = (s for s in splits(range(len(lengths))) if all(allowed(batch, lengths, budget, most) for batch in s))
    assert cost(found, lengths, overhead) == min(cost(split, lengths, overhead) for split in every)


def test_long_batches_run_first_so_that_memory_is_taken_once():
    widths = [max(batch.tolist()) for batch in pack(range(1, 200), 300)]
    assert widths == sorted(widths, reverse=True)


# ---------------------------------------------------------------- pooling

DEFINITIONS = {
    "mean": lambda rows: rows.mean(0),
    "cls": lambda rows: rows[0],
    "max": lambda rows: rows.max(0),
    "lasttoken": lambda rows: rows[-1],
    "mean_sqrt_len_tokens": lambda rows: rows.sum(0) / len(rows) ** 0.5,
    "weightedmean": lambda rows: np.average(rows, axis=0, weights=range(1, len(rows) + 1)),
}


@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_is_its_definition_and_padding_never_counts(name):
    rng, lengths = np.random.default_rng(0), [5, 1, 7, 3]
    hidden = rng.standard_normal((4, 7, 6)).astype(np.float32) - 2
    mask = (np.arange(7) < np.array(lengths)[:, None]).astype(np.float32)
    expected = [DEFINITIONS[name](row[:length].astype(float)) for row, length in zip(hidden, lengths, strict=True)]
    hidden[mask == 0] = 1e6
    np.testing.assert_allclose(POOLINGS[name](hidden, mask), expected, rtol=2e-5)


@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_of_hidden_states_is_that_of_each_text_alone(encoder, name):
    texts = ["a b c d", "j", "c c a", "", "a b c d e f g h i j"]
    expected = [DEFINITIONS[name](hidden_of(text)) for text in texts]
    found = opened(encoder, pooling=name, normalize=False, batch_tokens=30).embed(texts)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    found = opened(encoder, pooling=name).embed(texts)
    np.testing.assert_allclose(found, [unit(vector) for vector in expected], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- vectors


@settings(max_examples=40, deadline=None)
@given(texts=TEXTS, budget=st.integers(1, 200), window=st.integers(1, 9))
def test_vectors_do_not_depend_on_what_runs_together(encoder, texts, budget, window):
    with opened(encoder, batch_tokens=budget, window=window) as embedder:
        found, stats = embedder.measure(texts)
        assert found.shape == (len(texts), 4)
        assert found.dtype == np.float32
        for vector, text in zip(found, texts, strict=True):
            np.testing.assert_allclose(vector, unit(hidden_of(text).mean(0)), rtol=1e-5, atol=1e-6)
    windows = [texts[at : at + window] for at in range(0, len(texts), window)]
    distinct = [text for part in windows for text in dict.fromkeys(part)]
    assert (stats.texts, stats.distinct) == (len(texts), len(distinct))
    assert stats.tokens == sum(len(ids_of(text)) for text in distinct)
    assert stats.cells >= stats.tokens


def test_texts_of_the_same_tokens_are_computed_once(encoder):
    embedder = opened(encoder)
    spy = spied(embedder)
    found = embedder.embed(["a b", "c", "a  b", "c", "unknown", "also unknown", "strange"])
    assert sum(rows for rows, _ in spy.batches) == 4
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[4], found[6])


def test_batches_stay_within_the_budget_unless_one_text_does_not(encoder):
    embedder = opened(encoder, batch_tokens=24)
    spy = spied(embedder)
    embedder.embed([" ".join(LETTERS[:n] * 5) for n in range(1, 8)] + [f"{a} {b}" for a in LETTERS for b in LETTERS])
    assert all(rows * width <= 24 or rows == 1 for rows, width in spy.batches)
    assert len(spy.batches) > 10


def test_a_stream_reads_its_texts_as_they_are_needed(encoder):
    taken = []

    def texts():
        for number in range(10):
            taken.append(number)
            yield LETTERS[number]

    with opened(encoder, window=3) as embedder:
        stats = EmbedStats()
        parts = embedder.stream(texts(), stats)
        assert (len(next(parts)), taken, stats.texts) == (3, [0, 1, 2], 3)
        rest = list(parts)
        assert [len(part) for part in rest] == [3, 3, 1]
        np.testing.assert_allclose(rest[-1][0], unit(hidden_of("j").mean(0)), rtol=1e-5)


def test_long_texts_are_cut_and_counted_or_refused(tmp_path):
    path = folder(tmp_path / "model", most=6)
    texts = ["a", "b c d e", "a b c d e f g"]
    found, stats = opened(path).measure(texts)
    np.testing.assert_allclose(found[2], unit(hidden_of(texts[2], 6).mean(0)), rtol=1e-5)
    assert stats.cut == 1
    with pytest.raises(DataInvalid, match="text 2 has more than 6 tokens"):
        opened(path, too_long="refuse").embed(texts)
    with pytest.raises(DataInvalid, match="text 2 has more than 6 tokens"):
        opened(path, too_long="refuse", window=2).embed(texts)
    assert opened(path, max_tokens=9).measure(texts)[1].cut == 0


def test_an_empty_text_is_what_stands_around_it_and_refused_where_nothing_does(tmp_path):
    np.testing.assert_allclose(opened(folder(tmp_path / "one")).embed([""])[0], unit(hidden_of("").mean(0)), rtol=1e-5)
    with pytest.raises(DataInvalid, match="text 1 has no tokens: ''"):
        opened(folder(tmp_path / "two", around=False)).embed(["a", ""])


def test_no_texts_have_no_vectors(encoder, tmp_path):
    assert opened(encoder).embed([]).shape == (0, 4)
    free = folder(tmp_path / "model", outputs="float[b,s,w] last_hidden_state")
    assert opened(free).embed([]).shape == (0, 4)


def test_texts_that_are_none_are_refused(encoder):
    embedder = opened(encoder)
    with pytest.raises(UsageError, match="texts is one text"):
        embedder.embed("abc")
    with pytest.raises(DataInvalid, match="text 1 is not Unicode"):
        embedder.embed(["a", "\ud800"])
    with pytest.raises(DataInvalid, match="text 0 is NoneType"):
        embedder.embed([None])
    with pytest.raises(DataInvalid, match="text 1 is tuple"):  # which the library would take as a pair
        embedder.embed(["a", ("b", "c")])
    with pytest.raises(UsageError, match="texts is a int"):
        embedder.embed(5)


def test_vectors_that_are_no_numbers_are_told_with_their_text(tmp_path):
    table = TABLE.copy()
    table[WORDS["c"]] = np.nan
    with pytest.raises(BuildFailed, match="the vectors of 2 texts hold NaN or Inf, the first is text 1"):
        opened(folder(tmp_path / "model", table=table)).embed(["a", "b c", "d", "c"])
    with pytest.raises(BuildFailed, match="the vectors of 1 texts hold NaN or Inf, the first is text 3"):
        opened(tmp_path / "model", window=2).embed(["a", "b", "d", "c"])


def test_a_model_with_a_vector_for_every_token_gives_those_of_the_text(tmp_path):
    path = folder(tmp_path / "model", outputs="float[b,s,4] token_embeddings")
    found = opened(path).embed(["a b c", "", "j"])
    assert [len(vectors) for vectors in found] == [5, 2, 3]
    expected = [row / np.linalg.norm(row) for row in hidden_of("a b c")]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    assert opened(path).embed([]) == []


def test_a_closed_embedder_says_so_and_waits_for_what_runs(encoder):
    embedder = opened(encoder)
    spy = spied(embedder)
    spy.go.clear()
    found = []
    run = threading.Thread(target=lambda: found.append(embedder.embed(["a"])))
    run.start()
    assert spy.started.acquire(timeout=20)
    close = threading.Thread(target=embedder.close)
    close.start()
    close.join(0.1)
    assert close.is_alive()
    assert spy.closed == 0
    spy.go.set()
    run.join(20)
    close.join(20)
    assert found[0].shape == (1, 4)
    embedder.close()
    with pytest.raises(UsageError, match="the embedder is closed"):
        embedder.embed(["a"])


def test_many_threads_share_one_embedder(encoder):
    texts = [f"{a} {b} {a}" for a in LETTERS for b in LETTERS]
    with opened(encoder, batch_tokens=40) as embedder:
        expected, found = embedder.embed(texts), {}
        threads = [threading.Thread(target=lambda n=n: found.update({n: embedder.embed(texts[n:])})) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, vectors in found.items():
        np.testing.assert_allclose(vectors, expected[number:], rtol=1e-6, atol=1e-7)


def test_the_budget_follows_the_threads(encoder):
    for threads in (1, 3):
        assert opened(encoder, session=SessionOptions(threads=threads)).budget == threads * CPU_TOKENS


@pytest.mark.parametrize("task", ["embedding", "multi-vector"])
def test_what_export_writes_is_embedded_as_the_definition_says(tmp_path, task):
    source = write_encoder(tmp_path / "source", "bert", task)
    folder(tmp_path / "words")
    (source / "tokenizer.json").write_bytes((tmp_path / "words/tokenizer.json").read_bytes())
    exported(source, tmp_path / "out")

    texts = ["a b c", "j", "a", "c d e f g h i j"]
    found = embed(tmp_path / "out", texts, EmbedOptions(batch_tokens=20))
    for vector, text in zip(found, texts, strict=True):
        ids = np.array([ids_of(text)])
        sample = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        expected = truth(source, sample)["sentence_embedding" if task == "embedding" else "token_embeddings"][0]
        np.testing.assert_allclose(vector, expected, atol=2e-5)
