"""BERT, RoBERTa and DistilBERT with their heads: what their published definitions say, in double precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import Form
from qexport.exporter.families.weights import Weights, read_headers
from qexport.exporter.references import Feeds, Reference
from qexport.exporter.references.layers import (
    ACTIVATIONS,
    Array,
    attention,
    constant,
    layer_norm,
    linear,
    relu,
    split_heads,
)

TABLE = "embeddings.word_embeddings.weight"
Config = Mapping[str, Any]

_BERT_FIELDS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "activation": "hidden_act",
}
_BERT_PARTS = (
    "encoder.layer.{}.",
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    ("attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"),
)
_DISTILBERT_FIELDS = {"width": "dim", "layers": "n_layers", "heads": "n_heads", "activation": "activation"}
_DISTILBERT_PARTS = (
    "transformer.layer.{}.",
    ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
    ("sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"),
)


def open_reference(config: dict[str, Any], folder: Folder, form: Form) -> Reference:
    """The inputs of the graph to its outputs, those of the head that ``form`` or the folder names.

    Where ``attention_mask`` is 0, which is at the ends of rows, hidden states and logits of tokens mean nothing.
    """
    small = config["model_type"] == "distilbert"
    weights = folder.weights(TABLE).rounded(form.dtype.numpy())
    encoder = _Encoder(config, _DISTILBERT_FIELDS if small else _BERT_FIELDS, weights, replace(form, cached=False))
    modules = _modules(folder)
    head = HEADS[form.task or _told(config, encoder.weights, modules)]
    return lambda feeds: {
        name: array.astype(np.float32) for name, array in head(encoder, _Top(folder, modules), feeds).items()
    }


@dataclass(frozen=True, slots=True)
class _Encoder:
    config: Config
    fields: Mapping[str, str]
    weights: Weights
    form: Form

    def __call__(self, feeds: Feeds) -> Array:
        """[batch, tokens, width]."""
        hidden = self._embed(feeds)
        seen = feeds["attention_mask"][:, None, None, :] > 0
        parts = _BERT_PARTS if self.fields is _BERT_FIELDS else _DISTILBERT_PARTS
        for layer in range(self.get("layers")):
            scope = parts[0].format(layer)
            query, key, value, out = (scope + part for part in parts[1])
            first_norm, inner, outer, last_norm = (scope + part for part in parts[2])
            split = [split_heads(self.linear(part, hidden), self.get("heads")) for part in (query, key, value)]
            scale = constant((self.get("width") // self.get("heads")) ** -0.5, self.form)
            context = attention((split[0], split[1], split[2]), scale=scale, seen=seen)
            hidden = self._norm(first_norm, hidden + self.linear(out, context))
            activation = ACTIVATIONS[self.config.get(self.fields["activation"], "gelu")]
            hidden = self._norm(last_norm, hidden + self.linear(outer, activation(self.linear(inner, hidden))))
        return hidden

    def get(self, field: str) -> int:
        return int(self.config[self.fields[field]])

    def linear(self, name: str, x: Array) -> Array:
        return _linear(self.weights, name, x)

    def _embed(self, feeds: Feeds) -> Array:
        ids, tokens = feeds["input_ids"], feeds["input_ids"].shape[1]
        total = self._table("word")[ids].astype(np.float64)
        if "token_type_ids" in feeds:
            total = total + self._table("token_type")[feeds["token_type_ids"]]
        elif "embeddings.token_type_embeddings.weight" in self.weights:
            total = total + self._table("token_type")[0]
        counted = self.config["model_type"] in ("roberta", "xlm-roberta", "camembert")
        places = np.arange(tokens) + (self.config.get("pad_token_id", 1) + 1 if counted else 0)
        return self._norm("embeddings.LayerNorm", total + self._table("position")[places])

    def _table(self, name: str) -> Array:
        return _read(self.weights, f"embeddings.{name}_embeddings.weight")

    def _norm(self, name: str, x: Array) -> Array:
        epsilon = 1e-12 if self.fields is _DISTILBERT_FIELDS else self.config["layer_norm_eps"]
        return layer_norm(x, _read(self.weights, f"{name}.weight"), _read(self.weights, f"{name}.bias"), epsilon)


def _read(weights: Weights, name: str) -> Array:
    return weights(name, weights.shape(name))


def _linear(weights: Weights, name: str, x: Array) -> Array:
    bias = _read(weights, f"{name}.bias") if f"{name}.bias" in weights else None
    return linear(x, _read(weights, f"{name}.weight"), bias)


# ---------------------------------------------------------------- heads


@dataclass(frozen=True, slots=True)
class _Top:
    """What sentence-transformers lists behind the encoder: folders by names of modules."""

    folder: Folder
    modules: list[tuple[str, str]]

    def dense(self, x: Array) -> Array:
        for name, place in self.modules:
            if name == "Dense":
                path = self.folder.path / place / "model.safetensors"
                x = _linear(Weights(read_headers([path]), "linear.weight", str(path)), "linear", x)
                function = str(self.folder.json(f"{place}/config.json").get("activation_function", "Tanh"))
                x = _ENDS[function.rpartition(".")[2]](x)
        return x

    def pools_first(self) -> bool:
        """Whether a sentence is its first position, and not the mean."""
        place = next((place for name, place in self.modules if name == "Pooling"), "1_Pooling")
        if not self.folder.has(f"{place}/config.json"):
            return False
        config = self.folder.json(f"{place}/config.json")
        return "cls" in str(config.get("pooling_mode", "")) or bool(config.get("pooling_mode_cls_token"))


def _modules(folder: Folder) -> list[tuple[str, str]]:
    listed = folder.json("modules.json") if folder.has("modules.json") else []
    return [(module["type"].rpartition(".")[2], module["path"]) for module in listed]


def _sigmoid(x: Array) -> Array:
    share: Array = 0.5 + 0.5 * np.tanh(0.5 * x)
    return share


_ENDS: dict[str, Callable[[Array], Array]] = {"Identity": lambda x: x, "Tanh": np.tanh, "ReLU": relu}
_ENDS["Sigmoid"] = _sigmoid


def _told(config: Config, weights: Weights, modules: list[tuple[str, str]]) -> str:
    """The task that a folder was saved for."""
    name = str((config.get("architectures") or [""])[0])
    names = {module for module, _ in modules}
    if name.endswith("ForSequenceClassification") and not (names and "classifier.bias" not in weights):
        return "classification"
    if name.endswith("ForTokenClassification") and not (names and "classifier.bias" not in weights):
        return "token-classification"
    bare = name.endswith("ColBERT") and (not names or "linear.weight" in weights)
    return "multi-vector" if bare or ("Dense" in names and "Pooling" not in names) else "embedding"


def _embedding(encoder: _Encoder, top: _Top, feeds: Feeds) -> dict[str, Array]:
    hidden, mask = encoder(feeds), feeds["attention_mask"][..., None].astype(np.float64)
    sentence = hidden[:, 0] if top.pools_first() else (hidden * mask).sum(1) / np.maximum(mask.sum(1), 1)
    if "Pooling" in dict(top.modules):
        sentence = top.dense(sentence)
    return {"last_hidden_state": hidden, "sentence_embedding": _unit(sentence)}


def _classification(encoder: _Encoder, _top: _Top, feeds: Feeds) -> dict[str, Array]:
    first = encoder(feeds)[:, 0]
    if "classifier.out_proj.weight" in encoder.weights:
        return {"logits": encoder.linear("classifier.out_proj", np.tanh(encoder.linear("classifier.dense", first)))}
    if "pre_classifier.weight" in encoder.weights:
        return {"logits": encoder.linear("classifier", relu(encoder.linear("pre_classifier", first)))}
    return {"logits": encoder.linear("classifier", np.tanh(encoder.linear("pooler.dense", first)))}


def _token_classification(encoder: _Encoder, _top: _Top, feeds: Feeds) -> dict[str, Array]:
    return {"logits": encoder.linear("classifier", encoder(feeds))}


def _multi_vector(encoder: _Encoder, top: _Top, feeds: Feeds) -> dict[str, Array]:
    hidden = encoder(feeds)
    listed = "Dense" in dict(top.modules) and "Pooling" not in dict(top.modules)
    vectors = top.dense(hidden) if listed else encoder.linear("linear", hidden)
    return {"token_embeddings": _unit(vectors) * (feeds["attention_mask"][..., None] > 0)}


def _unit(x: Array) -> Array:
    vectors: Array = x / np.maximum(np.sqrt(np.square(x).sum(-1, keepdims=True)), 1e-12)
    return vectors


HEADS = {
    "embedding": _embedding,
    "classification": _classification,
    "token-classification": _token_classification,
    "multi-vector": _multi_vector,
}
