"""BitNet decoders (Ma et al. 2024) of float weights, from config.json and safetensors, without torch; see ``decoder``.

The layers alone: weights of three values are a way to store them, which ``quantization_config`` would announce.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import onnx_ir as ir

from qexport.exporter.families.decoder import DecoderConfig, build_decoder
from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import SCORING, Form

ARCHITECTURES = ("BitNetForCausalLM", "BitNetModel")


class BitNetConfig(DecoderConfig):
    """A norm before the last product of attention and of the MLP; the gate is a squared ReLU where not said."""

    sub_norms: ClassVar[bool] = True
    absent: ClassVar[dict[str, Any]] = {"hidden_act": "relu2", "rope_theta": 500000.0, "num_key_value_heads": 5}

    model_type: Literal["bitnet"]
    hidden_act: Literal["relu2", "silu", "swish"]
    mlp_bias: Literal[False] = False


def build(config: dict[str, object], folder: Folder, form: Form = SCORING) -> ir.Model:
    """Build the graph."""
    return build_decoder(BitNetConfig.model_validate(config), folder, form)
