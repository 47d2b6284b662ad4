"""Vision transformers built from config and weights: against numpy and against transformers."""

from __future__ import annotations

import json

import folders
import numpy as np
import onnx_ir as ir
import pytest
from folders import answers, graph_of
from stepping import checked, same_graph
from vit_models import CLASSIFIER, CONFIG, LABELLED, weights, write

from qexport.errors import ModelInvalid, UsageError
from qexport.exporter.engines.engine import EngineOptions, build_engine
from qexport.exporter.families.form import SCORING, Form
from qexport.exporter.load import load_model, open_folder
from qexport.passes.portable import LABELS
from qexport.runtime.backends.artefact import load_module

HALF = Form(ir.DataType.FLOAT16)


def truth_of(path, pixels, form=SCORING):
    return folders.truth_of(path, {"pixel_values": pixels}, form)


def answer(model, pixels):
    return answers(model, {"pixel_values": pixels})


def images(model):
    _, *sizes = model.graph.inputs[0].shape
    return np.random.default_rng(1).standard_normal((3, *sizes)).astype(np.float32)


VARIANTS = {
    "layers": {},
    "classifier": LABELLED,
    "no biases, tanh": {"qkv_bias": False, "hidden_act": "gelu_new"},
    "one channel": {"num_channels": 1, "patch_size": 4, "hidden_act": "relu"},
    "oblong": {"image_size": [16, 27], "patch_size": [4, 8], **LABELLED},
}


@pytest.fixture(params=VARIANTS)
def folder(tmp_path, request):
    return write(tmp_path / "m", **VARIANTS[request.param])


def demand_same(found, truth, most=1e-5):
    assert found.keys() == truth.keys()
    for name, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, truth[name], rtol=0, atol=most * np.abs(truth[name]).max(), err_msg=name)


def test_the_graph_computes_what_the_reference_does(folder):
    model = graph_of(folder)
    checked(model)
    pixels = images(model)
    demand_same(answer(model, pixels), truth_of(folder, pixels))


@pytest.mark.torch
def test_outputs_are_those_of_transformers(folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    name = open_folder(folder)[0]["architectures"][0]
    original = getattr(transformers, name).from_pretrained(folder, pooler_output_size=20).eval()
    model = graph_of(folder)
    pixels = images(model)
    with torch.no_grad():
        truth = original(torch.tensor(pixels))
    found = answer(model, pixels)
    demand_same(found, {name: truth[name].numpy() for name in found})


def test_a_model_without_a_pooler_gives_the_class_token(tmp_path):
    path = write(tmp_path / "m", weights(CONFIG, pooler=False, prefix=""))
    model = graph_of(path)
    found = answer(model, images(model))
    demand_same(found, truth_of(path, images(model)))
    np.testing.assert_array_equal(found["cls_embedding"], found["last_hidden_state"][:, 0])


def test_the_layers_below_a_head_are_given_where_asked_for(tmp_path):
    path, form = write(tmp_path / "m", **LABELLED), Form(task="embedding")
    model = graph_of(path, form)
    pixels = images(model)
    demand_same(answer(model, pixels), truth_of(path, pixels, form))
    assert LABELS not in model.metadata_props


def test_labels_are_kept_in_the_order_of_their_logits(tmp_path):
    model = load_model(write(tmp_path / "m", **LABELLED))
    assert json.loads(model.metadata_props[LABELS]) == ["cat", "dog", "Bär"]
    assert [list(value.shape) for value in model.graph.inputs] == [["batch", 3, 16, 16]]
    assert [list(value.shape) for value in model.graph.outputs] == [["batch", 3]]


def test_float16_is_near_and_lazy_weights_are_the_same(tmp_path):
    path = write(tmp_path / "m")
    model = graph_of(path, HALF)
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {ir.DataType.FLOAT}
    demand_same(answer(model, images(model)), truth_of(path, images(model)), most=1e-2)
    assert same_graph(graph_of(path), graph_of(path, Form(lazy=True)))


@pytest.mark.rtx
def test_float16_builds_for_rtx(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    profile = {"pixel_values": ((1, 3, 16, 16), (2, 3, 16, 16), (4, 3, 16, 16))}
    options = EngineOptions(profiles=(profile,), compute_capabilities=("8.6",))
    content = checked(graph_of(write(tmp_path / "m", **LABELLED), HALF))
    assert build_engine(content, load_module("tensorrt_rtx"), options).plan


BAD = {
    "heads": ({"num_attention_heads": 5}, "5 heads do not divide hidden_size 32"),
    "patches larger than images": ({"patch_size": 17}, "do not fit"),
    "another size of images": ({"image_size": 32}, r"position_embeddings' is \[1, 5, 32\].*\[1, 17, 32\]"),
    "activation": ({"hidden_act": "tanh"}, "hidden_act"),
    "pooler": ({"pooler_act": "relu"}, "pooler_act"),
    "three sizes": ({"image_size": [16, 16, 3]}, "image_size"),
    "no head": ({"architectures": [CLASSIFIER]}, "no head for 'classification': weight 'classifier.weight'"),
    "another class": ({"architectures": ["ViTForMaskedImageModeling"]}, "'ViTForMaskedImageModeling' is not built"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_config_that_cannot_be_built_is_refused_by_the_field(tmp_path, name):
    changes, message = BAD[name]
    with pytest.raises(ModelInvalid, match=message):
        load_model(write(tmp_path / "m", weights(CONFIG), **changes))


def test_labels_that_are_not_those_of_the_logits_are_refused(tmp_path):
    with pytest.raises(ModelInvalid, match="'id2label' names 2 labels, the weights tell 3 apart"):
        load_model(write(tmp_path / "m", **LABELLED | {"id2label": {"0": "cat", "1": "dog"}}))


def test_a_task_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(UsageError, match="unknown task 'detection'"):
        graph_of(write(tmp_path / "m"), Form(task="detection"))
