"""Tiny encoders of every family in folders, as their checkpoints have them."""

from __future__ import annotations

import json

import folders
import numpy as np
from safetensors.numpy import save_file

from qexport.exporter.families.form import Form

WIDTH, INNER, WORDS, LABELS, PLACES = 32, 64, 50, 3, 20
SHARED = {"vocab_size": WORDS, "max_position_embeddings": PLACES}
BERT = SHARED | {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": INNER,
    "layer_norm_eps": 1e-3,
    "hidden_act": "gelu",
}
CONFIGS = {
    "bert": BERT | {"type_vocab_size": 2},
    "roberta": BERT | {"type_vocab_size": 1, "pad_token_id": 1},
    "xlm-roberta": BERT | {"type_vocab_size": 1, "pad_token_id": 1, "hidden_act": "gelu_new"},
    "camembert": BERT | {"type_vocab_size": 1, "pad_token_id": 4},
    "distilbert": SHARED | {"dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": INNER, "activation": "gelu"},
}
ARCHITECTURES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "distilbert": "DistilBert",
}
PREFIXES = {"bert": "bert", "distilbert": "distilbert"}
SUFFIXES = {
    "embedding": "Model",
    "classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
}
TASKS = (*SUFFIXES, "multi-vector")
SQUARE = (WIDTH, WIDTH)
BERT_LAYERS = (
    "encoder.layer.{}.",
    {f"attention.{part}": SQUARE for part in ("self.query", "self.key", "self.value", "output.dense")}
    | {"intermediate.dense": (INNER, WIDTH), "output.dense": (WIDTH, INNER)},
    ("attention.output.LayerNorm", "output.LayerNorm"),
)
DISTILBERT_LAYERS = (
    "transformer.layer.{}.",
    {f"attention.{part}_lin": SQUARE for part in ("q", "k", "v", "out")}
    | {"ffn.lin1": (INNER, WIDTH), "ffn.lin2": (WIDTH, INNER)},
    ("sa_layer_norm", "output_layer_norm"),
)
HEADS = {
    ("bert", "classification"): {"bert.pooler.dense": SQUARE, "classifier": (LABELS, WIDTH)},
    ("roberta", "classification"): {"classifier.dense": SQUARE, "classifier.out_proj": (LABELS, WIDTH)},
    ("distilbert", "classification"): {"pre_classifier": SQUARE, "classifier": (LABELS, WIDTH)},
}


def kind(family):
    """The family that names the parts."""
    return PREFIXES.get(family, "roberta")


def tensors(family, task="embedding"):
    """Random weights under the names of a checkpoint that was saved with a head."""
    scope, linears, norms = DISTILBERT_LAYERS if family == "distilbert" else BERT_LAYERS
    shapes = {"embeddings.word_embeddings.weight": (WORDS, WIDTH)}
    shapes["embeddings.position_embeddings.weight"] = (PLACES, WIDTH)
    if family != "distilbert":
        rows = CONFIGS[family]["type_vocab_size"]
        shapes["embeddings.token_type_embeddings.weight"] = (rows, WIDTH)
    shapes |= {f"embeddings.LayerNorm.{part}": (WIDTH,) for part in ("weight", "bias")}
    for layer in range(2):
        for name, shape in linears.items():
            shapes |= pair(scope.format(layer) + name, shape)
        for name in norms:
            shapes |= pair(scope.format(layer) + name, (WIDTH,))
    prefix = "" if task == "embedding" else f"{kind(family)}."
    shapes = {f"{prefix}{name}": shape for name, shape in shapes.items()}
    heads = HEADS | {(kind(family), "token-classification"): {"classifier": (LABELS, WIDTH)}}
    for name, shape in heads.get((kind(family), task), {}).items():
        shapes |= pair(name, shape)
    if task == "multi-vector":
        shapes["linear.weight"] = (8, WIDTH)
    rng = np.random.default_rng(0)
    return {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def pair(name, shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def settings(family, task="embedding", **changes):
    """The config.json of a checkpoint that was saved with a head."""
    name = "HF_ColBERT" if task == "multi-vector" else ARCHITECTURES[family] + SUFFIXES[task]
    return {"model_type": family, "architectures": [name]} | CONFIGS[family] | changes


def write(path, family, task="embedding", weights=None, **changes):
    """Save one; returns its folder."""
    config = settings(family, task, **changes)
    if "classification" in task and "id2label" not in changes:
        config["id2label"] = {str(number): f"L{number}" for number in range(LABELS)}
    return folders.save(path, config, tensors(family, task) if weights is None else weights, {"format": "pt"})


def listed(path, *modules, pooling="mean", dense=()):
    """Add modules.json and what it lists; ``dense`` are activation, weight, bias or ``None`` of each Dense module."""
    dense, entries = iter(dense), []
    for number, name in enumerate(modules):
        place = "" if name == "Transformer" else f"{number}_{name}"
        entries.append({"idx": number, "name": str(number), "path": place, "type": f"some.models.{name}"})
        if place:
            (path / place).mkdir()
        if name == "Pooling":
            (path / place / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
        if name == "Dense":
            write_dense(path / place, *next(dense))
    (path / "modules.json").write_text(json.dumps(entries))
    return path


def write_dense(place, function, weight, bias=None):
    sizes = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": bias is not None}
    (place / "config.json").write_text(json.dumps(sizes | {"activation_function": function}))
    stored = {"linear.weight": weight} | ({} if bias is None else {"linear.bias": bias})
    save_file(stored, place / "model.safetensors")


def feeds(family, ids, lengths=None):
    """Inputs for rows of words, padded behind their lengths."""
    ids = np.array(ids, np.int64)
    mask = np.ones_like(ids)
    for row, length in enumerate(lengths or ()):
        mask[row, length:] = 0
        ids[row, length:] = CONFIGS[family].get("pad_token_id", 0)
    found = {"input_ids": ids, "attention_mask": mask}
    if kind(family) == "bert":
        found["token_type_ids"] = np.arange(ids.size).reshape(ids.shape) % 3 // 2
    return found


def graph(path, **form):
    """The graph of a folder."""
    return folders.graph_of(path, Form(**form))


def truth(path, sample, **form):
    """What the reference answers."""
    return folders.truth_of(path, sample, Form(**form))
