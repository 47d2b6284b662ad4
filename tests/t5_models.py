"""Tiny encoder-decoders of the T5 kind in folders, as their checkpoints have them."""

from __future__ import annotations

import folders
import numpy as np

CONFIG = {
    "model_type": "t5",
    "vocab_size": 50,
    "d_model": 24,
    "d_kv": 16,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 14,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "decoder_start_token_id": 0,
}


def shapes(config):
    width, heads, wide = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    found = {"shared.weight": (config["vocab_size"], width)}
    gated = config.get("feed_forward_proj", "gated-gelu").startswith("gated")
    products = {"wi_0": (wide, width), "wi_1": (wide, width)} if gated else {"wi": (wide, width)}
    for side in ("encoder", "decoder"):
        parts = ["SelfAttention", "EncDecAttention"][: 1 + (side == "decoder")]
        layers = config["num_layers" if side == "encoder" else "num_decoder_layers"] or config["num_layers"]
        for scope in (f"{side}.block.{layer}.layer" for layer in range(layers)):
            for index, part in enumerate(parts):
                found |= {f"{scope}.{index}.{part}.{name}.weight": (heads, width) for name in "qkv"}
                found[f"{scope}.{index}.{part}.o.weight"] = (width, heads)
            name = f"{scope}.{len(parts)}.DenseReluDense"
            found |= {f"{name}.{part}.weight": sizes for part, sizes in {**products, "wo": (width, wide)}.items()}
            found |= {f"{scope}.{index}.layer_norm.weight": (width,) for index in range(len(parts) + 1)}
        table = (config["relative_attention_num_buckets"], config["num_heads"])
        found[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = table
        found[f"{side}.final_layer_norm.weight"] = (width,)
    if config.get("tie_word_embeddings") is False:
        found["lm_head.weight"] = (config["vocab_size"], width)
    return found


def weights(config):
    rng = np.random.default_rng(0)
    scale = {"relative_attention_bias.weight": 1.5, "shared.weight": 2.0}
    return {
        name: rng.normal(0.1, next((s for end, s in scale.items() if name.endswith(end)), 0.4), sizes).astype(
            np.float32
        )
        for name, sizes in shapes(config).items()
    }


def write(path, tensors=None, **changes):
    """A folder with a checkpoint."""
    config = CONFIG | changes
    return folders.save(path, config, weights(config) if tensors is None else tensors)
