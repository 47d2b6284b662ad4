"""Mistral decoders (Jiang et al. 2023) from config.json and safetensors, without torch; see ``decoder``."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import onnx_ir as ir
from pydantic import Field, model_validator

from qexport.exporter.families.decoder import DecoderConfig, build_decoder
from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import SCORING, Form

ARCHITECTURES = ("MistralForCausalLM", "MistralModel")


class MistralConfig(DecoderConfig):
    """No biases; every layer sees ``sliding_window`` positions, or all where that is null."""

    absent: ClassVar[dict[str, Any]] = {"sliding_window": 4096, "num_key_value_heads": 8}

    model_type: Literal["mistral"]
    hidden_act: Literal["silu", "swish"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    sliding_window: int | None = Field(default=None, gt=0)
    layer_types: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _layers_are_alike(self) -> MistralConfig:
        kind = "full_attention" if self.sliding_window is None else "sliding_attention"
        if self.layer_types is not None and set(self.layer_types) != {kind}:
            raise ValueError(f"layer_types differ from what sliding_window says of every layer: {kind}")
        return self

    def window(self, layer: int) -> int | None:
        """The same for all layers."""
        del layer
        return self.sliding_window


def build(config: dict[str, object], folder: Folder, form: Form = SCORING) -> ir.Model:
    """Build the graph."""
    return build_decoder(MistralConfig.model_validate(config), folder, form)
