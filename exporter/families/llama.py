"""Llama decoders (Touvron et al. 2023) from config.json and safetensors, without torch; see ``decoder``."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from qexport.exporter.families.decoder import DecoderConfig, build_decoder
from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import SCORING, Form

ARCHITECTURES = ("LlamaForCausalLM", "LlamaModel")


class LlamaConfig(DecoderConfig):
    """Biases everywhere or nowhere, by ``attention_bias`` and ``mlp_bias``."""

    model_type: Literal["llama"]
    hidden_act: Literal["silu", "swish"] = "silu"


def build(config: dict[str, object], folder: Folder, form: Form = SCORING) -> ir.Model:
    """Build the graph."""
    return build_decoder(LlamaConfig.model_validate(config), folder, form)
