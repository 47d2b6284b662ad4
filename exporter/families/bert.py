"""BERT encoders (Devlin et al. 2018) from config.json and safetensors, without torch.

Inputs ``input_ids``, ``attention_mask``, ``token_type_ids``: int64 [batch, sequence], padded at the end. Outputs
follow the head, see ``heads``.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir
from pydantic import Field

from qexport.exporter.families.builder import GraphBuilder
from qexport.exporter.families.encoder import ANCHOR, KINDS, OPSET, EncoderConfig, Names, embed, encode, inputs
from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import SCORING, Form
from qexport.exporter.families.heads import Classifier, Trunk, finish, open_head
from qexport.passes.portable import IDS, MASK, TYPES

CLASSIFIER = Classifier("pooler.dense", "Tanh", "classifier")


class BertConfig(EncoderConfig):
    """Token types come with the words."""

    model_type: Literal["bert"]
    type_vocab_size: int = Field(default=2, gt=0)


def build(config: dict[str, object], folder: Folder, form: Form = SCORING) -> ir.Model:
    """Build the graph; peak memory is the weights once, in the type of the form."""
    shape = BertConfig.model_validate(config)
    g = GraphBuilder("bert", OPSET, folder.weights(ANCHOR), form)
    head = open_head(Trunk(config, folder, g.weights, shape.hidden_size, CLASSIFIER), form.task)
    ids, mask, types = inputs(g, IDS, MASK, TYPES)

    def kinds() -> ir.Value:
        table = g.parameter(f"{KINDS}.weight", (shape.type_vocab_size, shape.hidden_size))
        return g.op(KINDS, "Gather", table, types)

    hidden = encode(g, shape, Names(), embed(g, shape, ids, kinds), mask)
    return finish(g, head, (hidden, mask), shape.max_position_embeddings)
