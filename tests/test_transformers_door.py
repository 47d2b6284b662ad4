"""Encoders and vision models of a folder by way of transformers: the real thing, and what is refused before it."""

from __future__ import annotations

import json
import sys

import pytest
from torch_checks import check

from qexport.errors import EnvironmentMismatch, ModelInvalid, UnsafeInput, UsageError
from qexport.exporter.doors.torch_modules.transformers_folder import load_transformers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def electra(tmp_path_factory):
    """A small encoder of a family that has no builder here."""
    folder = tmp_path_factory.mktemp("electra")
    config = transformers.ElectraConfig(
        hidden_size=16,
        embedding_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=50,
        max_position_embeddings=40,
    )
    torch.manual_seed(0)
    transformers.ElectraForSequenceClassification(config).save_pretrained(folder)
    return folder


def changed(folder, target, **fields):
    """A copy of a folder with other fields in its config."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **fields}))
    return target


def test_an_encoder_without_a_builder_comes_by_way_of_transformers(electra):
    source = load_transformers(electra)
    check(source)
    assert [str(one) for one in source.inputs] == [
        "input_ids:int64[batch,sequence]",
        "attention_mask:int64[batch,sequence]",
        "token_type_ids:int64[batch,sequence]",
    ]
    assert list(source.reference(source.feeds)) == ["logits"]
    assert source.feeds["attention_mask"].min() == 0
    assert source.feeds["input_ids"].max() > 30
    assert source.notes == ("dimension 'sequence' is at most 40",)


def test_weights_that_a_task_needs_must_be_there(electra):
    with pytest.raises(
        ModelInvalid, match="weights that 'token-classification' needs are missing, such as 'classifier"
    ):
        load_transformers(electra, "token-classification")


def test_weights_that_no_output_needs_may_be_missing(electra, tmp_path, monkeypatch):
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 50,
    }
    transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    monkeypatch.setattr(f"{load_transformers.__module__}.export_module", lambda module, *rest: module)
    module = load_transformers(tmp_path / "bert")
    assert torch.isnan(module.pooler.dense.weight).all()


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"auto_map": {"AutoModel": "code.Model"}}, UnsafeInput, "asks to run code"),
        ({"architectures": ["ElectraForCausalLM"]}, ModelInvalid, "generates.*--via optimum"),
        ({"is_encoder_decoder": True}, ModelInvalid, "generates"),
        ({"model_type": "nothing-known"}, ModelInvalid, "transformers cannot read it"),
        ({"hidden_size": 20}, ModelInvalid, "transformers cannot read it"),
    ],
)
def test_folders_that_are_refused(electra, tmp_path, fields, error, said):
    with pytest.raises(error, match=said):
        load_transformers(changed(electra, tmp_path / "changed", **fields))


def test_pickles_and_strangers_are_refused(electra, tmp_path):
    with pytest.raises(UsageError, match=r"unknown task 'clasification'.*did you mean 'classification'"):
        load_transformers(electra, "clasification")
    folder = changed(electra, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsafeInput, match="a pickle"):
        load_transformers(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelInvalid, match="no weights"):
        load_transformers(folder)
    with pytest.raises(UsageError, match="no such folder"):
        load_transformers(tmp_path / "none")


def test_without_transformers_the_way_to_get_it_is_told(electra, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EnvironmentMismatch, match="pip install"):
        load_transformers(electra)
