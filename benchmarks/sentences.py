"""One scorer for every sentence encoder: Spearman on STS-B and cosine to the float model's embeddings.

Sentences are truncated at 128 tokens, sorted by length, run in batches of 32 padded to the longest, mean-pooled from
``last_hidden_state`` and scaled to length one; the score of a pair is the cosine.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import SAMPLES, minilm_folder
from numpy.typing import NDArray

MAX_LENGTH = 128
BATCH = 32
HIDDEN = "last_hidden_state"  # of the model's outputs, the one that is pooled
Feeds = dict[str, NDArray[Any]]
Embeddings = NDArray[np.float32]  # [sentences, hidden]


def read_column(path: Path, column: str) -> list[str]:
    """One column of a CSV file with a header."""
    with path.open(encoding="utf-8", newline="") as file:
        return [row[column] for row in csv.DictReader(file)]


def tokenize(sentences: Sequence[str]) -> list[list[int]]:
    """Token numbers without padding."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_LENGTH)
    return [encoding.ids for encoding in tokenizer.encode_batch(list(sentences))]


def pad(tokens: Sequence[Sequence[int]], length: int | None = None) -> Feeds:
    """A batch, padded with masked zeros to its longest sentence or to ``length``."""
    width = length or max(map(len, tokens))
    ids = np.zeros((len(tokens), width), np.int64)
    mask = np.zeros_like(ids)
    for row, sentence in enumerate(tokens):
        ids[row, : len(sentence)], mask[row, : len(sentence)] = sentence, 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def batches(tokens: Sequence[Sequence[int]]) -> Iterator[tuple[NDArray[np.intp], Feeds]]:
    """Batches by length, with the positions of their sentences."""
    order = np.argsort([len(sentence) for sentence in tokens], kind="stable")
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        yield chosen, pad([tokens[i] for i in chosen])


def embed(model: Path, tokens: Sequence[Sequence[int]]) -> Embeddings:
    """Embeddings of all sentences by onnxruntime with its default settings."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return pooled_by(lambda feeds: session.run([HIDDEN], {name: feeds[name] for name in names})[0], tokens)


def pooled_by(run: Callable[[Feeds], NDArray[Any]], tokens: Sequence[Sequence[int]]) -> Embeddings:
    """Embeddings of all sentences by whatever computes the hidden states of a batch."""
    rows: dict[int, Embeddings] = {}
    for chosen, feeds in batches(tokens):
        hidden = run(feeds)
        mask = feeds["attention_mask"][..., None]
        pooled = (hidden.astype(np.float32) * mask).sum(1) / mask.sum(1)
        rows |= dict(zip(chosen.tolist(), pooled / np.linalg.norm(pooled, axis=1, keepdims=True), strict=True))
    return np.stack([rows[i] for i in range(len(tokens))])


def score(reference: Path, models: Sequence[Path]) -> list[dict[str, float]]:
    """Spearman x100 on the STS-B test split, mean and worst cosine to ``reference``, for every model."""
    tokens, gold = test_split()
    truth = embed(reference, tokens)
    return [judge(embed(model, tokens), truth, gold) for model in models]


def judge(found: Embeddings, truth: Embeddings, gold: Sequence[float]) -> dict[str, float]:
    """What embeddings of the pairs' first and then second sentences are worth beside those of the float model."""
    from scipy.stats import spearmanr

    pairs = (found[: len(gold)] * found[len(gold) :]).sum(1)
    cosine = (found * truth).sum(1)
    spearman = 100 * float(spearmanr(pairs, gold).statistic)
    return {"spearman": spearman, "mean": float(cosine.mean()), "worst": float(cosine.min())}


def test_split() -> tuple[list[list[int]], list[float]]:
    """Tokens of the first sentences of STS-B test, then of the second ones, and the score of each pair."""
    path = SAMPLES / "data/stsb-test.csv"
    gold = [float(text) for text in read_column(path, "score")]
    return tokenize(read_column(path, "sentence1") + read_column(path, "sentence2")), gold


def calibration_tokens() -> list[list[int]]:
    """The 512 calibration sentences, as tokens."""
    return tokenize(read_column(SAMPLES / "data/stsb-calibration.csv", "sentence"))
