"""T5 and mT5 (Raffel et al. 2020), whole rows at once: what their published code says, from config.json as it is."""

from __future__ import annotations

import math
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
    kept,
    linear,
    rms_norm,
    split_heads,
)

TABLE, HEAD = "shared.weight", "lm_head.weight"
_OTHER_TABLES = ("decoder.embed_tokens.weight", "encoder.embed_tokens.weight")  # of savers that kept another name


def open_reference(config: dict[str, Any], folder: Folder, form: Form) -> Reference:
    """``input_ids``, ``attention_mask`` [batch, source], ``decoder_input_ids`` [batch, tokens] to ``logits``.

    Logits are [batch, tokens, vocabulary]; all rows may be padded at their ends, and a mask left out hides nothing.
    """
    weights = folder.weights(TABLE).rounded(form.dtype.numpy())
    return _T5({key: value for key, value in config.items() if value is not None}, weights, form)


def reach(config: Mapping[str, Any]) -> int:
    """Where the last bucket of distances begins, at the latest."""
    far: int = config.get("relative_attention_max_distance") or 128
    return far


@dataclass(frozen=True, slots=True)
class _T5:
    config: Mapping[str, Any]
    weights: Weights
    form: Form

    def __call__(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        config, source, tokens = self.config, feeds["input_ids"], feeds["decoder_input_ids"]
        real = feeds.get("attention_mask", np.ones_like(source)).astype(bool)[:, None, None]
        found = self._encode(source, real)
        hidden, seen = self._embed(tokens), causal(tokens.shape[1])
        bias = self._bias("decoder", tokens.shape[1])
        for index in range(config.get("num_decoder_layers", config["num_layers"])):
            scope = f"decoder.block.{index}.layer"
            x = self._norm(f"{scope}.0", hidden)
            hidden = hidden + self._attend(f"{scope}.0.SelfAttention", (x, x), seen, bias)
            x = self._norm(f"{scope}.1", hidden)
            hidden = hidden + self._attend(f"{scope}.1.EncDecAttention", (x, found), real)
            hidden = hidden + self._mix(f"{scope}.2", self._norm(f"{scope}.2", hidden))
        return {"logits": self._score(self._norm("decoder.final", hidden))}

    def _encode(self, source: NDArray[Any], real: NDArray[np.bool_]) -> Array:
        hidden, bias = self._embed(source), self._bias("encoder", source.shape[1])
        for index in range(self.config["num_layers"]):
            scope = f"encoder.block.{index}.layer"
            x = self._norm(f"{scope}.0", hidden)
            hidden = hidden + self._attend(f"{scope}.0.SelfAttention", (x, x), real, bias)
            hidden = hidden + self._mix(f"{scope}.1", self._norm(f"{scope}.1", hidden))
        return self._norm("encoder.final", hidden)

    def _score(self, hidden: Array) -> Array:
        config = self.config
        tied = config.get("tie_word_embeddings", True) and config["model_type"] == "t5"
        if config.get("scale_decoder_outputs", tied):
            hidden = hidden * kept(np.array(config["d_model"] ** -0.5, np.float32), self.form)
        own = HEAD in self.weights
        return linear(hidden, self._words(HEAD) if own else self._table())

    def _words(self, name: str) -> Array:
        return self.weights(name, (self.config["vocab_size"], self.config["d_model"]))

    def _table(self) -> Array:
        return self._words(next((name for name in (TABLE, *_OTHER_TABLES) if name in self.weights), TABLE))

    def _embed(self, ids: NDArray[Any]) -> Array:
        rows: Array = self._table()[ids]
        return rows

    def _norm(self, scope: str, x: Array) -> Array:
        name = f"{scope}_layer_norm" if scope.endswith("final") else f"{scope}.layer_norm"
        return rms_norm(x, self.weights(f"{name}.weight", x.shape[-1:]), self.config.get("layer_norm_epsilon", 1e-6))

    def _linear(self, name: str, x: Array, out: int) -> Array:
        return linear(x, self.weights(f"{name}.weight", (out, x.shape[-1])))

    def _attend(self, scope: str, xs: tuple[Array, Array], seen: NDArray[np.bool_], bias: Array | None = None) -> Array:
        """Of the first to the second, [batch, tokens, d_model] each; scores are not scaled."""
        config, heads = self.config, self.config["num_heads"]
        query, key, value = (
            split_heads(self._linear(f"{scope}.{part}", x, heads * config["d_kv"]), heads)
            for part, x in zip("qkv", (xs[0], xs[1], xs[1]), strict=True)
        )
        context = attention((query, key, value), scale=1.0, seen=seen, bias=bias)
        return self._linear(f"{scope}.o", context, config["d_model"])

    def _mix(self, scope: str, x: Array) -> Array:
        kind = self.config.get("feed_forward_proj", "relu" if self.config["model_type"] == "t5" else "gated-gelu")
        act = ACTIVATIONS[{"gated-gelu": "gelu_new"}.get(kind, kind.split("-")[-1])]
        scope, wide = f"{scope}.DenseReluDense", self.config["d_ff"]
        if kind.startswith("gated-"):
            inner = act(self._linear(f"{scope}.wi_0", x, wide)) * self._linear(f"{scope}.wi_1", x, wide)
        else:
            inner = act(self._linear(f"{scope}.wi", x, wide))
        return self._linear(f"{scope}.wo", inner, x.shape[-1])

    def _bias(self, side: str, tokens: int) -> Array:
        """[heads, tokens, tokens]."""
        count, far = (
            self.config.get(f"relative_attention_{what}", default)
            for what, default in (("num_buckets", 32), ("max_distance", 128))
        )
        name = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rows, both = self.weights(name, (count, self.config["num_heads"])), side == "encoder"
        known = {back: bucket(back, count, far, both=both) for back in range(-tokens + 1, tokens)}
        places = [[known[query - key] for key in range(tokens)] for query in range(tokens)]
        bias: Array = rows[np.array(places)].transpose(2, 0, 1)
        return bias


def bucket(back: int, count: int, far: int, *, both: bool) -> int:
    """Where the bias of a key ``back`` tokens before the query is, as ``_relative_position_bucket`` of the code."""
    if not both:
        return _one_sided(max(back, 0), count, far)
    count //= 2
    return _one_sided(abs(back), count, far) + (count if back < 0 else 0)


def _one_sided(distance: int, count: int, far: int) -> int:
    exact = count // 2
    if distance < exact:
        return distance
    share = np.float32(math.log(distance / exact)) / np.float32(math.log(far / exact))  # the code divides in float32
    return min(exact + int(share * np.float32(count - exact)), count - 1)
