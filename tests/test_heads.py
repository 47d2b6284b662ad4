"""Which head an encoder leaves with, and what stands behind its hidden states."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from encoder_models import (
    ARCHITECTURES,
    LABELS,
    TASKS,
    WIDTH,
    feeds,
    graph,
    listed,
    settings,
    tensors,
    truth,
    write,
)
from folders import answers
from safetensors.numpy import load_file, save_file

from qexport.calibration.reading.spec import scores_tokens
from qexport.errors import ModelInvalid, UnsafeInput, UsageError
from qexport.exporter.load import load_source
from qexport.passes.portable import LABELS as LABELS_KEY

IDS = [[5, 14, 15, 9, 26, 7], [31, 8, 20, 40, 6, 11]]
SAMPLE = feeds("bert", IDS, [6, 3])
RNG = np.random.default_rng(5)
TANH, IDENTITY = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"
RELU, SIGMOID = "torch.nn.modules.activation.ReLU", "torch.nn.modules.activation.Sigmoid"
FUNCTIONS = {
    TANH: np.tanh,
    IDENTITY: lambda x: x,
    RELU: lambda x: np.maximum(x, 0),
    SIGMOID: lambda x: 1 / (1 + np.exp(-x)),
}
OUTPUTS = {
    "embedding": {"last_hidden_state": 3, "sentence_embedding": 2},
    "classification": {"logits": 2},
    "token-classification": {"logits": 3},
    "multi-vector": {"token_embeddings": 3},
}
MISSING = {
    "classification": "pooler.dense.weight",
    "token-classification": "classifier.weight",
    "multi-vector": "linear.weight",
}


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def hidden(path):
    return answers(graph(path, task="embedding"), SAMPLE)["last_hidden_state"]


# ---------------------------------------------------------------- which


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_head_is_that_of_the_architecture_or_the_one_asked_for(tmp_path, family, task, asked):
    path = write(tmp_path / "model", family, task, **({"architectures": None} if asked else {}))
    model = graph(path, task=task if asked else None)
    assert {value.name: len(value.shape) for value in model.graph.outputs} == OUTPUTS[task]


@pytest.mark.parametrize("task", TASKS)
def test_every_checkpoint_is_an_embedding_when_asked_for(tmp_path, task):
    path = write(tmp_path / "model", "bert", task)
    model = graph(path, task="embedding")
    assert {value.name for value in model.graph.outputs} == {"last_hidden_state", "sentence_embedding"}
    assert not any("classifier" in name or "linear" in name for name in model.graph.initializers)


@pytest.mark.parametrize("architectures", [["BertForMaskedLM"], ["SomethingElse"], [], None, "BertModel", [3]])
def test_any_other_architecture_is_an_embedding(tmp_path, architectures):
    model = graph(write(tmp_path / "model", "bert", architectures=architectures))
    assert [value.name for value in model.graph.outputs] == ["last_hidden_state", "sentence_embedding"]


@pytest.mark.parametrize("task", MISSING)
def test_a_head_without_weights_is_refused_with_the_tensor_and_the_tasks_there_are(tmp_path, task):
    path = write(tmp_path / "model", "bert")
    with pytest.raises(ModelInvalid, match=rf"no head for '{task}': weight '{MISSING[task]}' is missing") as caught:
        graph(path, task=task)
    assert caught.value.hint == "tasks that it has weights for: embedding"


def test_an_architecture_whose_head_is_missing_is_refused_and_not_guessed(tmp_path):
    path = write(tmp_path / "model", "bert", architectures=["BertForSequenceClassification"])
    with pytest.raises(ModelInvalid, match=r"'pooler\.dense\.weight' is missing.*weights for: embedding"):
        load_source(path)


def test_the_head_for_tokens_is_not_taken_for_one_for_sentences(tmp_path):
    sentences = write(tmp_path / "sentences", "bert", "classification")
    with pytest.raises(ModelInvalid, match="BertForSequenceClassification has one for 'classification'") as caught:
        graph(sentences, task="token-classification")
    assert caught.value.hint == "tasks that it has weights for: embedding, classification"
    tokens = write(tmp_path / "tokens", "distilbert", "token-classification")
    with pytest.raises(ModelInvalid, match=r"'pre_classifier\.weight' is missing.*: embedding, token-classification"):
        graph(tokens, task="classification")


def test_an_unknown_task_is_a_usage_error_that_names_the_known(tmp_path):
    with pytest.raises(UsageError, match=r"unknown task 'colbert'.*embedding, classification, token-"):
        graph(write(tmp_path / "model", "bert"), task="colbert")


# ---------------------------------------------------------------- labels


def test_the_model_tells_its_labels_in_order(tmp_path):
    names = {"2": "neutral", "0": "négatif", "1": "positive"}
    path = write(tmp_path / "model", "roberta", "classification", id2label=names)
    assert json.loads(graph(path).metadata_props[LABELS_KEY]) == ["négatif", "positive", "neutral"]
    assert LABELS_KEY not in graph(path, task="embedding").metadata_props


def test_without_names_labels_are_numbered_and_never_taken_for_tokens(tmp_path):
    model = graph(write(tmp_path / "model", "bert", "token-classification", id2label=None))
    assert json.loads(model.metadata_props[LABELS_KEY]) == [f"LABEL_{number}" for number in range(LABELS)]
    assert not scores_tokens(model)


@pytest.mark.parametrize("names", [{"0": "a", "1": "b"}, {"1": "a", "2": "b", "3": "c"}, ["a", "b", "c"], {}])
def test_labels_that_are_not_those_of_the_weights_are_refused(tmp_path, names):
    path = write(tmp_path / "model", "distilbert", "classification", id2label=names)
    with pytest.raises(ModelInvalid, match=rf"'id2label' names \d labels, the weights tell {LABELS} apart"):
        graph(path)


# ---------------------------------------------------------------- multi-vector


def test_colbert_vectors_are_projected_of_length_one_and_zero_behind_the_row(tmp_path):
    path = write(tmp_path / "model", "bert", "multi-vector")
    vectors = answers(graph(path), SAMPLE)["token_embeddings"]
    expected = unit(hidden(path) @ tensors("bert", "multi-vector")["linear.weight"].T)
    expected[1, 3:] = 0
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_array_equal(vectors[1, 3:], 0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_dense_modules_without_a_pooling_are_colbert_too(tmp_path, function):
    path, one, two, bias = write(tmp_path / "model", "bert"), normal(16, WIDTH), normal(8, 16), normal(16)
    listed(path, "Transformer", "Dense", "Dense", dense=[(function, one, bias), (IDENTITY, two)])
    vectors = answers(graph(path), SAMPLE)["token_embeddings"]
    expected = unit(FUNCTIONS[function](hidden(path) @ one.T + bias) @ two.T)
    expected[1, 3:] = 0
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(vectors, truth(path, SAMPLE)["token_embeddings"], atol=1e-5)


def test_the_weights_of_dense_modules_belong_to_the_digest_and_may_be_lazy(tmp_path):
    found = []
    for name, factor in (("a", 1), ("b", 2), ("c", 1)):
        path = write(tmp_path / name, "bert")
        listed(path, "Transformer", "Dense", dense=[(IDENTITY, factor * np.eye(8, WIDTH, dtype=np.float32))])
        found.append(load_source(path).info.digest)
    assert found[0] == found[2] != found[1]
    eager, lazy = (answers(graph(path, lazy=flag), SAMPLE)["token_embeddings"] for flag in (False, True))
    np.testing.assert_array_equal(eager, lazy)


# ---------------------------------------------------------------- dense layers on top of a sentence


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token"])
@pytest.mark.parametrize("last", [(), ("Normalize",)])
def test_dense_modules_behind_the_pooling_change_the_sentence(tmp_path, pooling, last):
    path, weight, bias = write(tmp_path / "model", "bert"), normal(12, WIDTH), normal(12)
    listed(path, "Transformer", "Pooling", "Dense", *last, pooling=pooling, dense=[(TANH, weight, bias)])
    found, tokens = answers(graph(path), SAMPLE), hidden(path)
    mean = np.stack([tokens[0].mean(0), tokens[1, :3].mean(0)]) if pooling == "mean_tokens" else tokens[:, 0]
    np.testing.assert_allclose(found["sentence_embedding"], unit(np.tanh(mean @ weight.T + bias)), atol=1e-5)
    np.testing.assert_allclose(found["sentence_embedding"], truth(path, SAMPLE)["sentence_embedding"], atol=1e-5)


def test_dense_modules_in_half_precision(tmp_path):
    path, weight = write(tmp_path / "model", "bert"), normal(12, WIDTH)
    listed(path, "Transformer", "Pooling", "Dense", pooling="mean_tokens", dense=[(TANH, weight, normal(12))])
    found = answers(graph(path, dtype=ir.DataType.FLOAT16), SAMPLE)["sentence_embedding"]
    np.testing.assert_allclose(found, truth(path, SAMPLE)["sentence_embedding"], atol=5e-3)


def test_a_pooling_whose_length_matters_does_not_go_with_dense_modules(tmp_path):
    path = write(tmp_path / "model", "bert")
    listed(path, "Transformer", "Pooling", "Dense", pooling="mean_sqrt_len_tokens", dense=[(TANH, normal(12, WIDTH))])
    with pytest.raises(ModelInvalid, match=r"'mean_sqrt_len_tokens' is not supported.*supported: mean, cls"):
        graph(path)


def test_a_classifier_that_is_listed_as_a_sentence_encoder_is_one_only_without_its_head(tmp_path):
    name = ["BertForSequenceClassification"]
    bare = listed(write(tmp_path / "bare", "bert", architectures=name), "Transformer", "Pooling", pooling="cls_token")
    assert graph(bare).graph.outputs[0].name == "last_hidden_state"
    whole = listed(write(tmp_path / "whole", "bert", "classification"), "Transformer")
    assert graph(whole).graph.outputs[0].name == "logits"
    for path in (bare, whole):
        assert set(truth(path, SAMPLE)) == {value.name for value in graph(path).graph.outputs}


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (("Transformer", "Pooling", "Normalize", "Dense"), "modules in the order .*supported: Transformer, Pooling"),
        (("Transformer", "Dense", "Pooling"), "modules in the order"),
        (("Transformer", "Pooling", "Pooling"), "modules in the order"),
    ],
)
def test_modules_in_another_order_are_refused(tmp_path, order, message):
    path = write(tmp_path / "model", "bert")
    listed(path, *order, pooling="cls_token", dense=[(TANH, normal(12, WIDTH))])
    with pytest.raises(ModelInvalid, match=message):
        graph(path)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "torch.nn.modules.activation.GELU"}, "GELU' of a Dense module is not supported"),
        ({"activation_function": "mine.Tanh"}, "'mine.Tanh' of a Dense module.*Identity, Tanh, ReLU, Sigmoid"),
        ({"use_residual": True}, "use_residual of a Dense module is not supported"),
        ({"in_features": 31}, "the module reads 31 features, 32 come to it"),
        ({"in_features": None}, "field 'in_features'"),
        ({"out_features": 9}, r"'1_Dense\.linear\.weight' is \[8, 32\].*asks for \[9, 32\]"),
        ({"bias": True}, r"'1_Dense\.linear\.bias' is missing"),
    ],
)
def test_dense_modules_that_are_not_supported_are_named(tmp_path, changes, message):
    path = listed(write(tmp_path / "model", "bert"), "Transformer", "Dense", dense=[(IDENTITY, normal(8, WIDTH))])
    edit(path / "1_Dense" / "config.json", **changes)
    with pytest.raises(ModelInvalid, match=message):
        graph(path)


def test_n03_a_dense_module_in_a_pickle_or_elsewhere_is_unsafe(tmp_path):
    path = listed(write(tmp_path / "model", "bert"), "Transformer", "Dense", dense=[(IDENTITY, normal(8, WIDTH))])
    weights = path / "1_Dense" / "model.safetensors"
    weights.rename(tmp_path / "secret")
    weights.symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeInput, match="leads out of its folder"):
        graph(path)
    weights.unlink()
    (tmp_path / "secret").rename(path / "1_Dense" / "pytorch_model.bin")
    with pytest.raises(UnsafeInput, match=r"a pickle, which is not read \(pytorch_model\.bin\)"):
        graph(path)


# ---------------------------------------------------------------- torch


@pytest.mark.torch
def test_colbert_of_torch_is_the_same(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path = write(tmp_path / "model", "bert", "multi-vector")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps(settings("bert")))
    stored = load_file(path / "model.safetensors")
    inner = {name.removeprefix("bert."): array for name, array in stored.items() if name.startswith("bert.")}
    save_file(inner, bare / "model.safetensors", metadata={"format": "pt"})
    encoder = transformers.BertModel.from_pretrained(bare, add_pooling_layer=False).eval()
    with torch.no_grad():
        out = encoder(**{name: torch.from_numpy(array) for name, array in SAMPLE.items()}).last_hidden_state
        out = torch.nn.functional.linear(out, torch.from_numpy(stored["linear.weight"]))
        out = torch.nn.functional.normalize(out * torch.from_numpy(SAMPLE["attention_mask"])[..., None], dim=2)
    np.testing.assert_allclose(answers(graph(path), SAMPLE)["token_embeddings"], out.numpy(), atol=1e-5)
