"""Mistral, Qwen2, Qwen3 and BitNet from config and weights: in both layouts against numpy, and against transformers."""

from __future__ import annotations

import json
import weakref

import numpy as np
import onnx_ir as ir
import pytest
from decoder_models import BASE, CASES, MIXED, settle, shapes, truth_of, weights, write
from folders import graph_of
from helpers import session
from stepping import checked, demand_same, engine_of, opened, ragged, same_graph, stepped

from qexport.errors import ModelInvalid
from qexport.exporter.families.builder import COPY
from qexport.exporter.families.form import SCORING, Form
from qexport.exporter.families.weights import Weights
from qexport.exporter.load import load_model
from qexport.exporter.references import REFERENCES

CACHED = Form(cached=True)
HALF = Form(ir.DataType.FLOAT16, cached=True)
IDS = np.random.default_rng(5).integers(0, 50, (2, 30))
KINDS = ("mistral", "qwen2, chosen windows", "qwen3", "bitnet")  # one of each family


@pytest.fixture(params=CASES)
def folder(tmp_path, request):
    return write(tmp_path / "m", settle(request.param))


def answer(model, ids=IDS, mask=None):
    mask = np.ones_like(ids) if mask is None else mask
    return session(model).run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]


def test_the_plain_graph_computes_what_the_reference_does(folder):
    model = graph_of(folder)
    checked(model)
    demand_same(answer(model), truth_of(folder, IDS))


def test_pieces_steps_and_a_draft_taken_back_give_the_logits_of_the_whole_row(folder):
    demand_same(stepped(opened(graph_of(folder, CACHED)), IDS[0]), truth_of(folder, IDS)[0])


def test_rows_of_different_lengths_give_the_logits_of_each_alone(folder):
    truth = truth_of(folder, IDS)
    for row, found in enumerate(ragged(opened(graph_of(folder, CACHED)), IDS)):
        demand_same(found, truth[row, : len(found)])


@pytest.mark.torch
def test_logits_are_those_of_transformers(folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    original = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert set(original.state_dict()) == {"lm_head.weight", *shapes(original.config.to_dict())}
    with torch.no_grad():
        truth = original(torch.tensor(IDS)).logits.numpy()
    demand_same(truth_of(folder, IDS), truth)
    demand_same(answer(graph_of(folder)), truth)
    demand_same(stepped(opened(graph_of(folder, CACHED)), IDS[1]), truth[1])


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_read_late_weights_are_the_same(tmp_path, name, cached):
    folder = write(tmp_path / "m", settle(name))
    assert same_graph(*(graph_of(folder, Form(cached=cached, lazy=lazy)) for lazy in (False, True)))


@pytest.mark.parametrize("name", KINDS)
def test_the_logits_of_float16_are_near(tmp_path, name):
    folder = write(tmp_path / "m", settle(name))
    truth = truth_of(folder, IDS)
    decoder = opened(graph_of(folder, HALF))
    assert decoder.signature.dtype == np.float16
    plain = answer(graph_of(folder, Form(ir.DataType.FLOAT16)))
    for found, wanted in ((stepped(decoder, IDS[0]), truth[0]), (plain, truth)):
        assert 1e-5 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-2


@pytest.mark.rtx
@pytest.mark.parametrize("name", KINDS)
def test_the_decoder_builds_for_rtx(tmp_path, name):
    pytest.importorskip("tensorrt_rtx")
    model = graph_of(write(tmp_path / "m", settle(name)), HALF)
    assert engine_of(model, {"batch": (1, 1, 2), "sequence": (1, 1, 8)}).plan


@pytest.mark.parametrize("form", [SCORING, CACHED], ids=["plain", "cached"])
def test_what_lies_before_the_window_of_every_layer_changes_nothing_and_what_lies_in_it_does(tmp_path, form):
    model = graph_of(write(tmp_path / "m", settle("mistral", num_hidden_layers=2)), form)  # 6 + 6 - 1 positions
    other = IDS.copy()
    other[:, 9] = (other[:, 9] + 1) % 50
    if form.cached:
        decoder, found = opened(model), []
        for ids in (IDS, other):
            decoder.reset(len(ids))
            found.append(decoder.extend(ids))
    else:
        found = [answer(model, ids) for ids in (IDS, other)]
    changed = np.abs(found[0] - found[1]).max(-1)
    assert (changed[:, 9:20] > 1e-4).all()
    assert (changed[:, 20:] < 1e-5).all()


def test_layers_without_a_window_see_everything(tmp_path):
    config = settle("qwen2, chosen windows")
    few, all_of_them = (
        answer(graph_of(write(tmp_path / name, {**config, **changes})))
        for name, changes in (("few", {}), ("all", {"use_sliding_window": False, "layer_types": None}))
    )
    np.testing.assert_allclose(few[:, :4], all_of_them[:, :4], atol=1e-5)
    assert (np.abs(few[:, 5:] - all_of_them[:, 5:]).max(-1) > 1e-3).all()
    one_window = answer(graph_of(write(tmp_path / "mistral", settle("qwen2, late windows", max_window_layers=0))))
    assert np.abs(one_window[:, -1] - few[:, -1]).max() > 1e-3


def test_padding_changes_nothing(tmp_path):
    model = graph_of(write(tmp_path / "m", settle("qwen3, chosen windows")))
    other, mask = IDS.copy(), np.ones_like(IDS)
    other[:, 20:], mask[:, 20:] = 7, 0
    np.testing.assert_allclose(answer(model, other, mask)[:, :20], answer(model)[:, :20], atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "bitnet"])
