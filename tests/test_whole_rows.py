"""Decoders with a cache, read as rows: what calibration, proofs and quality see of them."""

from __future__ import annotations

import cached_models
import numpy as np
import onnx_ir as ir
import pytest
from cached_models import VOCABULARY, Tiny
from helpers import model_from
from onnx_ir.passes.common import ShapeInferencePass

import qexport
from qexport.calibration.reading.spec import input_specs, keeps_cache, scores_tokens
from qexport.calibration.running.execute import open_model
from qexport.calibration.running.whole_rows import read_whole_rows
from qexport.errors import UsageError
from qexport.exporter.options import BuildOptions
from qexport.exporter.precision.lab import Question, open_lab
from qexport.exporter.recipe_files import load_recipe, override


@pytest.fixture(scope="module")
def tiny():
    return Tiny()


@pytest.fixture(scope="module")
def model(tiny):
    return cached_models.portable(tiny)


@pytest.fixture
def files(tiny, tmp_path):
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (24, 12))
    np.savez(tmp_path / "rows.npz", input_ids=ids)
    ir.save(cached_models.portable(tiny), tmp_path / "model.onnx")
    return tmp_path


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 20)])
def test_logits_are_those_of_whole_rows(tiny, model, shape):
    ids = np.random.default_rng(1).integers(0, VOCABULARY, shape)
    session = open_model(model)
    assert session.inputs == ("input_ids",)
    assert session.outputs == ("logits",)
    logits = session.run({"input_ids": ids})["logits"]
    for row, found in zip(ids, logits, strict=True):
        np.testing.assert_allclose(found, cached_models.forward(tiny, row), rtol=1e-4, atol=1e-4)


def test_the_model_itself_keeps_its_cache(model):
    before = ir.to_proto(model).SerializeToString()
    open_model(model)
    assert ir.to_proto(model).SerializeToString() == before


def test_a_sample_brings_nothing_but_tokens(model):
    assert [spec.name for spec in input_specs(model)] == ["input_ids"]
    assert scores_tokens(model)
    assert keeps_cache(model)


def test_a_model_without_a_cache_stays_as_it_is():
    plain = model_from("agraph (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }")
    before = ir.to_proto(plain).SerializeToString()
    read_whole_rows(plain)
    assert not keeps_cache(plain)
    assert ir.to_proto(plain).SerializeToString() == before


def test_inner_values_can_be_tapped_caches_among_them(model):
    name = next(node.outputs[0].name for node in model.graph if node.op_type == "Attention")
    found = open_model(model, taps=[name]).run({"input_ids": np.ones((2, 5), np.int64)})
    assert found[name].shape[0] == 2
    assert found[name].shape[2] == 5


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_half_precision_caches_are_made_in_their_type(tiny, dtype):
    ids = np.random.default_rng(2).integers(0, VOCABULARY, (1, 9))
    model = ShapeInferencePass()(cached_models.portable(tiny, dtype)).model
    logits = open_model(model).run({"input_ids": ids})["logits"]
    truth = cached_models.forward(tiny, ids[0])
    assert np.abs(logits[0] - truth).max() < 0.1 * np.abs(truth).max()


@pytest.mark.parametrize("recipe", ["float32", "int8", "int8-weights", "int4-gptq", "int8-dynamic"])
def test_recipes_run_on_it_and_leave_the_cache_in_place(files, recipe):
    options = BuildOptions(target="ort-cpu", output=files / "out")
    result = qexport.build(files / "model.onnx", recipe=recipe, calib=files / "rows.npz", options=options)
    built = ir.load(files / "out" / "model.onnx")
    assert keeps_cache(built)
    assert sum((value.name or "").startswith("present.") for value in built.graph.outputs) == 4
    assert (result.quantized > 0) == (recipe != "float32")
    assert set(result.quality.outputs) == {"logits"}
    assert result.quality.cosine_mean > 0.95


def test_heads_are_cut_with_their_caches(files):
    options = BuildOptions(target="ort-cpu", output=files / "out", set=("heads.keep=0.5",))
    qexport.build(files / "model.onnx", recipe="prune-heads", calib=files / "rows.npz", options=options)
    caches = [value for value in ir.load(files / "out" / "model.onnx").graph.inputs if len(value.shape) == 4]
    assert {value.shape[1] for value in caches} == {1}


@pytest.mark.parametrize(
    ("settings", "cached"),
    [
        (("export.target=ort-cpu",), True),
        (("export.target=tensorrt-rtx",), True),
        (("export.target=tensorrt",), False),
        (("export.target=ort-cpu", "export.opset=23"), False),
        (("export.target=ort-cpu", "export.layout=scoring"), False),
        (("export.target=tensorrt", "export.layout=cached"), True),
    ],
)
def test_decoders_of_a_folder_get_caches_where_the_target_has_the_operators(settings, cached):
    assert override(load_recipe("float32"), settings).export.cached is cached


def test_a_decoder_that_appends_to_its_caches_is_to_be_exported_first(tmp_path):
    text = """g (int64[n, s] input_ids, float[n, 2, p, 8] past_key_values.0.key) => (float[n, s, 4] logits) {
        logits = Cast <to = 1> (input_ids) }"""
    ir.save(model_from(text.replace("past_key_values.0.key", "past")), tmp_path / "model.onnx")
    model = ir.load(tmp_path / "model.onnx")
    model.graph.inputs[1].name = "past_key_values.0.key"
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(UsageError, match=r"appends to its caches.*qexport export"):
        qexport.build(tmp_path / "model.onnx", recipe="float32", options=BuildOptions(output=tmp_path / "out"))
    with pytest.raises(UsageError, match=r"appends to its caches.*qexport export"):
        open_lab(Question(tmp_path / "model.onnx", calib=tmp_path / "rows.npz"))
