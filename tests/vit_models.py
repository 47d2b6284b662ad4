"""Tiny vision transformers in folders, as their checkpoints have them."""

from __future__ import annotations

import folders
import numpy as np

CLASSIFIER, LAYERS = "ViTForImageClassification", "ViTModel"
CONFIG = {
    "model_type": "vit",
    "architectures": [LAYERS],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
    "qkv_bias": True,
}
LABELLED = {"architectures": [CLASSIFIER], "id2label": {"0": "cat", "1": "dog", "2": "Bär"}}


def weights(config, *, pooler=True, prefix="vit."):
    rng, width, inner = np.random.default_rng(0), config["hidden_size"], config["intermediate_size"]
    sizes, patch = (
        (size, size) if isinstance(size, int) else size for size in (config["image_size"], config["patch_size"])
    )
    patches = (sizes[0] // patch[0]) * (sizes[1] // patch[1])
    shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, patches + 1, width),
        "embeddings.patch_embeddings.projection.weight": (width, config["num_channels"], *patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
    }
    linears = {"pooler.dense": (20, width)} if pooler else {}
    norms = ["layernorm"]
    for layer in range(config["num_hidden_layers"]):
        scope = f"encoder.layer.{layer}"
        linears |= {f"{scope}.attention.attention.{part}": (width, width) for part in ("query", "key", "value")}
        linears |= {f"{scope}.attention.output.dense": (width, width), f"{scope}.output.dense": (width, inner)}
        linears[f"{scope}.intermediate.dense"] = (inner, width)
        norms += [f"{scope}.layernorm_before", f"{scope}.layernorm_after"]
    for name, shape in linears.items():
        shapes[f"{name}.weight"] = shape
        if config["qkv_bias"] or ".attention.attention." not in name:
            shapes[f"{name}.bias"] = shape[:1]
    shapes |= {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    if config["architectures"] == [CLASSIFIER]:
        shapes |= {"classifier.weight": (3, width), "classifier.bias": (3,)}
    return {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def write(path, tensors=None, **changes):
    """A folder with a checkpoint."""
    config = CONFIG | changes
    return folders.save(path, config, weights(config) if tensors is None else tensors)
