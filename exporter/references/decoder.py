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
    constant,
    kept,
    linear,
    rms_norm,
    rope_frequencies,
    rotate,
    split_heads,
)

TABLE = "model.embed_tokens.weight"
Config = Mapping[str, Any]
Frequencies = NDArray[np.float64]
ABSENT: dict[str, dict[str, Any]] = {
    "bitnet": {"hidden_act": "relu2", "rope_theta": 500000.0},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"sliding_window": 4096},
    "qwen3": {"sliding_window": 4096, "head_dim": 128},
}
"""What their definitions say of fields that config.json leaves out."""


def open_reference(config: dict[str, Any], folder: Folder, form: Form) -> Reference:
    """``input_ids`` [batch, tokens] to ``logits`` [batch, tokens, vocabulary]; rows may be padded at their ends."""
    return _Decoder(_known(config), folder.weights(TABLE).rounded(form.dtype.numpy()), form)


def reach(config: Config) -> int:
    """The longest window that a layer has."""
    known = _known(config)
    return max(window(known, layer) or 0 for layer in range(known["num_hidden_layers"]))


def _known(config: Config) -> Config:
    """With what is left out; null is left out as well."""
    known = {**ABSENT.get(config["model_type"], {}), **config}
    return {key: value for key, value in known.items() if value is not None}


@dataclass(frozen=True, slots=True)
class _Decoder:
    config: Config
    weights: Weights
    form: Form

    def __call__(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        config, ids = self.config, feeds["input_ids"]
        hidden = self._matrix(TABLE, config["vocab_size"], config["hidden_size"])[ids]
        frequencies, factor = rotary(config)
        angles = np.outer(np.arange(ids.shape[1], dtype=np.float32), frequencies.astype(np.float32))  # as published
        cos, sin = (kept(np.float32(factor) * turn(angles), self.form) for turn in (np.cos, np.sin))
        turns = cos.astype(np.float64) + 1j * sin.astype(np.float64)
        for layer in range(config["num_hidden_layers"]):
            scope = f"model.layers.{layer}"
            seen = causal(ids.shape[1], window(config, layer))
            hidden = hidden + self._attend(scope, self._norm(f"{scope}.input_layernorm", hidden), turns, seen)
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

    def _attend(self, scope: str, x: Array, turns: NDArray[np.complex128], seen: NDArray[np.bool_]) -> Array:
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
        context = attention((query, key, value), scale=constant(dim**-0.5, self.form), seen=seen)
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


def window(config: Config, layer: int) -> int | None:
    """How many positions a query sees, with its own; ``None`` for all before it."""
    size: int | None = config.get("sliding_window")
    if config["model_type"] == "mistral":
        return size
    if config["model_type"] not in ("qwen2", "qwen3") or not config.get("use_sliding_window"):
        return None
    late = layer >= config.get("max_window_layers", 28)
    kinds = config.get("layer_types")
    return size if (late if kinds is None else kinds[layer] == "sliding_attention") else None


def rotary(config: Config) -> tuple[Frequencies, float]:
    """Radians per position of each pair of a head, and the factor of what is turned."""
    rope = {**config, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    first = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    rope["original_max_position_embeddings"] = first or config["max_position_embeddings"]
    size = int(head_dim(config) * rope.get("partial_rotary_factor", 1.0))
    plain = rope_frequencies(size, rope.get("rope_theta", 10000.0))
    return SCALINGS[rope.get("rope_type", rope.get("type", "default"))](plain, rope)


def _llama3(plain: Frequencies, rope: Config) -> tuple[Frequencies, float]:
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
    return np.array(found), 1.0


def _yarn(plain: Frequencies, rope: Config) -> tuple[Frequencies, float]:
    """The published code of YaRN (Peng et al. 2023), pair by pair: which of them turn how often in the first length."""
    old, theta, factor = rope["original_max_position_embeddings"], rope.get("rope_theta", 10000.0), _stretch(rope)
    fast, slow = (
        2 * len(plain) * np.log(old / (2 * np.pi * turns)) / (2 * np.log(theta))
        for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    )
    if rope.get("truncate", True):
        fast, slow = np.floor(fast), np.ceil(slow)
    fast, slow = max(fast, 0), min(slow, 2 * len(plain) - 1)
    found = []
    for pair, frequency in enumerate(plain):
        kept = 1 - min(max((pair - fast) / ((slow - fast) or 0.001), 0), 1)
        found.append(frequency * kept + frequency / factor * (1 - kept))
    scale, everywhere = rope.get("mscale"), rope.get("mscale_all_dim")
    growth = np.log(factor) / 10
    louder = (scale * growth + 1) / (everywhere * growth + 1) if scale and everywhere else growth + 1
    return np.array(found), rope.get("attention_factor") or (louder if factor > 1 else 1.0)


def _longrope(plain: Frequencies, rope: Config) -> tuple[Frequencies, float]:
    """The published code of Phi-3, for texts within the first length (Ding et al. 2024)."""
    factor = _stretch(rope)
    louder = np.sqrt(1 + np.log(factor) / np.log(rope["original_max_position_embeddings"])) if factor > 1 else 1.0
    return plain / rope["short_factor"], rope.get("attention_factor") or louder


def _stretch(rope: Config) -> float:
    factor: float = rope.get("factor") or rope["max_position_embeddings"] / rope["original_max_position_embeddings"]
    return factor


SCALINGS: dict[str, Callable[[Frequencies, Config], tuple[Frequencies, float]]] = {
    "default": lambda plain, rope: (plain, 1.0),
    "dynamic": lambda plain, rope: (plain, 1.0),  # up to max_position_embeddings
    "linear": lambda plain, rope: (plain / rope["factor"], 1.0),
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
