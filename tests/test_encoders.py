"""Encoders of every family: against their equations in numpy, and against transformers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from encoder_models import (
    ARCHITECTURES,
    CONFIGS,
    PLACES,
    SUFFIXES,
    TASKS,
    WORDS,
    feeds,
    graph,
    kind,
    tensors,
    truth,
    write,
)
from folders import answers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import qexport
from qexport.calibration.running.execute import open_model
from qexport.errors import DataInvalid, ModelInvalid, UnsafeInput
from qexport.exporter.engines.engine import EngineOptions, build_engine
from qexport.exporter.families.folder import Folder
from qexport.exporter.families.vocabulary import check_vocabulary
from qexport.passes.portable import MAX_POSITIONS
from qexport.runtime.session import SessionOptions

FAMILIES = list(CONFIGS)
IDS = [[5, 14, 15, 9, 26, 7], [31, 8, 20, 40, 6, 11], [12, 49, 13, 5, 5, 6]]
LENGTHS = [6, 3, 1]
TENSORS_OF = {"embedding": "last_hidden_state", "multi-vector": "token_embeddings"}


def seen(array, mask):
    """What stands at positions that mean something."""
    return array[mask > 0] if array.shape[:2] == mask.shape else array


def close(found, expected, mask, **tolerance):
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(seen(found[name], mask), seen(array, mask), err_msg=name, **tolerance)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_computes_what_the_definition_says(tmp_path, family, task):
    path = write(tmp_path / "model", family, task)
    model, sample = graph(path), feeds(family, IDS, LENGTHS)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    close(answers(model, sample), truth(path, sample), sample["attention_mask"], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(tmp_path, family, task):
    model = graph(write(tmp_path / "model", family, task))
    together = answers(model, feeds(family, IDS, LENGTHS))
    for row, length in enumerate(LENGTHS):
        sample = feeds(family, IDS, LENGTHS)
        alone = answers(model, {name: array[row : row + 1, :length] for name, array in sample.items()})
        for name, array in alone.items():
            padded = together[name][row : row + 1]
            whole = "sequence" in str(model.graph.outputs[0].shape) and array.ndim == 3
            np.testing.assert_allclose(padded[:, :length] if whole else padded, array, atol=5e-6)


@pytest.mark.torch
@pytest.mark.parametrize("task", SUFFIXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_answers_the_same(tmp_path, family, task):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path, sample = write(tmp_path / "model", family, task), feeds(family, IDS, LENGTHS)
    cls = getattr(transformers, ARCHITECTURES[family] + SUFFIXES[task])
    theirs, told = cls.from_pretrained(path, output_loading_info=True)
    assert all(name.startswith("pooler.") for name in told["missing_keys"])
    with torch.no_grad():
        out = theirs.eval()(**{name: torch.from_numpy(array) for name, array in sample.items()})
    name = TENSORS_OF.get(task, "logits")
    expected, mask = {name: out[name].numpy()}, sample["attention_mask"]
    for found in (answers(graph(path), sample), truth(path, sample)):
        close({name: found[name]}, expected, mask, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_sequence_is_told_and_runs(tmp_path, family):
    path = write(tmp_path / "model", family)
    model = graph(path)
    most = int(model.metadata_props[MAX_POSITIONS])
    padding = CONFIGS[family].get("pad_token_id", 0)
    assert most == (PLACES - padding - 1 if kind(family) == "roberta" else PLACES)
    sample = feeds(family, [list(range(10, 10 + most))])
    close(answers(model, sample), truth(path, sample), sample["attention_mask"], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_lazy_weights_are_the_same_and_read_when_asked_for(tmp_path, family):
    path = write(tmp_path / "model", family)
    eager, lazy = graph(path), graph(path, lazy=True)
    first, second = ({v.name: v.const_value for v in m.graph.initializers.values()} for m in (eager, lazy))
    assert list(first) == list(second)
    assert any(isinstance(tensor, ir.LazyTensor) for tensor in second.values())
    for name, tensor in first.items():
        assert tuple(second[name].shape) == tuple(tensor.shape)
        np.testing.assert_array_equal(second[name].numpy(), tensor.numpy())


# ---------------------------------------------------------------- half precision


HALVES = {"float16": (ir.DataType.FLOAT16, 5e-3), "bfloat16": (ir.DataType.BFLOAT16, 5e-2)}


def calm(family, task):
    """Weights of the size that trained ones have."""
    return {
        n: w if "LayerNorm.weight" in n or "_norm.weight" in n else 0.3 * w for n, w in tensors(family, task).items()
    }


def rounded(model, sample):
    """What a device makes of the graph: every result is written in 16 bits."""
    typed = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
    return open_model(typed, SessionOptions(threads=1, literal=True)).run(sample)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_half_precision_comes_close_and_leaves_as_float32(tmp_path, family, task, dtype):
    path = write(tmp_path / "model", family, task, calm(family, task))
    half, tolerance = HALVES[dtype]
    model, sample = graph(path, dtype=half), feeds(family, IDS, LENGTHS)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert {value.dtype for value in model.graph.outputs} == {ir.DataType.FLOAT}
    wide = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
    assert all(v.const_value.size == 1 for v in wide)
    expected, mask = truth(path, sample), sample["attention_mask"]
    close(rounded(model, sample), expected, mask, rtol=tolerance, atol=tolerance)
    if dtype == "float16":  # which onnxruntime runs without a detour
        close(answers(model, sample), expected, mask, rtol=tolerance, atol=tolerance)


def test_an_empty_row_is_zeros_in_half_precision(tmp_path):
    model = graph(write(tmp_path / "model", "bert"), dtype=ir.DataType.FLOAT16)
    sentence = answers(model, feeds("bert", IDS, [6, 0, 2]))["sentence_embedding"]
    assert np.isfinite(sentence).all()
    np.testing.assert_array_equal(sentence[1], 0)


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("bert", "embedding"),
        ("bert", "multi-vector"),
        ("roberta", "classification"),
        ("distilbert", "token-classification"),
    ],
)
def test_an_engine_is_built_in_half_precision(tmp_path, family, task):
    module = pytest.importorskip("tensorrt_rtx")
    model = graph(write(tmp_path / "model", family, task), dtype=ir.DataType.FLOAT16)
    profile = {value.name: ([1, 1], [2, 8], [4, 12]) for value in model.graph.inputs}
    engine = build_engine(ir.to_proto(model).SerializeToString(), module, EngineOptions(profiles=(profile,)))
    assert engine.info.layers > 4


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("roberta", {"pad_token_id": 19}, "no positions are left behind pad_token_id 19"),
        ("roberta", {"is_decoder": True}, "field 'is_decoder'"),
        ("roberta", {"hidden_act": "swish"}, "field 'hidden_act'"),
        ("camembert", {"position_embedding_type": "relative_key"}, "field 'position_embedding_type'"),
        ("distilbert", {"n_heads": 5}, "5 heads do not divide"),
        ("distilbert", {"dim": 0}, "field 'dim'"),
        ("distilbert", {"activation": "swish"}, "field 'activation'"),
        ("distilbert", {"hidden_dim": 65}, r"weight 'transformer\.layer\.0\.ffn\.lin1\.weight' is \[64, 32\]"),
        ("xlm-roberta", {"type_vocab_size": 2}, r"token_type_embeddings\.weight' is \[1, 32\].*asks for \[2, 32\]"),
    ],
)
def test_a_config_that_is_not_supported_is_named(tmp_path, family, changes, message):
    with pytest.raises(ModelInvalid, match=message):
        graph(write(tmp_path / "model", family, **changes))


def test_a_roberta_of_two_token_types_has_the_first(tmp_path):
    weights = tensors("roberta")
    row = weights["embeddings.token_type_embeddings.weight"]
    weights["embeddings.token_type_embeddings.weight"] = np.concatenate([row, row + 1])
    two = write(tmp_path / "two", "roberta", weights=weights, type_vocab_size=2)
    sample = feeds("roberta", IDS, LENGTHS)
    np.testing.assert_array_equal(
        answers(graph(two), sample)["last_hidden_state"],
        answers(graph(write(tmp_path / "one", "roberta")), sample)["last_hidden_state"],
    )


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations_are_those_of_the_name(tmp_path, activation):
    path = write(tmp_path / "model", "distilbert", activation=activation)
    sample = feeds("distilbert", IDS, LENGTHS)
    close(answers(graph(path), sample), truth(path, sample), sample["attention_mask"], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_checkpoints_in_half_precision_are_read(tmp_path, dtype):
    kind_of = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    weights = {name: array.astype(kind_of) for name, array in tensors("roberta").items()}
    path, sample = write(tmp_path / "model", "roberta", weights=weights), feeds("roberta", IDS, LENGTHS)
    close(answers(graph(path), sample), truth(path, sample), sample["attention_mask"], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("family", "task"), [("roberta", "classification"), ("distilbert", "embedding")])
def test_a_folder_is_quantized_on_text(tmp_path, family, task):
    folder, text = write(tmp_path / "model", family, task), tmp_path / "text.txt"
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    words.save(str(folder / "tokenizer.json"))
    text.write_text("\n".join(" ".join(f"w{5 + i * j % 40}" for j in range(4 + i % 9)) for i in range(1, 40)))
    result = qexport.build(folder, calib=text, target="ort-cpu", options=qexport.BuildOptions(output=tmp_path / "out"))
    told = [decision for step in result.steps for decision in step.decisions if decision.action == "quantized"]
    assert sum("query" in decision.node or "q_lin" in decision.node for decision in told) >= 2
    assert sum("attention" in decision.node for decision in told) >= 8
    assert result.quality.cosine_worst > 0.99


# ---------------------------------------------------------------- MiniLM


def test_minilm_is_what_the_definition_says(minilm):
    rng = np.random.default_rng(3)
    ids = rng.integers(1000, 30000, (3, 24))
    mask = np.array([[1] * 24, [1] * 9 + [0] * 15, [1] * 2 + [0] * 22])
    sample = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    close(answers(graph(minilm, lazy=True), sample), truth(minilm, sample), mask, rtol=1e-4, atol=5e-6)


# ---------------------------------------------------------------- vocabulary


def tokenizer(path, words):
    Tokenizer(WordLevel({f"w{number}": number for number in range(words)}, unk_token="w0")).save(str(path))


@pytest.mark.parametrize("words", [1, 49, 50])
def test_a_tokenizer_of_no_more_words_than_the_model_passes(tmp_path, words):
    check_vocabulary(Folder(tmp_path), 50)
    tokenizer(tmp_path / "tokenizer.json", words)
    check_vocabulary(Folder(tmp_path), 50)


def test_d11_a_tokenizer_of_more_words_than_the_model_is_refused_with_both_numbers(tmp_path):
    tokenizer(tmp_path / "tokenizer.json", 51)
    with pytest.raises(DataInvalid, match=r"numbers up to 50 \('w50'\), the model has words 0 to 49"):
        check_vocabulary(Folder(tmp_path), 50)


def test_d11_words_that_were_added_count(tmp_path):
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(50)}, unk_token="w0"))
    words.add_special_tokens(["<new>"])
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataInvalid, match=r"up to 50 \('<new>'\)"):
        check_vocabulary(Folder(tmp_path), 50)


def test_d11_a_broken_tokenizer_is_named_and_one_elsewhere_is_unsafe(tmp_path):
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "tokenizer.json").write_text("{}")
    with pytest.raises(DataInvalid, match="cannot be read as a tokenizer"):
        check_vocabulary(Folder(inside), 50)
    (inside / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (inside / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(UnsafeInput, match="leads out of its folder"):
        check_vocabulary(Folder(inside), 50)
