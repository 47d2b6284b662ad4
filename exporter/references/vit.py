"""Vision transformers: what Dosovitskiy et al. 2021 say, patch by patch, from config.json as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import Form
from qexport.exporter.families.weights import Weights
from qexport.exporter.references import Feeds, Reference
from qexport.exporter.references.layers import ACTIVATIONS, Array, attention, constant, layer_norm, linear, split_heads

PATCH = "embeddings.patch_embeddings.projection"
DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
DEFAULTS |= {"image_size": 224, "patch_size": 16, "num_channels": 3}


def open_reference(config: dict[str, Any], folder: Folder, form: Form) -> Reference:
    """``pixel_values`` [batch, channels, height, width] to ``logits``, or to hidden states and what is pooled."""
    classifies = (config.get("architectures") or [""])[0].endswith("ForImageClassification")
    task = form.task or ("classification" if classifies else "embedding")
    return _Vit({**DEFAULTS, **config}, folder.weights(f"{PATCH}.weight").rounded(form.dtype.numpy()), task, form)


@dataclass(frozen=True, slots=True)
class _Vit:
    config: Mapping[str, Any]
    weights: Weights
    task: str
    form: Form

    def __call__(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        hidden = self._embed(feeds["pixel_values"].astype(np.float32))
        for layer in range(self.config["num_hidden_layers"]):
            scope = f"encoder.layer.{layer}"
            hidden = hidden + self._attend(f"{scope}.attention", self._norm(f"{scope}.layernorm_before", hidden))
            inner = self._linear(f"{scope}.intermediate.dense", self._norm(f"{scope}.layernorm_after", hidden))
            inner = ACTIVATIONS[self.config.get("hidden_act", "gelu")](inner)
            hidden = hidden + self._linear(f"{scope}.output.dense", inner)
        hidden = self._norm("layernorm", hidden)
        first = hidden[:, 0]
        if self.task == "classification":
            return {"logits": self._linear("classifier", first)}
        if "pooler.dense.weight" in self.weights:
            return {"last_hidden_state": hidden, "pooler_output": np.tanh(self._linear("pooler.dense", first))}
        return {"last_hidden_state": hidden, "cls_embedding": first}

    def _weight(self, name: str) -> Array:
        return self.weights(name, self.weights.shape(name))

    def _linear(self, name: str, x: Array) -> Array:
        bias = self._weight(f"{name}.bias") if f"{name}.bias" in self.weights else None
        return linear(x, self._weight(f"{name}.weight"), bias)

    def _norm(self, name: str, x: Array) -> Array:
        epsilon = self.config.get("layer_norm_eps", 1e-12)
        return layer_norm(x, self._weight(f"{name}.weight"), self._weight(f"{name}.bias"), epsilon)

    def _embed(self, pixels: Array) -> Array:
        """Row by row of patches, from the left."""
        high, wide = (_pair(self.config["patch_size"])[axis] for axis in (0, 1))
        kernel, bias = self._weight(f"{PATCH}.weight"), self._weight(f"{PATCH}.bias")
        tokens = [np.broadcast_to(self._weight("embeddings.cls_token"), (len(pixels), 1, len(bias)))]
        for top in range(0, pixels.shape[2] - high + 1, high):
            for left in range(0, pixels.shape[3] - wide + 1, wide):
                patch = pixels[:, :, top : top + high, left : left + wide].reshape(len(pixels), 1, -1)
                tokens.append(linear(patch, kernel.reshape(len(bias), -1), bias))
        embedded: Array = np.concatenate(tokens, axis=1) + self._weight("embeddings.position_embeddings")
        return embedded

    def _attend(self, scope: str, x: Array) -> Array:
        heads = self.config["num_attention_heads"]
        query, key, value = (
            split_heads(self._linear(f"{scope}.attention.{part}", x), heads) for part in ("query", "key", "value")
        )
        scale = constant(query.shape[-1] ** -0.5, replace(self.form, cached=False))
        context = attention((query, key, value), scale=scale)
        return self._linear(f"{scope}.output.dense", context)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
