"""RoBERTa encoders (Liu et al. 2019) from config.json and safetensors, without torch; XLM-RoBERTa and CamemBERT too.

Inputs ``input_ids``, ``attention_mask``: int64 [batch, sequence], padded at the end. The first position has the row
behind that of ``pad_token_id``; there is one token type, which the graph adds itself. Outputs follow the head, see
``heads``.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir
from pydantic import Field, model_validator

from qexport.exporter.families.builder import GraphBuilder
from qexport.exporter.families.encoder import ANCHOR, KINDS, OPSET, EncoderConfig, Names, embed, encode, inputs
from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import SCORING, Form
from qexport.exporter.families.heads import Classifier, Trunk, finish, open_head
from qexport.exporter.families.weights import Array
from qexport.passes.portable import IDS, MASK

CLASSIFIER = Classifier("classifier.dense", "Tanh", "classifier.out_proj")


class RobertaConfig(EncoderConfig):
    """Positions are counted from ``pad_token_id`` on."""

    model_type: Literal["roberta", "xlm-roberta", "camembert"]
    type_vocab_size: int = Field(default=2, gt=0)
    pad_token_id: int = Field(default=1, ge=0)

    @model_validator(mode="after")
    def _positions_are_left(self) -> RobertaConfig:
        if self.positions < 1:
            raise ValueError(f"no positions are left behind pad_token_id {self.pad_token_id}")
        return self

    @property
    def positions(self) -> int:
        """The longest sequence."""
        return self.max_position_embeddings - self.pad_token_id - 1


def build(config: dict[str, object], folder: Folder, form: Form = SCORING) -> ir.Model:
    """Build the graph; peak memory is the weights once, in the type of the form."""
    shape = RobertaConfig.model_validate(config)
    g = GraphBuilder("roberta", OPSET, folder.weights(ANCHOR), form)
    head = open_head(Trunk(config, folder, g.weights, shape.hidden_size, CLASSIFIER), form.task)
    ids, mask = inputs(g, IDS, MASK)

    def kinds() -> ir.Value:
        return g.parameter(f"{KINDS}.weight", (shape.type_vocab_size, shape.hidden_size), _first_row)

    hidden = encode(g, shape, Names(), embed(g, shape, ids, kinds, shape.pad_token_id + 1), mask)
    return finish(g, head, (hidden, mask), shape.positions)


def _first_row(table: Array) -> Array:
    row: Array = table[0]
    return row
