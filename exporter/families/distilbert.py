"""DistilBERT encoders (Sanh et al. 2019) from config.json and safetensors, without torch.

Inputs ``input_ids``, ``attention_mask``: int64 [batch, sequence], padded at the end; there are no token types. Outputs
follow the head, see ``heads``.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir
from pydantic import Field

from qexport.exporter.families.builder import GraphBuilder
from qexport.exporter.families.encoder import ANCHOR, OPSET, EncoderConfig, Names, embed, encode, inputs
from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import SCORING, Form
from qexport.exporter.families.heads import Classifier, Trunk, finish, open_head
from qexport.passes.portable import IDS, MASK

CLASSIFIER = Classifier("pre_classifier", "Relu", "classifier")
NAMES = Names(
    layers="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attended="attention.out_lin",
    attended_norm="sa_layer_norm",
    inner="ffn.lin1",
    outer="ffn.lin2",
    outer_norm="output_layer_norm",
)
EPSILON = 1e-12  # of every norm, whatever config.json says


class DistilBertConfig(EncoderConfig):
    """The sizes by their names in this family."""

    model_type: Literal["distilbert"]
    hidden_size: int = Field(gt=0, alias="dim")
    num_hidden_layers: int = Field(gt=0, alias="n_layers")
    num_attention_heads: int = Field(gt=0, alias="n_heads")
    intermediate_size: int = Field(gt=0, alias="hidden_dim")
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"] = Field(default="gelu", alias="activation")


def build(config: dict[str, object], folder: Folder, form: Form = SCORING) -> ir.Model:
    """Build the graph; peak memory is the weights once, in the type of the form."""
    shape = DistilBertConfig.model_validate({**config, "layer_norm_eps": EPSILON})
    g = GraphBuilder("distilbert", OPSET, folder.weights(ANCHOR), form)
    head = open_head(Trunk(config, folder, g.weights, shape.hidden_size, CLASSIFIER), form.task)
    ids, mask = inputs(g, IDS, MASK)
    hidden = encode(g, shape, NAMES, embed(g, shape, ids), mask)
    return finish(g, head, (hidden, mask), shape.max_position_embeddings)
