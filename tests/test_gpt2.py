"""GPT-2 built from config and weights: in both layouts against numpy, and against transformers."""

from __future__ import annotations

import folders
import numpy as np
import onnx_ir as ir
import pytest
from folders import graph_of
from helpers import session
from stepping import checked, demand_same, engine_of, opened, ragged, same_graph, stepped

from qexport.errors import ModelInvalid
from qexport.exporter.families.builder import COPY
from qexport.exporter.families.form import Form
from qexport.exporter.load import load_model, load_source
from qexport.passes.portable import MAX_POSITIONS

CONFIG = {
    "model_type": "gpt2",
    "vocab_size": 50,
    "n_positions": 40,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "attn_pdrop": 0.1,
}
CACHED = Form(cached=True)
IDS = np.random.default_rng(5).integers(0, 50, (2, 30))


def shapes(config):
    width = config["n_embd"]
    inner = config["n_inner"] or 4 * width
    found = {"wte.weight": (config["vocab_size"], width), "wpe.weight": (config["n_positions"], width)}
    products = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
    products |= {"mlp.c_fc": (width, inner), "mlp.c_proj": (inner, width)}
    norms = ["ln_f"]
    for layer in range(config["n_layer"]):
        norms += [f"h.{layer}.ln_1", f"h.{layer}.ln_2"]
        for name, sizes in products.items():
            found |= {f"h.{layer}.{name}.weight": sizes, f"h.{layer}.{name}.bias": sizes[1:]}
    found |= {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}
    if not config.get("tie_word_embeddings", True):
        found["lm_head.weight"] = (config["vocab_size"], width)
    return found


def weights(config, prefix="transformer."):
    rng = np.random.default_rng(0)
    return {
        name if name == "lm_head.weight" else prefix + name: rng.normal(0.1, 0.4, sizes).astype(np.float32)
        for name, sizes in shapes(config).items()
    }


def write(path, tensors=None, **changes):
    config = CONFIG | changes
    return folders.save(path, config, weights(config) if tensors is None else tensors)


def truth_of(path, ids=IDS):
    return folders.truth_of(path, {"input_ids": ids})["logits"]


def answer(model, ids=IDS, mask=None):
    mask = np.ones_like(ids) if mask is None else mask
    return session(model).run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]


VARIANTS = {
    "plain": {},
    "narrow": {"n_inner": 24, "activation_function": "gelu"},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "not scaled": {"scale_attn_weights": False, "activation_function": "relu"},
    "a head of its own": {"tie_word_embeddings": False, "activation_function": "gelu_pytorch_tanh"},
}


@pytest.fixture(params=VARIANTS)
def folder(tmp_path, request):
    return write(tmp_path / "m", **VARIANTS[request.param])


def test_the_plain_graph_computes_what_the_reference_does(folder):
    model = graph_of(folder)
    checked(model)
    demand_same(answer(model), truth_of(folder))


def test_pieces_steps_and_a_draft_taken_back_give_the_logits_of_the_whole_row(folder):
    demand_same(stepped(opened(graph_of(folder, CACHED)), IDS[0]), truth_of(folder)[0])


def test_rows_of_different_lengths_give_the_logits_of_each_alone(folder):
    truth = truth_of(folder)
    for row, found in enumerate(ragged(opened(graph_of(folder, CACHED)), IDS)):
        demand_same(found, truth[row, : len(found)])


