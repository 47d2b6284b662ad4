"""all-MiniLM-L6-v2, built from config and safetensors, against what transformers answers (tests/golden)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from tokenizers import Tokenizer

from qexport.exporter.load import load_model

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).with_name("golden") / "minilm-16.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def answers(minilm, golden, tmp_path_factory):
    """Hidden states and embeddings of all sentences in one batch, padded to 128."""
    path = tmp_path_factory.mktemp("minilm") / "model.onnx"
    ir.save(load_model(minilm), path)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    ids, mask = golden["input_ids"], golden["attention_mask"]
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return session.run(["last_hidden_state", "sentence_embedding"], feeds)


def test_hidden_states_equal_those_of_transformers(answers, golden):
    for row in range(4):
        truth = golden[f"last_hidden_state_{row}"]
        np.testing.assert_allclose(answers[0][row, : len(truth)], truth, rtol=0, atol=TOLERANCE)


def test_sentence_embeddings_equal_those_of_transformers_though_padded(answers, golden):
    np.testing.assert_allclose(answers[1], golden["sentence_embedding"], rtol=0, atol=TOLERANCE)


def test_the_golden_tokens_are_those_of_the_model_s_tokenizer(minilm, golden):
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(golden["input_ids"].shape[1])
    for sentence, ids, mask in zip(golden["sentences"], golden["input_ids"], golden["attention_mask"], strict=True):
        assert tokenizer.encode(str(sentence)).ids == ids[mask == 1].tolist()
    assert {2, 128} <= set(golden["attention_mask"].sum(1).tolist())  # an empty sentence and a truncated one
