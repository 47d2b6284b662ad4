"""Vision transformers (Dosovitskiy et al. 2021) from config.json and safetensors, without torch.

Input ``pixel_values`` float32 [batch, channels, height, width] of the one size that the model was made for. Outputs,
all float32: of ``ViTForImageClassification`` ``logits`` [batch, labels]; of the layers alone ``last_hidden_state``
[batch, patches + 1, hidden], the class token first, and ``pooler_output`` [batch, width], or, where the checkpoint has
no pooler, ``cls_embedding`` [batch, hidden], the class token.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import onnx_ir as ir
from pydantic import Field, field_validator, model_validator

from qexport.errors import ModelInvalid, UsageError
from qexport.exporter.families.attending import split_heads
from qexport.exporter.families.builder import GraphBuilder
from qexport.exporter.families.encoder import OPSET, activate
from qexport.exporter.families.folder import CONFIG, Folder, architecture
from qexport.exporter.families.form import SCORING, Form
from qexport.exporter.families.labels import label_notes
from qexport.exporter.families.settings import Settings
from qexport.exporter.families.vectors import first_position
from qexport.exporter.families.weights import Weights
from qexport.passes.portable import LOGITS

ARCHITECTURES = ("ViTForImageClassification", "ViTModel")
ANCHOR = "embeddings.patch_embeddings.projection.weight"
CLASSIFIER, POOLER = "classifier", "pooler.dense"
TASKS = ("embedding", "classification")
FLOAT = ir.DataType.FLOAT


class VitConfig(Settings):
    """The fields of config.json that shape the graph; others are ignored, unsupported values refused."""

    model_type: Literal["vit"]
    hidden_size: int = Field(default=768, gt=0)
    num_hidden_layers: int = Field(default=12, gt=0)
    num_attention_heads: int = Field(default=12, gt=0)
    intermediate_size: int = Field(default=3072, gt=0)
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"] = "gelu"
    layer_norm_eps: float = Field(default=1e-12, gt=0)
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    num_channels: int = Field(default=3, gt=0)
    qkv_bias: bool = True
    pooler_act: Literal["tanh"] = "tanh"

    @field_validator("image_size", "patch_size", mode="before")
    @classmethod
    def _square(cls, size: Any) -> Any:
        return (size, size) if isinstance(size, int) else size

    @model_validator(mode="after")
    def _sizes_divide(self) -> VitConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} heads do not divide hidden_size {self.hidden_size}")
        if any(patch < 1 or patch > image for image, patch in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(f"patches of {self.patch_size} do not fit into images of {self.image_size}")
        return self

    @property
    def patches(self) -> int:
        """How many fit into an image; what is left over at its right and lower edges is not looked at."""
        return math.prod(image // patch for image, patch in zip(self.image_size, self.patch_size, strict=True))


def build(config: dict[str, object], folder: Folder, form: Form = SCORING) -> ir.Model:
    """Build the graph.

    Raises:
        UsageError: There is no such task.
        ModelInvalid: The checkpoint has no weights for it.
    """
    shape = VitConfig.model_validate(config)
    weights = folder.weights(ANCHOR)
    task = _task(config, weights, form)
    g = GraphBuilder("vit", OPSET, weights, form)
    hidden = _embed(g, shape)
    for layer in range(shape.num_hidden_layers):
        hidden = _layer(g, shape, f"encoder.layer.{layer}", hidden)
    hidden = g.layer_norm("layernorm", hidden, shape.hidden_size, shape.layer_norm_eps)
    notes: dict[str, str] = {}
    if task == "classification":
        labels = next(iter(weights.shape(f"{CLASSIFIER}.weight")), 0)
        notes = label_notes(config, str(folder.path / CONFIG), labels)
        logits = g.linear(CLASSIFIER, _first(g, CLASSIFIER, hidden), (labels, shape.hidden_size))
        g.output(logits, LOGITS, FLOAT, ("batch", labels))
    else:
        _features(g, shape, hidden)
    model = g.finish()
    model.metadata_props.update(notes)
    return model


def _task(config: dict[str, Any], weights: Weights, form: Form) -> str:
    """What was asked for; what the folder was saved with if nothing was."""
    if form.task is not None and form.task not in TASKS:
        raise UsageError(f"unknown task {form.task!r}", hint=f"known: {', '.join(TASKS)}")
    saved = "classification" if architecture(config) == "ViTForImageClassification" else "embedding"
    task = form.task or saved
    if task == "classification" and f"{CLASSIFIER}.weight" not in weights:
        what = f"the checkpoint has no head for {task!r}: weight '{CLASSIFIER}.weight' is missing"
        raise ModelInvalid(what, where=weights.where, hint="tasks that it has weights for: embedding")
    return task


def _embed(g: GraphBuilder, shape: VitConfig) -> ir.Value:
    """Patches, each a linear map of its pixels, behind the class token; positions are added."""
    scope, width, (high, wide) = "embeddings", shape.hidden_size, shape.patch_size
    pixels = g.input("pixel_values", FLOAT, ("batch", shape.num_channels, *shape.image_size))
    batch = g.op(scope, "Shape", pixels, start=0, end=1)
    if g.dtype != FLOAT:
        pixels = g.op(scope, "Cast", pixels, to=g.dtype)
    kernel = g.parameter(ANCHOR, (width, shape.num_channels, high, wide))
    bias = g.parameter(ANCHOR.replace("weight", "bias"), (width,))
    patches = g.op(f"{scope}.patch_embeddings.projection", "Conv", pixels, kernel, bias, strides=[high, wide])
    patches = g.op(scope, "Reshape", patches, g.constant("flat_patches", [0, width, shape.patches]))
    patches = g.op(scope, "Transpose", patches, perm=[0, 2, 1])
    rows = g.op(scope, "Concat", batch, g.constant("one_token", [1, width]), axis=0)
    first = g.op(scope, "Expand", g.parameter(f"{scope}.cls_token", (1, 1, width)), rows)
    places = g.parameter(f"{scope}.position_embeddings", (1, shape.patches + 1, width))
    return g.op(scope, "Add", g.op(scope, "Concat", first, patches, axis=1), places)


def _layer(g: GraphBuilder, shape: VitConfig, scope: str, hidden: ir.Value) -> ir.Value:
    """[batch, tokens, hidden] to the same, with a norm before each of both blocks."""
    width, inner, epsilon = shape.hidden_size, shape.intermediate_size, shape.layer_norm_eps
    before = g.layer_norm(f"{scope}.layernorm_before", hidden, width, epsilon)
    hidden = g.op(scope, "Add", _attention(g, shape, f"{scope}.attention", before), hidden)
    after = g.layer_norm(f"{scope}.layernorm_after", hidden, width, epsilon)
    middle = g.linear(f"{scope}.intermediate.dense", after, (inner, width))
    middle = activate(g, f"{scope}.intermediate", middle, shape.hidden_act)
    return g.op(scope, "Add", g.linear(f"{scope}.output.dense", middle, (width, inner)), hidden)


def _attention(g: GraphBuilder, shape: VitConfig, scope: str, x: ir.Value) -> ir.Value:
    """Every token sees every token."""
    width, heads, within = shape.hidden_size, shape.num_attention_heads, f"{scope}.attention"
    query, key, value = (
        split_heads(g, scope, g.linear(scope, x, (width, width), bias=shape.qkv_bias), heads, width // heads)
        for scope in (f"{within}.{part}" for part in ("query", "key", "value"))
    )
    scores = g.op(f"{within}.scores", "MatMul", query, g.op(within, "Transpose", key, perm=[0, 1, 3, 2]))
    scores = g.op(within, "Mul", scores, g.constant("attention_scale", 1.0 / math.sqrt(width // heads)))
    context = g.op(f"{within}.context", "MatMul", g.op(within, "Softmax", scores, axis=-1), value)
    context = g.op(within, "Transpose", context, perm=[0, 2, 1, 3])
    merged = g.op(within, "Reshape", context, g.constant("merge_heads", [0, 0, width]))
    return g.linear(f"{scope}.output.dense", merged, (width, width))


def _first(g: GraphBuilder, scope: str, hidden: ir.Value) -> ir.Value:
    """The class token, [batch, hidden]."""
    return g.op(scope, "Gather", hidden, first_position(g), axis=1)


def _features(g: GraphBuilder, shape: VitConfig, hidden: ir.Value) -> None:
    width = shape.hidden_size
    if f"{POOLER}.weight" in g.weights:
        out = next(iter(g.weights.shape(f"{POOLER}.weight")), 0)
        pooled = g.op(POOLER, "Tanh", g.linear(POOLER, _first(g, POOLER, hidden), (out, width)))
        ends = (pooled, "pooler_output", FLOAT, ("batch", out))
    else:
        ends = (_first(g, "pooler", hidden), "cls_embedding", FLOAT, ("batch", width))
    g.output(hidden, "last_hidden_state", FLOAT, ("batch", shape.patches + 1, width))
    g.output(*ends)