@pytest.mark.torch
def test_logits_are_those_of_transformers(folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    original = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        truth = original(torch.tensor(IDS)).logits.numpy()
    demand_same(truth_of(folder), truth)
    demand_same(answer(graph_of(folder)), truth)
    decoder = opened(graph_of(folder, CACHED))
    demand_same(stepped(decoder, IDS[1]), truth[1])
    for row, found in enumerate(ragged(decoder, IDS)):
        demand_same(found, truth[row, : len(found)])


@pytest.mark.parametrize("cached", [False, True])
def test_read_late_weights_are_the_same(tmp_path, cached):
    folder = write(tmp_path / "m")
    assert same_graph(*(graph_of(folder, Form(cached=cached, lazy=lazy)) for lazy in (False, True)))


def test_the_logits_of_float16_are_near(tmp_path):
    folder = write(tmp_path / "m")
    truth = truth_of(folder)
    half = Form(ir.DataType.FLOAT16, cached=True)
    decoder = opened(graph_of(folder, half))
    assert decoder.signature.dtype == np.float16
    assert 1e-6 < np.abs(stepped(decoder, IDS[0]) - truth[0]).max() / np.abs(truth).max() < 5e-3
    plain = graph_of(folder, Form(ir.DataType.FLOAT16))
    assert np.abs(answer(plain) - truth).max() / np.abs(truth).max() < 5e-3


def test_padding_changes_nothing(tmp_path):
    model = graph_of(write(tmp_path / "m"))
    other, mask = IDS.copy(), np.ones_like(IDS)
    other[:, 20:], mask[:, 20:] = 7, 0
    np.testing.assert_allclose(answer(model, other, mask)[:, :20], answer(model)[:, :20], atol=1e-5)


def test_old_checkpoints_without_prefix_and_with_the_masks_of_attention_are_read(tmp_path):
    triangle = np.tril(np.ones((1, 1, 40, 40), np.uint8))
    masks = {f"h.{layer}.attn.bias": triangle for layer in range(2)}
    masks |= {f"h.{layer}.attn.masked_bias": np.array(-1e4, np.float32) for layer in range(2)}
    old = write(tmp_path / "old", weights(CONFIG, prefix="") | masks, n_ctx=40)
    new = write(tmp_path / "new")
    np.testing.assert_array_equal(truth_of(old), truth_of(new))
    assert same_graph(graph_of(old), graph_of(new))


def test_names_sizes_and_metadata_are_those_of_the_checkpoint(tmp_path):
    folder = write(tmp_path / "m")
    model = load_model(folder)
    assert model.metadata_props[MAX_POSITIONS] == "40"
    assert model.graph.initializers["lm_head.weight"].meta[COPY] == "wte.weight"
    parts = [model.graph.initializers[f"h.1.attn.c_attn.{part}.weight"] for part in ("query", "key", "value")]
    stored = weights(CONFIG)["transformer.h.1.attn.c_attn.weight"]
    np.testing.assert_array_equal(np.concatenate([part.const_value.numpy() for part in parts], 1), stored)
    real = sum(tensor.size for tensor in weights(CONFIG).values())
    assert 0 <= load_source(folder).info.parameters - real < 64  # what Reshape, Slice and Range read


@pytest.mark.rtx
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_the_decoder_builds_for_rtx(tmp_path, dtype):
    pytest.importorskip("tensorrt_rtx")
    model = graph_of(write(tmp_path / "m"), Form(dtype, cached=True))
    assert engine_of(model, {"batch": (1, 1, 2), "sequence": (1, 1, 8)}).plan


def test_a_class_with_another_head_is_refused(tmp_path):
    folder = write(tmp_path / "m", architectures=["GPT2ForSequenceClassification"])
    with pytest.raises(ModelInvalid, match="'GPT2ForSequenceClassification' is not built from model_type 'gpt2'"):
        load_model(folder)


BAD = {
    "heads": ({"n_head": 5}, "5 heads do not divide n_embd 32"),
    "no layers": ({"n_layer": 0}, "n_layer"),
    "activation": ({"activation_function": "tanh"}, "activation_function"),
    "cross attention": ({"add_cross_attention": True}, "add_cross_attention"),
    "another width": ({"n_inner": 30}, r"c_fc.weight' is \[32, 128\], config.json asks for \[32, 30\]"),
    "more layers": ({"n_layer": 3}, r"'h.2.ln_1.weight' is missing"),
    "no head": ({"tie_word_embeddings": False}, r"'lm_head.weight' is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_config_that_cannot_be_built_is_refused_by_the_field(tmp_path, name):
    changes, message = BAD[name]
    with pytest.raises(ModelInvalid, match=message):
        load_model(write(tmp_path / "m", weights(CONFIG), **changes))
