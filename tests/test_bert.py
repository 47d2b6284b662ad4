import hashlib
import json
import math
import os
import subprocess

import folders
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import qexport
from qexport.errors import IntegrityError, ModelInvalid, UnsafeInput, UsageError
from qexport.exporter.load import load_model, load_source
from qexport.exporter.options import BuildOptions

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
    return folders.save(path, config, weights() if tensors is None else tensors)


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
        ({"model_type": "gpt9"}, "unknown model_type 'gpt9'.*known: bert, .*distilbert.*roberta"),
        ({"hidden_act": "swish"}, "field 'hidden_act'"),
        ({"position_embedding_type": "relative_key"}, "field 'position_embedding_type'"),
        ({"hidden_size": -1}, "field 'hidden_size'"),
        ({"num_attention_heads": 5}, "heads"),
        ({"is_decoder": True}, "field 'is_decoder'"),
        ({"add_cross_attention": True}, "field 'add_cross_attention'"),
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


def pooled(path, tensors=None, modules=("Transformer", "Pooling", "Normalize"), **settings):
    """A sentence-transformers folder with this pooling."""
    write(path, tensors=tensors)
    places = {"Transformer": "", "Pooling": "1_Pooling"}
    listed = [{"type": f"sentence_transformers.models.{name}", "path": places.get(name, name)} for name in modules]
    (path / "modules.json").write_text(json.dumps(listed))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **settings}))
    return path


def embedding(path):
    return session(load_model(path)).run(None, feeds([3, 14, 15, 9]))[1][0]


@pytest.mark.parametrize("modules", [("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize")])
@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, True),
        ({"pooling_mode": "cls"}, True),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, False),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, False),
        ({"pooling_mode": ["mean"]}, False),
        ({}, False),
    ],
)
def test_the_folder_says_how_a_sentence_is_pooled(tmp_path, settings, first, modules):
    path = pooled(tmp_path / "bert", modules=modules, **settings)
    hidden = numpy_bert(weights(), np.array([3, 14, 15, 9]))
    vector = hidden[0] if first else hidden.mean(axis=0)
    np.testing.assert_allclose(embedding(path), vector / np.linalg.norm(vector), atol=1e-5)


def test_the_pooling_is_read_without_a_list_of_modules_and_changes_the_digest(tmp_path):
    first = pooled(tmp_path / "first", pooling_mode_cls_token=True)
    mean = pooled(tmp_path / "mean", pooling_mode_mean_tokens=True)
    for path in (first, mean):
        (path / "modules.json").unlink()
    assert np.abs(embedding(first) - embedding(mean)).max() > 1e-4
    assert load_source(first).info.digest != load_source(mean).info.digest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling_mode_max_tokens": True}, "pooling 'max' is not supported.*supported: mean, cls"),
        ({"pooling_mode_lasttoken": True}, "'lasttoken'"),
        ({"pooling_mode_weightedmean_tokens": True}, "'weightedmean'"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, r"'cls' \+ 'mean'"),
        ({"pooling_mode": "attention"}, "'attention'"),
        ({"modules": ("Transformer", "Pooling", "LSTM")}, "LSTM' is not supported.*Pooling, Dense, Normalize"),
        ({"modules": ("Pooling", "Transformer")}, "modules in the order Pooling, Transformer.*in this order"),
    ],
)
def test_a_pooling_that_is_not_supported_is_named(tmp_path, settings, message):
    with pytest.raises(ModelInvalid, match=message):
        load_model(pooled(tmp_path / "bert", **settings))


@pytest.mark.parametrize("text", ["{", "{}", "[3]", '[{"type": 1, "path": ""}]', '[{"type": "Pooling"}]', "[" * 99999])
def test_a_list_of_modules_that_is_none_is_invalid(tmp_path, text):
    path = pooled(tmp_path / "bert")
    (path / "modules.json").write_text(text)
    with pytest.raises(ModelInvalid, match=r"modules\.json"):
        load_model(path)


