"""Decoders of the Llama kind, whole rows at once: what their published definitions say, from config.json as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    linear,
    rms_norm,
    rope_frequencies,
    rotate,
    split_heads,
)

TABLE = "model.embed_tokens.weight"
Config = Mapping[str, Any]


def open_reference(config: dict[str, Any], folder: Folder, form: Form) -> Reference:
    """``input_ids`` [batch, tokens] to ``logits`` [batch, tokens, vocabulary]; rows may be padded at their ends."""
    del form
    return _Decoder({key: value for key, value in config.items() if value is not None}, folder.weights(TABLE))


@dataclass(frozen=True, slots=True)
class _Decoder:
    config: Config
    weights: Weights

    def __call__(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        config, ids = self.config, feeds["input_ids"]
        hidden = self._matrix(TABLE, config["vocab_size"], config["hidden_size"])[ids]
        turns = np.exp(1j * np.outer(np.arange(ids.shape[1]), frequencies(config)))
        for layer in range(config["num_hidden_layers"]):
            scope = f"model.layers.{layer}"
            hidden = hidden + self._attend(scope, self._norm(f"{scope}.input_layernorm", hidden), turns)
            hidden = hidden + self._mix(f"{scope}.mlp", self._norm(f"{scope}.post_attention_layernorm", hidden))
        head = TABLE if config.get("tie_word_embeddings", False) else "lm_head.weight"
        hidden = self._norm("model.norm", hidden)
        return {"logits": linear(hidden, self._matrix(head, config["vocab_size"], config["hidden_size"]))}

    def _matrix(self, name: str, *shape: int) -> Array:
        return self.weights(name, shape)

    def _linear(self, name: str, x: Array, out: int) -> Array:
        """With a bias where the checkpoint has one."""
        bias = self._matrix(f"{name}.bias", out) if f"{name}.bias" in self.weights else None
        return linear(x, self._matrix(f"{name}.weight", out, x.shape[-1]), bias)

    def _norm(self, name: str, x: Array) -> Array:
        return rms_norm(x, self._matrix(f"{name}.weight", x.shape[-1]), self.config["rms_norm_eps"])

    def _optional(self, name: str, x: Array) -> Array:
        """A norm that only some families have."""
        return self._norm(name, x) if f"{name}.weight" in self.weights else x

    def _attend(self, scope: str, x: Array, turns: NDArray[np.complex128]) -> Array:
        config, dim = self.config, head_dim(self.config)
        heads = config["num_attention_heads"]
        counts = (heads, *2 * (config.get("num_key_value_heads", heads),))
        query, key, value = (
            split_heads(self._linear(f"{scope}.self_attn.{part}_proj", x, count * dim), count)
            for part, count in zip("qkv", counts, strict=True)
        )
        query, key = (
            rotate(self._optional(f"{scope}.self_attn.{part}_norm", part_heads), turns)
            for part, part_heads in (("q", query), ("k", key))
        )
        context = attention((query, key, value), scale=dim**-0.5, seen=causal(x.shape[1]))
        context = self._optional(f"{scope}.self_attn.attn_sub_norm", context)
        return self._linear(f"{scope}.self_attn.o_proj", context, x.shape[-1])

    def _mix(self, scope: str, x: Array) -> Array:
        inner, act = self.config["intermediate_size"], ACTIVATIONS[self.config.get("hidden_act", "silu")]
        x, out = act(self._linear(f"{scope}.gate_proj", x, inner)) * self._linear(f"{scope}.up_proj", x, inner), x
        return self._linear(f"{scope}.down_proj", self._optional(f"{scope}.ffn_sub_norm", x), out.shape[-1])


def head_dim(config: Config) -> int:
    """Size of one head."""
    size: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return size


def frequencies(config: Config) -> NDArray[np.float64]:
    """Radians per position of each pair of a head."""
    rope = {**config, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    plain = rope_frequencies(head_dim(config), rope.get("rope_theta", 10000.0))
    return SCALINGS[rope.get("rope_type", rope.get("type", "default"))](plain, rope)


def _llama3(plain: NDArray[np.float64], rope: Config) -> NDArray[np.float64]:
    """The published code of Llama 3.1, ``apply_scaling``, pair by pair."""
    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    found = []
    for frequency in plain:
        length = 2 * np.pi / frequency
        if length < old / high:
            found.append(frequency)
        elif length > old / low:
            found.append(frequency / factor)
        else:
            smooth = (old / length - low) / (high - low)
            found.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(found)


SCALINGS: dict[str, Callable[[NDArray[np.float64], Config], NDArray[np.float64]]] = {
    "default": lambda plain, rope: plain,
    "linear": lambda plain, rope: plain / rope["factor"],
    "llama3": _llama3,
}
