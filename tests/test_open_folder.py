"""What a Hugging Face folder may not ask for, and what travels with it."""

from __future__ import annotations

import json

import onnx.parser
import pytest
from decoder_models import settle, write

from qexport.errors import ModelInvalid, UnsafeInput
from qexport.exporter.load import COMPANIONS, FAMILIES, load_source, open_folder
from qexport.exporter.references import REFERENCES

CODE = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def folder(path, **changes):
    return write(path / "m", settle("qwen2", **changes))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_folder_with_code_of_its_own_is_refused_and_the_code_never_run(tmp_path, name):
    path = folder(tmp_path)
    (path / "modeling_own.py").write_text("raise SystemExit('run')")
    settings = json.loads((path / name).read_text()) if (path / name).exists() else {}
    (path / name).write_text(json.dumps({**settings, "auto_map": CODE}))
    with pytest.raises(UnsafeInput, match=f"{name} asks to run code") as caught:
        load_source(path)
    assert caught.value.exit_code == 4
    assert "take auto_map out of the file" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_no_code_is_no_reason_to_refuse(tmp_path, name):
    path = folder(tmp_path)
    settings = json.loads((path / name).read_text()) if (path / name).exists() else {}
    (path / name).write_text(json.dumps({**settings, "auto_map": {}}))
    assert load_source(path).info.nodes > 50


def test_the_settings_of_the_tokenizer_are_not_part_of_the_model(tmp_path):
    path = folder(tmp_path)
    before = load_source(path).info
    (path / "tokenizer_config.json").write_text("{}")
    assert load_source(path).info == before


def test_code_is_refused_before_anything_else_is_looked_at(tmp_path):
    with pytest.raises(UnsafeInput):
        load_source(folder(tmp_path, auto_map=CODE, quantization_config={"quant_method": "x"}, architectures=["Own"]))


def test_a_tokenizer_config_that_leads_out_of_the_folder_is_refused(tmp_path):
    path = folder(tmp_path)
    (tmp_path / "private.json").write_text("{}")
    (path / "tokenizer_config.json").symlink_to(tmp_path / "private.json")
    with pytest.raises(UnsafeInput, match="leads out of its folder"):
        load_source(path)


def test_weights_that_are_quantized_already_are_refused(tmp_path):
    with pytest.raises(ModelInvalid, match="quantization_config") as caught:
        load_source(folder(tmp_path, quantization_config={"quant_method": "bitnet"}))
    assert "quantized from" in (caught.value.hint or "")


def test_quantization_that_is_null_is_none(tmp_path):
    assert load_source(folder(tmp_path, quantization_config=None)).info.nodes > 50


@pytest.mark.parametrize(("kind", "near"), [("qwen3_moe", "qwen3"), ("mistrall", "mistral"), ("gpt9", "gpt2")])
def test_an_unknown_family_is_refused_with_the_nearest_name(tmp_path, kind, near):
    with pytest.raises(ModelInvalid, match=f"unknown model_type '{kind}'; did you mean '{near}'") as caught:
        load_source(folder(tmp_path, model_type=kind))
    assert all(name in (caught.value.hint or "") for name in FAMILIES)


@pytest.mark.parametrize("kind", ["zzzzzz", None, 7, ["llama"], {}])
def test_a_family_that_is_like_none_is_refused(tmp_path, kind):
    with pytest.raises(ModelInvalid, match="unknown model_type") as caught:
        open_folder(write(tmp_path / "m", {"model_type": kind}, {}))
    assert "did you mean" not in str(caught.value)


def test_a_class_that_the_family_does_not_build_is_refused(tmp_path):
    with pytest.raises(ModelInvalid, match="'Qwen2ForSequenceClassification' is not built from model_type 'qwen2'"):
        load_source(folder(tmp_path, architectures=["Qwen2ForSequenceClassification"]))


@pytest.mark.parametrize("architectures", [None, [], "Qwen2ForCausalLM", ["Qwen2ForCausalLM"]])
def test_the_class_may_be_left_out(tmp_path, architectures):
    assert load_source(folder(tmp_path, architectures=architectures)).info.nodes > 50


def test_settings_that_are_no_dictionary_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelInvalid, match="not a dictionary"):
        load_source(tmp_path)


def test_every_family_has_a_reference():
    assert set(FAMILIES) == set(REFERENCES)


def test_an_artefact_with_all_its_companions_is_read_as_its_model(tmp_path):
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }'
    (tmp_path / "model.onnx").write_bytes(onnx.parser.parse_model(text).SerializeToString())
    for name in COMPANIONS:
        (tmp_path / name).write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps(settle("qwen2", auto_map=CODE)))
    source = load_source(tmp_path)
    assert source.path == tmp_path / "model.onnx"
    assert [path.name for path in source.companions] == list(COMPANIONS)
    assert {"config.json", "preprocessor_config.json", "merges.txt", "tokenizer.model"} <= set(COMPANIONS)
