"""GPT-2 (Radford et al. 2019), whole rows at once: what its published definition says, from config.json as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import Form
from qexport.exporter.families.weights import Weights
from qexport.exporter.references import Feeds, Reference
from qexport.exporter.references.layers import (
    ACTIVATIONS,
    Array,
    attention,
    causal,
    constant,
    layer_norm,
    linear,
    split_heads,
)

TABLE = "wte.weight"


def open_reference(config: dict[str, Any], folder: Folder, form: Form) -> Reference:
    """``input_ids`` [batch, tokens] to ``logits`` [batch, tokens, vocabulary]; rows may be padded at their ends."""
    weights = folder.weights(TABLE).rounded(form.dtype.numpy())
    return _GPT2({key: value for key, value in config.items() if value is not None}, weights, form)


@dataclass(frozen=True, slots=True)
class _GPT2:
    config: Mapping[str, Any]
    weights: Weights
    form: Form

    def __call__(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        config, ids = self.config, feeds["input_ids"]
        words, width = (config["vocab_size"], config["n_embd"]), config["n_embd"]
        hidden = self.weights(TABLE, words)[ids]
        hidden = hidden + self.weights("wpe.weight", (config["n_positions"], width))[: ids.shape[1]]
        for layer in range(config["n_layer"]):
            hidden = hidden + self._attend(layer, self._norm(f"h.{layer}.ln_1", hidden))
            hidden = hidden + self._mix(f"h.{layer}.mlp", self._norm(f"h.{layer}.ln_2", hidden))
        head = TABLE if config.get("tie_word_embeddings", True) else "lm_head.weight"
        return {"logits": linear(self._norm("ln_f", hidden), self.weights(head, words))}

    def _norm(self, name: str, x: Array) -> Array:
        gamma, beta = (self.weights(f"{name}.{part}", x.shape[-1:]) for part in ("weight", "bias"))
        return layer_norm(x, gamma, beta, self.config.get("layer_norm_epsilon", 1e-5))

    def _product(self, name: str, x: Array, out: int) -> Array:
        """Stored as [in, out], unlike other products."""
        product: Array = x @ self.weights(f"{name}.weight", (x.shape[-1], out)) + self.weights(f"{name}.bias", (out,))
        return product

    def _attend(self, layer: int, x: Array) -> Array:
        config, width = self.config, x.shape[-1]
        heads = config["n_head"]
        fused = self._product(f"h.{layer}.attn.c_attn", x, 3 * width)
        query, key, value = (split_heads(part, heads) for part in np.split(fused, 3, axis=-1))
        scale = (width / heads) ** -0.5 if config.get("scale_attn_weights", True) else 1.0
        if config.get("scale_attn_by_inverse_layer_idx", False):
            scale /= layer + 1
        factor = constant(scale, self.form)
        context = attention((query, key, value), scale=factor, seen=causal(x.shape[1]))
        return self._product(f"h.{layer}.attn.c_proj", context, width)

    def _mix(self, scope: str, x: Array) -> Array:
        width = x.shape[-1]
        act = ACTIVATIONS[self.config.get("activation_function", "gelu_new")]
        inner = act(self._product(f"{scope}.c_fc", x, self.config.get("n_inner", 4 * width)))
        return self._product(f"{scope}.c_proj", inner, width)
