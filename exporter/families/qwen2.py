"""Qwen2 decoders (Yang et al. 2024) from config.json and safetensors, without torch; see ``decoder``."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import onnx_ir as ir
from pydantic import Field, model_validator

from qexport.exporter.families.decoder import DecoderConfig, build_decoder
from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import SCORING, Form

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen2Model")
FULL, SLIDING = "full_attention", "sliding_attention"


class WindowsByLayer(DecoderConfig):
    """Layers that see the last ``sliding_window`` positions among others that see all.

    ``layer_types`` says which; where it is missing, those from ``max_window_layers`` on.
    """

    use_sliding_window: bool = False
    sliding_window: int | None = Field(default=None, gt=0)
    max_window_layers: int = Field(default=28, ge=0)
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None

    @model_validator(mode="after")
    def _every_layer_has_a_type(self) -> WindowsByLayer:
        if self.layer_types is None:
            return self
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"{len(self.layer_types)} layer_types for {self.num_hidden_layers} layers")
        if SLIDING in self.layer_types and not (self.use_sliding_window and self.sliding_window):
            raise ValueError("layer_types ask for a window that use_sliding_window and sliding_window do not give")
        return self

    def window(self, layer: int) -> int | None:
        """By ``layer_types``."""
        late = FULL if layer < self.max_window_layers else SLIDING
        kind = late if self.layer_types is None else self.layer_types[layer]
        return self.sliding_window if self.use_sliding_window and kind == SLIDING else None


class Qwen2Config(WindowsByLayer):
    """Queries, keys and values have a bias, nothing else has."""

    absent: ClassVar[dict[str, Any]] = {"sliding_window": 4096, "num_key_value_heads": 32}

    model_type: Literal["qwen2"]
    hidden_act: Literal["silu", "swish"] = "silu"
    mlp_bias: Literal[False] = False

    @property
    def query_bias(self) -> bool:
        """Always."""
        return True

    @property
    def output_bias(self) -> bool:
        """Never."""
        return False


def build(config: dict[str, object], folder: Folder, form: Form = SCORING) -> ir.Model:
    """Build the graph."""
    return build_decoder(Qwen2Config.model_validate(config), folder, form)
