"""Tiny decoders of the Llama kind in folders, as their checkpoints have them."""

from __future__ import annotations

import folders
import numpy as np

BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
MIXED = {"use_sliding_window": True, "sliding_window": 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "mistral": {"model_type": "mistral", "sliding_window": 6},
    "mistral, no window": {"model_type": "mistral", "sliding_window": None, "head_dim": 12},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2, late windows": {"model_type": "qwen2", "max_window_layers": 1, **MIXED},
    "qwen2, chosen windows": {"model_type": "qwen2", "layer_types": LAYER_TYPES, **MIXED},
    "qwen2, yarn": {"model_type": "qwen2", "rope_scaling": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3, one key head": {"model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 1, "attention_bias": True},
    "qwen3, chosen windows": {"model_type": "qwen3", "head_dim": 8, "layer_types": LAYER_TYPES, **MIXED},
    "bitnet": {"model_type": "bitnet", "hidden_act": "relu2", "attention_bias": True},
    "bitnet, tied": {"model_type": "bitnet", "hidden_act": "silu", "tie_word_embeddings": True},
}


def settle(name, **changes):
    """The config of a case with changes."""
    return {**BASE, **CASES[name], **changes}


def shapes(config):
    """Every tensor that such a checkpoint has."""
    kind, width, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or width // heads
    found = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], width)
    counts = {"q": heads, "k": keys, "v": keys}
    products = {f"self_attn.{part}_proj": (count * dim, width) for part, count in counts.items()}
    products |= {"self_attn.o_proj": (width, heads * dim), "mlp.down_proj": (width, inner)}
    products |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
    biased = list(products)[:4] if config.get("attention_bias") else list(products)[:3] if kind == "qwen2" else []
    norms = {"input_layernorm": width, "post_attention_layernorm": width}
    norms |= {"self_attn.q_norm": dim, "self_attn.k_norm": dim} if kind == "qwen3" else {}
    norms |= {"self_attn.attn_sub_norm": heads * dim, "mlp.ffn_sub_norm": inner} if kind == "bitnet" else {}
    for layer in range(config["num_hidden_layers"]):
        scope = f"model.layers.{layer}."
        found |= {f"{scope}{name}.weight": (size,) for name, size in norms.items()}
        found |= {f"{scope}{name}.weight": sizes for name, sizes in products.items()}
        found |= {f"{scope}{name}.bias": products[name][:1] for name in biased}
    return found


def weights(config):
    """Numbers for them, norms around 1."""
    rng = np.random.default_rng(0)
    return {
        name: (0.3 * rng.standard_normal(sizes) + ("norm" in name)).astype(np.float32)
        for name, sizes in shapes(config).items()
    }


def write(path, config, tensors=None):
    """A folder with a checkpoint."""
    return folders.save(path, config, weights(config) if tensors is None else tensors)


def truth_of(path, ids):
    """What the reference says."""
    return folders.truth_of(path, {"input_ids": ids})["logits"]