def test_fields_that_are_left_out_mean_what_transformers_says(kind):
    transformers = pytest.importorskip("transformers")
    from qexport.exporter.families import bitnet, mistral, qwen2, qwen3

    ours = {
        "mistral": mistral.MistralConfig,
        "qwen2": qwen2.Qwen2Config,
        "qwen3": qwen3.Qwen3Config,
        "bitnet": bitnet.BitNetConfig,
    }
    theirs = transformers.AutoConfig.for_model(kind).to_dict()
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    given = {name: theirs[name] for name in (*needed, "max_position_embeddings", "rms_norm_eps")}
    shape = ours[kind].model_validate({"model_type": kind, **given})
    for name in ("num_key_value_heads", "hidden_act", "tie_word_embeddings", "use_sliding_window", "max_window_layers"):
        if name in theirs and hasattr(shape, name):
            assert getattr(shape, name) == theirs[name], name
    assert shape.rope_parameters.rope_theta == theirs["rope_parameters"]["rope_theta"]
    assert shape.window(0) == theirs.get("sliding_window")
    assert shape.head_dim == theirs.get("head_dim", theirs["hidden_size"] // theirs["num_attention_heads"])


def test_the_reference_fills_in_what_is_left_out_as_the_graph_does(tmp_path):
    changes = dict.fromkeys(("sliding_window", "hidden_act", "rope_theta"))
    for kind in ("mistral", "bitnet"):
        config = {key: value for key, value in settle(kind, **changes).items() if value is not None}
        path = write(tmp_path / kind, config)
        demand_same(answer(graph_of(path)), truth_of(path, IDS))


def test_every_decoder_has_a_reference():
    assert {CASES[name]["model_type"] for name in CASES} <= set(REFERENCES)


def test_a_copy_of_tied_embeddings_is_told(tmp_path):
    model = load_model(write(tmp_path / "m", settle("qwen3")))
    assert model.graph.initializers["lm_head.weight"].meta[COPY] == "model.embed_tokens.weight"


def test_the_reference_lets_go_of_every_matrix_before_it_reads_the_next(tmp_path, monkeypatch):
    held, read = [], Weights.__call__

    class Seen(np.ndarray):
        """An array that can be watched."""

    def watched(self, name, shape):
        assert not [array.shape for array in (one() for one in held) if array is not None and array.ndim > 1]
        array = read(self, name, shape).view(Seen)
        held.append(weakref.ref(array))
        return array

    monkeypatch.setattr(Weights, "__call__", watched)
    truth_of(write(tmp_path / "m", settle("mistral")), IDS)
    assert len(held) == len(shapes(settle("mistral")))


BAD = {
    "mistral, layers of two kinds": ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types differ"),
    "mistral, biases": ("mistral", {"attention_bias": True}, "attention_bias"),
    "window of none": ("mistral", {"sliding_window": 0}, "sliding_window"),
    "another layer type": ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types.0"),
    "too few layer types": ("qwen2", {"layer_types": ["full_attention"]}, "1 layer_types for 3 layers"),
    "a window that is off": ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "layer_types ask for a window"),
    "activation": ("bitnet", {"hidden_act": "gelu"}, "hidden_act"),
    "gelu": ("qwen3", {"hidden_act": "gelu"}, "hidden_act"),
    "norms of another size": ("qwen3", {"head_dim": 8}, r"q_proj.weight' is \[64, 32\]"),
    "part of a head": ("qwen3", {"partial_rotary_factor": 0.5}, "turns 8 of 16, qwen3 turns all"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_config_that_cannot_be_built_is_refused_by_the_field(tmp_path, case):
    name, changes, message = BAD[case]
    with pytest.raises(ModelInvalid, match=message):
        load_model(write(tmp_path / "m", settle(name, **changes), weights(settle(name))))


def test_a_model_without_its_head_is_refused_in_words(tmp_path):
    config, tensors = settle("qwen2, yarn"), weights(settle("qwen2, yarn"))
    del tensors["lm_head.weight"]
    with pytest.raises(ModelInvalid, match=r"base model without the head.*'lm_head.weight' is missing") as caught:
        load_model(write(tmp_path / "untied", config, tensors))
    assert "AutoModelForCausalLM" in (caught.value.hint or "")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    with pytest.raises(ModelInvalid, match=r"base model without the head.*lack 'model.'"):
        load_model(write(tmp_path / "bare", config, bare))


def test_a_tied_model_saved_by_the_name_of_its_layers_is_built(tmp_path):
    config = settle("qwen2", architectures=["Qwen2Model"])
    demand_same(answer(graph_of(write(tmp_path / "m", config))), truth_of(tmp_path / "m", IDS))


def test_the_config_is_never_written_to(tmp_path):
    folder = write(tmp_path / "m", settle("qwen2, yarn"))
    graph_of(folder)
    truth_of(folder, IDS)
    assert json.loads((folder / "config.json").read_text()) == {**BASE, **CASES["qwen2, yarn"]}
    assert "sliding_window" in MIXED