@pytest.mark.parametrize("place", ["../other", "/etc", "1_Pooling/../../other"])
def test_the_list_of_modules_leads_nowhere_else(tmp_path, place):
    write(tmp_path / "other")
    path = write(tmp_path / "bert")
    (path / "modules.json").write_text(json.dumps([{"type": "models.Pooling", "path": place}]))
    with pytest.raises(UnsafeInput, match="leads out of its folder"):
        load_model(path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_of_other_float_types_are_read_as_float32(tmp_path, dtype):
    tensors = {
        name: array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for name, array in weights().items()
    }
    model = load_model(write(tmp_path / "bert", tensors=tensors))
    assert {value.dtype for value in model.graph.initializers.values()} == {ir.DataType.FLOAT, ir.DataType.INT64}
    rounded = {name: array.astype(np.float32) for name, array in tensors.items()}
    ids = np.array([3, 14, 15, 9, 26])
    np.testing.assert_allclose(session(model).run(None, feeds(ids))[0][0], numpy_bert(rounded, ids), atol=2e-5)


def test_weights_that_are_no_floats_are_named(tmp_path):
    tensors = weights() | {"encoder.layer.0.output.dense.weight": np.ones((32, 64), np.int8)}
    with pytest.raises(ModelInvalid, match=r"layer\.0\.output\.dense\.weight' is of type I8"):
        load_model(write(tmp_path / "bert", tensors=tensors))


def test_a_checkpoint_with_a_head_and_old_names_is_the_same_encoder(tmp_path, folder):
    def old(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    tensors = {f"bert.{old(name)}": array for name, array in weights().items()}
    tensors["cls.predictions.transform.LayerNorm.gamma"] = np.zeros(32, np.float32)
    np.testing.assert_array_equal(embedding(write(tmp_path / "old", tensors=tensors)), embedding(folder))


def test_several_encoders_in_one_file_are_refused(tmp_path):
    tensors = {f"{side}.{name}": array for name, array in weights().items() for side in ("query", "document")}
    with pytest.raises(ModelInvalid, match=r"several models in one file: 'document\.', 'query\.'"):
        load_model(write(tmp_path / "bert", tensors=tensors))


def test_a_file_without_tensors_is_named(tmp_path):
    with pytest.raises(ModelInvalid, match="holds 0 tensors"):
        load_model(write(tmp_path / "bert", tensors={}))


def test_a_pickle_of_weights_is_unsafe(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsafeInput, match=r"a pickle.*save_pretrained"):
        load_model(folder)


# ---------------------------------------------------------------- links


def cached(tmp_path):
    """The folder as the Hugging Face cache lays it out: every file a link to a blob."""
    plain = pooled(tmp_path / "plain", pooling_mode_cls_token=True)
    (plain / "tokenizer.json").write_text("{}")
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    blobs.mkdir(parents=True)
    for file in (path for path in plain.rglob("*") if path.is_file()):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        link = snapshot / file.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_folder_of_the_hugging_face_cache_is_loaded_through_its_links(tmp_path):
    snapshot = cached(tmp_path)
    source = load_source(snapshot)
    assert source.tokenizer == snapshot / "tokenizer.json"
    same = pooled(tmp_path / "same", pooling_mode_cls_token=True)
    assert source.info.digest == load_source(same).info.digest
    np.testing.assert_array_equal(embedding(snapshot), embedding(same))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"])
def test_m08_a_link_to_anywhere_else_is_refused(tmp_path, name):
    snapshot = cached(tmp_path)
    secret = tmp_path / "secret"
    (snapshot / name).resolve().rename(secret)
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(secret)
    with pytest.raises(UnsafeInput, match="leads out of its folder"):
        load_source(snapshot)


def test_m08_a_companion_of_an_onnx_file_is_no_link_to_elsewhere(tmp_path, folder):
    (folder / "m.onnx").write_bytes(ir.to_proto(load_model(folder)).SerializeToString())
    (tmp_path / "secret").write_text("{}")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeInput, match=r"vocab\.txt.*leads out of its folder"):
        load_source(folder / "m.onnx")


def test_a_link_inside_the_folder_is_followed(folder):
    (folder / "model.safetensors").rename(folder / "weights-v2.safetensors")
    (folder / "model.safetensors").symlink_to("weights-v2.safetensors")
    assert load_source(folder).info.parameters > 15_000


def test_a_damaged_blob_is_noticed(tmp_path):
    snapshot = cached(tmp_path)
    blob = (snapshot / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(IntegrityError, match=blob.name):
        load_source(snapshot)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_m08_a_damaged_blob_that_git_named_is_noticed(tmp_path, name):
    snapshot = cached(tmp_path)
    link, content = snapshot / name, (snapshot / name).read_bytes()
    git = subprocess.run(["git", "hash-object", "--stdin"], input=content, capture_output=True, check=True)
    blob = link.resolve().with_name(git.stdout.decode().strip())
    link.resolve().rename(blob)
    link.unlink()
    link.symlink_to(os.path.relpath(blob, snapshot))
    load_source(snapshot)
    blob.write_bytes(content + b" ")
    with pytest.raises(IntegrityError, match=blob.name):
        load_source(snapshot)


def test_texts_are_cut_to_the_positions_that_the_model_has(folder, tmp_path):
    words = {f"w{i}": i for i in range(40)}
    tokens = Tokenizer(WordLevel(words, unk_token="w0"))
    tokens.pre_tokenizer = Whitespace()
    tokens.save(str(folder / "tokenizer.json"))
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(f"w{(i * j) % 40}" for j in range(5 + i)) for i in range(1, 30)))
    options = BuildOptions(output=tmp_path / "out", set=("quantize.min_sqnr=0",))
    result = qexport.build(folder, calib=text, target="tensorrt-rtx", options=options)
    assert result.engine.profiles[0]["input_ids"][2] == [32, 16]
