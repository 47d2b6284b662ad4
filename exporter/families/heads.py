"""What stands on top of an encoder, and which of it a checkpoint has.

Outputs, all float32:

- ``embedding``: ``last_hidden_state`` [batch, sequence, hidden] and ``sentence_embedding`` [batch, width]: the mean
  over unmasked positions, or the first position where the folder's pooling says ``cls`` (Reimers & Gurevych 2019),
  through the folder's Dense modules if it has any, always scaled to length one, whether or not the folder lists a
  Normalize module.
- ``classification``: ``logits`` [batch, labels] of the first position.
- ``token-classification``: ``logits`` [batch, sequence, labels].
- ``multi-vector``: ``token_embeddings`` [batch, sequence, width], one of length one for every token (Khattab & Zaharia
  2020), zeros where the mask is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import onnx_ir as ir

from qexport.errors import ModelInvalid, UsageError
from qexport.exporter.families.builder import GraphBuilder
from qexport.exporter.families.folder import CONFIG, WEIGHTS, Folder, architecture
from qexport.exporter.families.labels import label_notes
from qexport.exporter.families.pooling import MODULES, Dense, Modules, read_modules, read_pooling
from qexport.exporter.families.vectors import POOLINGS, apply, first_position, in_float32, normalize, where_seen
from qexport.exporter.families.weights import Weights, read_headers
from qexport.passes.portable import LOGITS

ARCHITECTURES = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token-classification",
    "ColBERT": "multi-vector",
}
"""How names of architectures end that have a head; any other is exported without it, as an embedding."""
TASKS = ("embedding", *ARCHITECTURES.values())
OTHERS = ("ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction")
"""How names end that have a head which is not built, and without which the model is not what somebody trained."""
PROJECTION = "linear"  # the one layer on top of ColBERT
TOKEN_CLASSIFIER = "classifier"

FLOAT = ir.DataType.FLOAT
Write: TypeAlias = Callable[[GraphBuilder, ir.Value, ir.Value], None]
"""Adds nodes and outputs behind hidden states [batch, sequence, hidden] and their mask [batch, sequence]."""


@dataclass(frozen=True, slots=True)
class Classifier:
    """How a family classifies the first position: a linear layer, an operator, another linear layer."""

    dense: str
    activation: str
    last: str


@dataclass(frozen=True, slots=True)
class Trunk:
    """What heads know of the encoder below them: its config.json, folder, weights, hidden size, and way to classify."""

    config: Mapping[str, Any]
    folder: Folder
    weights: Weights
    width: int
    classifier: Classifier


@dataclass(frozen=True, slots=True)
class Head:
    """How to write a head, and what the model's metadata tell of it."""

    write: Write
    notes: Mapping[str, str] = field(default_factory=dict)


def open_head(trunk: Trunk, task: str | None) -> Head:
    """The head for a task; the one that the folder was saved with if none is named.

    Raises:
        UsageError: There is no such task.
        ModelInvalid: The checkpoint has no weights for it, or was saved with a head that is not built.
    """
    if task is not None and task not in TASKS:
        raise UsageError(f"unknown task {task!r}", hint=f"known: {', '.join(TASKS)}")
    modules = read_modules(trunk.folder)
    if task is None and architecture(trunk.config).endswith(OTHERS):
        what = f"the head of {architecture(trunk.config)!r} is not built"
        hint = "--task embedding leaves it out; whole it can be exported as a torch module, file.py:callable"
        raise ModelInvalid(what, where=str(trunk.folder.path / CONFIG), hint=hint)
    task = task or _default(trunk, modules)
    wanting = _wanting(trunk, modules, task)
    if wanting is not None:
        there = ", ".join(other for other in TASKS if _wanting(trunk, modules, other) is None)
        what = f"the checkpoint has no head for {task!r}: {wanting}"
        raise ModelInvalid(what, where=trunk.weights.where, hint=f"tasks that it has weights for: {there}")
    return HEADS[task](trunk, modules)


def finish(g: GraphBuilder, head: Head, ends: tuple[ir.Value, ir.Value], positions: int) -> ir.Model:
    """Put the head on top of ``ends``, the hidden states and the mask, and return the model."""
    head.write(g, *ends)
    model = g.finish(positions)
    model.metadata_props.update(head.notes)
    return model


# ---------------------------------------------------------------- which


def _default(trunk: Trunk, modules: Modules) -> str:
    """What the name of the architecture says; where it has no weights for that, what the list of modules says."""
    saved = _saved(trunk)
    if saved is not None and (_wanting(trunk, modules, saved) is None or not trunk.folder.has(MODULES)):
        return saved
    return "embedding" if modules.pools else "multi-vector"


