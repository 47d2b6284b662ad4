"""Qwen3 decoders (Yang et al. 2025) from config.json and safetensors, without torch; see ``decoder``."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import onnx_ir as ir

from qexport.exporter.families.decoder import build_decoder
from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import SCORING, Form
from qexport.exporter.families.qwen2 import WindowsByLayer

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3Model")


class Qwen3Config(WindowsByLayer):
    """Queries and keys are normalized head by head; the size of a head is a field of its own."""

    query_key_norms: ClassVar[bool] = True
    absent: ClassVar[dict[str, Any]] = {"sliding_window": 4096, "num_key_value_heads": 32, "head_dim": 128}

    model_type: Literal["qwen3"]
    hidden_act: Literal["silu", "swish"] = "silu"
    mlp_bias: Literal[False] = False


def build(config: dict[str, object], folder: Folder, form: Form = SCORING) -> ir.Model:
    """Build the graph."""
    return build_decoder(Qwen3Config.model_validate(config), folder, form)
