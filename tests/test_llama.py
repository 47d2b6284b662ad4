"""Llama decoders built from config and weights: against the equations in numpy, and against transformers' answers."""

from __future__ import annotations

import math
from pathlib import Path

import folders
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qexport.errors import ModelInvalid
from qexport.exporter.load import load_model, load_source
from qexport.passes.cleanup import Cleanup
from qexport.passes.fuse_rms_norm import FuseRMSNorm
from qexport.passes.portable import MAX_POSITIONS
from qexport.passes.raise_opset import RaiseOpset

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "rope_theta": 100.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
NAMES = ("target", "stories260k")


def settle(**changes):
    """CONFIG with changes; ``None`` takes a field away."""
    return {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}


def weights(config):
    rng = np.random.default_rng(0)
    heads, keys = config["num_attention_heads"], config.get("num_key_value_heads", config["num_attention_heads"])
    width, inner = config["hidden_size"], config["intermediate_size"]
    dim = config.get("head_dim", width // heads)
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    linears = {"self_attn.q_proj": (heads * dim, width), "self_attn.o_proj": (width, heads * dim)}
    linears |= {"self_attn.k_proj": (keys * dim, width), "self_attn.v_proj": (keys * dim, width)}
    linears |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    for layer in range(config["num_hidden_layers"]):
        scope = f"model.layers.{layer}"
        shapes |= {f"{scope}.{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
        for name, shape in linears.items():
            shapes[f"{scope}.{name}.weight"] = shape
            if config.get("attention_bias" if "attn" in name else "mlp_bias"):
                shapes[f"{scope}.{name}.bias"] = shape[:1]
    return {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def write(path, config, tensors=None):
    return folders.save(path, config, weights(config) if tensors is None else tensors)


def session(model):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def answer(model, ids, mask=None):
    ids = np.atleast_2d(ids).astype(np.int64)
    mask = np.ones_like(ids) if mask is None else np.atleast_2d(mask).astype(np.int64)
    return session(model).run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]


def frequencies(config, dim):
    """Radians per position of every pair, one at a time, as Llama 3.1's code has it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    found = []
    for pair in range(dim // 2):
        frequency = theta ** (-2 * pair / dim)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "linear":
            frequency /= rope["factor"]
        if kind == "llama3":
            length, old = 2 * math.pi / frequency, rope["original_max_position_embeddings"]
            if length > old / rope["low_freq_factor"]:
                frequency /= rope["factor"]
            elif length >= old / rope["high_freq_factor"]:
                smooth = old / length - rope["low_freq_factor"]
                smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
                frequency = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
        found.append(frequency)
    return np.array(found)


def numpy_llama(config, w, ids):
    """One sentence, a query at a time, positions as complex numbers: logits [tokens, vocabulary]."""
    heads, keys = config["num_attention_heads"], config.get("num_key_value_heads", config["num_attention_heads"])
    dim = config.get("head_dim", config["hidden_size"] // heads)
    w = {name: tensor.astype(np.float64) for name, tensor in w.items()}
    turns = np.exp(1j * np.outer(np.arange(len(ids)), frequencies(config, dim)))

    def norm(x, scope):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * w[f"{scope}.weight"]

    def linear(x, scope):
        return x @ w[f"{scope}.weight"].T + w.get(f"{scope}.bias", 0)

    def rotate(x):
        turned = (x[..., : dim // 2] + 1j * x[..., dim // 2 :]) * turns[:, None]
        return np.concatenate([turned.real, turned.imag], -1)

    x = w["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        scope = f"model.layers.{layer}"
        h = norm(x, f"{scope}.input_layernorm")
        q = rotate(linear(h, f"{scope}.self_attn.q_proj").reshape(-1, heads, dim))
        k = rotate(linear(h, f"{scope}.self_attn.k_proj").reshape(-1, keys, dim))
        v = linear(h, f"{scope}.self_attn.v_proj").reshape(-1, keys, dim)
        context = np.zeros((len(ids), heads, dim))
        for t in range(len(ids)):
            for head in range(heads):
                key = head * keys // heads
                chances = np.exp(k[: t + 1, key] @ q[t, head] / np.sqrt(dim))
                context[t, head] = chances / chances.sum() @ v[: t + 1, key]
        x = x + linear(context.reshape(len(ids), -1), f"{scope}.self_attn.o_proj")
        h = norm(x, f"{scope}.post_attention_layernorm")
        gate = linear(h, f"{scope}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{scope}.mlp.up_proj"), f"{scope}.mlp.down_proj")
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.T


VARIANTS = {
    "grouped queries": {},
    "one key head": {"num_key_value_heads": 1},
    "a key head for every head": {"num_key_value_heads": None},
    "wide heads": {"head_dim": 12},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "rope in one field": {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "rope theta left out": {"rope_theta": None},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "no scaling, said": {"rope_scaling": None, "head_dim": 8, "hidden_act": "swish"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_graph_computes_what_the_equations_say(tmp_path, name):
    config = settle(**VARIANTS[name])
    tensors = weights(config)
    ids = np.random.default_rng(1).integers(0, 50, 40)
    found = answer(load_model(write(tmp_path / "m", config, tensors)), ids)[0]
    truth = numpy_llama(config, tensors, ids)
    np.testing.assert_allclose(found, truth, rtol=0, atol=2e-5 * np.abs(truth).max())


def test_every_part_of_the_llama3_ramp_is_tried():
    old, changed = (frequencies(settle(**part), 16) for part in ({}, {"rope_scaling": LLAMA3}))
    ratios = changed / old
    assert ratios[0] == 1
    assert ratios[-1] == 1 / LLAMA3["factor"]
    assert ((ratios < 1) & (ratios > 1 / LLAMA3["factor"])).any()


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers_though_padded(samples, name):
    with np.load(Path(__file__).with_name("golden") / "decoders.npz") as golden:
        rows = [{part: golden[f"{name}_{part}_{row}"] for part in ("ids", "logits", "best")} for row in (0, 1)]
    longest = max(len(row["ids"]) for row in rows)
    ids = np.stack([np.pad(row["ids"], (0, longest - len(row["ids"])), constant_values=3) for row in rows])
    mask = np.stack([np.arange(longest) < len(row["ids"]) for row in rows])
    for row, found in zip(rows, answer(load_model(samples / "decoder" / name), ids, mask), strict=True):
        real = found[: len(row["ids"])]
        np.testing.assert_allclose(real[::12], row["logits"], rtol=0, atol=1e-5 * np.abs(row["logits"]).max())
        np.testing.assert_array_equal(real.argmax(1), row["best"])


def test_what_stands_at_masked_positions_changes_nothing(tmp_path):
    model = load_model(write(tmp_path / "m", CONFIG))
    ids, other = np.arange(1, 13), np.arange(1, 13)
    other[8:] = 40
    mask = np.arange(12) < 8
    np.testing.assert_array_equal(answer(model, ids, mask)[0, :8], answer(model, other, mask)[0, :8])
    np.testing.assert_allclose(answer(model, ids, mask)[0, :8], answer(model, ids[:8])[0], atol=1e-5)


def test_padding_in_front_changes_nothing_since_only_distances_count(tmp_path):
    model = load_model(write(tmp_path / "m", CONFIG))
    ids = np.arange(1, 9)
    front = answer(model, np.concatenate([[7, 7, 7], ids]), np.arange(11) >= 3)[0, 3:]
    np.testing.assert_allclose(front, answer(model, ids)[0], atol=1e-4)


def test_no_position_sees_a_later_one(tmp_path):
    model = load_model(write(tmp_path / "m", CONFIG))
    ids = np.arange(1, 13)
    changed = np.where(np.arange(12) < 7, ids, 30)
    one, other = answer(model, ids)[0], answer(model, changed)[0]
    np.testing.assert_array_equal(one[:7], other[:7])
    assert (np.abs(one[7:] - other[7:]).max(1) > 0.01).all()


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_weights_are_read_as_float32(tmp_path, kind):
    small = {name: tensor.astype(kind) for name, tensor in weights(CONFIG).items()}
    ids = np.arange(20)
    truth = numpy_llama(CONFIG, {name: tensor.astype(np.float32) for name, tensor in small.items()}, ids)
    found = answer(load_model(write(tmp_path / "m", CONFIG, small)), ids)[0]
    np.testing.assert_allclose(found, truth, rtol=0, atol=2e-5 * np.abs(truth).max())


def test_a_copy_of_tied_embeddings_is_no_second_set_of_parameters(tmp_path):
    config = settle(tie_word_embeddings=True)
    info = load_source(write(tmp_path / "m", config)).info
    real = sum(tensor.size for tensor in weights(config).values())
    assert 0 <= info.parameters - real < 2 * 64 * 4 + 64  # the rotary tables and what Reshape and Slice read


def test_a_head_of_its_own_in_the_file_is_left_alone_where_embeddings_are_tied(tmp_path):
    config = settle(tie_word_embeddings=True)
    tensors = weights(config)
    truth = numpy_llama(config, tensors, np.arange(9))
    found = answer(
        load_model(write(tmp_path / "m", config, {**tensors, "lm_head.weight": np.ones((50, 32))})), range(9)
    )
    np.testing.assert_allclose(found[0], truth, atol=2e-5 * np.abs(truth).max())


def test_weights_below_a_common_prefix_are_found(tmp_path):
    tensors = {f"language_model.{name}": tensor for name, tensor in weights(CONFIG).items()}
    plain, below = (load_model(write(tmp_path / name, CONFIG, t)) for name, t in (("a", None), ("b", tensors)))
    np.testing.assert_array_equal(answer(plain, range(9)), answer(below, range(9)))


def test_every_normalization_is_fused_where_the_operator_exists(tmp_path):
    model = load_model(write(tmp_path / "m", CONFIG))
    before = answer(model, range(20))
    for step in (RaiseOpset(), Cleanup(), FuseRMSNorm()):
        step.call(model)
    ops = [node.op_type for node in model.graph]
    assert ops.count("RMSNormalization") == 5
    assert "ReduceMean" not in ops
    np.testing.assert_allclose(answer(model, range(20)), before, atol=1e-5 * np.abs(before).max())


def test_names_and_metadata_are_those_of_the_checkpoint(tmp_path):
    model = load_model(write(tmp_path / "m", CONFIG))
    assert [value.name for value in model.graph.inputs] == ["input_ids", "attention_mask"]
    assert [list(value.shape) for value in model.graph.outputs] == [["batch", "sequence", 50]]
    assert {"model.layers.1.self_attn.q_proj/MatMul", "lm_head/MatMul"} <= {node.name for node in model.graph}
    assert set(weights(CONFIG)) <= set(model.graph.initializers)
    assert model.metadata_props[MAX_POSITIONS] == "64"
    assert model.opset_imports[""] == 20


BAD = {
    "rope_scaling.type": (
        {"rope_scaling": {"rope_type": "spiral", "factor": 4.0}},
        r"rope_parameters.rope_type.*default",
    ),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "ramp": ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor is not below"),
    "rope is a list": ({"rope_scaling": [1]}, "rope_parameters"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "heads": ({"num_attention_heads": 5}, "5 heads do not divide hidden_size 32"),
    "key heads": ({"num_key_value_heads": 3}, "3 key heads do not divide 4 heads"),
    "odd head": ({"head_dim": 7}, "head_dim"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "heads in words": ({"num_attention_heads": "four"}, "num_attention_heads"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "missing": ({"intermediate_size": None}, "intermediate_size"),
    "a table without end": ({"max_position_embeddings": 1 << 40}, "max_position_embeddings"),
    "a head without end": ({"head_dim": 1 << 40}, "head_dim"),
    "another width": ({"intermediate_size": 52}, r"gate_proj.weight' is \[48, 32\], config.json asks for \[52, 32\]"),
    "more layers": ({"num_hidden_layers": 3}, r"'model.layers.2.input_layernorm.weight' is missing"),
    "biases": ({"attention_bias": True}, r"q_proj.bias' is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_config_that_cannot_be_built_is_refused_by_the_field(tmp_path, name):
    changes, message = BAD[name]
    with pytest.raises(ModelInvalid, match=message):
        load_model(write(tmp_path / "m", settle(**changes), weights(CONFIG)))


def test_an_untied_model_without_a_head_is_refused(tmp_path):
    tensors = weights(CONFIG)
    del tensors["lm_head.weight"]
    with pytest.raises(ModelInvalid, match=r"'lm_head.weight' is missing"):
        load_model(write(tmp_path / "m", CONFIG, tensors))