def _saved(trunk: Trunk) -> str | None:
    name = architecture(trunk.config)
    return next((task for end, task in ARCHITECTURES.items() if name.endswith(end)), None)


def _wanting(trunk: Trunk, modules: Modules, task: str) -> str | None:
    """What the checkpoint lacks for a task, in words."""
    layers = {
        "classification": (trunk.classifier.dense, trunk.classifier.last),
        "token-classification": (TOKEN_CLASSIFIER,),
    }.get(task, ())
    names = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    if task == "multi-vector" and modules.pools:
        names = [f"{PROJECTION}.weight"]
    missing = next((name for name in names if name not in trunk.weights), None)
    if missing is not None:
        return f"weight {missing!r} is missing"
    saved = _saved(trunk)
    if layers and saved != task and saved in ("classification", "token-classification"):
        return f"{architecture(trunk.config)} has one for {saved!r}"
    return None


# ---------------------------------------------------------------- labels


def _classification(trunk: Trunk, _modules: Modules) -> Head:
    names, width = trunk.classifier, trunk.width
    count = _count(trunk, names.last)

    def write(g: GraphBuilder, hidden: ir.Value, _mask: ir.Value) -> None:
        first = g.op(names.dense, "Gather", hidden, first_position(g), axis=1)
        inner = g.op(names.dense, names.activation, g.linear(names.dense, first, (width, width)))
        g.output(g.linear(names.last, inner, (count, width)), LOGITS, FLOAT, ("batch", count))

    return Head(write, _labels(trunk, count))


def _token_classification(trunk: Trunk, _modules: Modules) -> Head:
    count = _count(trunk, TOKEN_CLASSIFIER)

    def write(g: GraphBuilder, hidden: ir.Value, _mask: ir.Value) -> None:
        logits = g.linear(TOKEN_CLASSIFIER, hidden, (count, trunk.width))
        g.output(logits, LOGITS, FLOAT, ("batch", "sequence", count))

    return Head(write, _labels(trunk, count))


def _count(trunk: Trunk, layer: str) -> int:
    """How many labels the last layer tells apart."""
    return next(iter(trunk.weights.shape(f"{layer}.weight")), 0)


def _labels(trunk: Trunk, count: int) -> dict[str, str]:
    return label_notes(trunk.config, str(trunk.folder.path / CONFIG), count)


# ---------------------------------------------------------------- vectors


def _embedding(trunk: Trunk, modules: Modules) -> Head:
    dense = modules.dense if modules.pools else ()
    pool = POOLINGS[read_pooling(trunk.folder, modules, ("mean", "cls") if dense else POOLINGS)]
    _add_weights(trunk, dense)

    def write(g: GraphBuilder, hidden: ir.Value, mask: ir.Value) -> None:
        hidden = in_float32(g, hidden)
        sentence = pool(g, hidden, mask)
        for module in dense:
            sentence = apply(g, module, sentence)
        sentence = normalize(g, sentence)
        width = dense[-1].outputs if dense else trunk.width
        g.output(hidden, "last_hidden_state", FLOAT, ("batch", "sequence", trunk.width))
        g.output(sentence, "sentence_embedding", FLOAT, ("batch", width))

    return Head(write)


def _multi_vector(trunk: Trunk, modules: Modules) -> Head:
    dense = () if modules.pools else modules.dense
    width = dense[-1].outputs if dense else _count(trunk, PROJECTION)
    _add_weights(trunk, dense)

    def write(g: GraphBuilder, hidden: ir.Value, mask: ir.Value) -> None:
        if not dense:
            hidden = g.linear(PROJECTION, hidden, (width, trunk.width), bias=False)
        for module in dense:
            hidden = apply(g, module, hidden)
        vectors = where_seen(g, normalize(g, in_float32(g, hidden)), mask)
        g.output(vectors, "token_embeddings", FLOAT, ("batch", "sequence", width))

    return Head(write)


def _add_weights(trunk: Trunk, dense: tuple[Dense, ...]) -> None:
    """Let the encoder's weights have those of the Dense modules, which are saved apart.

    Raises:
        ModelInvalid: A module does not read what the one before it makes.
    """
    width = trunk.width
    for module in dense:
        file = trunk.folder.file(f"{module.place}/{WEIGHTS}")
        if module.inputs != width:
            what = f"the module reads {module.inputs} features, {width} come to it"
            raise ModelInvalid(what, where=str(file.parent / CONFIG))
        trunk.weights.add(module.place, read_headers([file]))
        width = module.outputs


HEADS: dict[str, Callable[[Trunk, Modules], Head]] = {
    "embedding": _embedding,
    "classification": _classification,
    "token-classification": _token_classification,
    "multi-vector": _multi_vector,
}
