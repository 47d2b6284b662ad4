"""Write the tiny decoders with caches that exporters make, one file per spelling of attention, mask and positions.

The tests read them and need neither torch nor optimum. Two environments make them:
``python tests/models/make_decoders.py optimum`` (optimum-onnx 0.1.0, transformers 4.57) and
``python tests/models/make_decoders.py torch`` (torch 2.13, transformers 5.23, onnxscript). onnx-ir is needed in both.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, MistralConfig, OPTConfig
from transformers.cache_utils import DynamicCache

HERE = Path(__file__).parent
SIZES = {"vocab_size": 16, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 48}
SHARED = {**SIZES, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 8}
CONFIGS = {
    "llama": LlamaConfig(**SHARED, num_hidden_layers=2),
    "mistral": MistralConfig(**SHARED, num_hidden_layers=1, sliding_window=6),
    "gpt2": GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2, n_positions=48, n_inner=8),
    "opt": OPTConfig(**SIZES, num_hidden_layers=1, ffn_dim=8, word_embed_proj_dim=16),
    "bloom": BloomConfig(vocab_size=16, hidden_size=16, n_layer=1, n_head=2),
}
BY_OPTIMUM = ("llama", "mistral", "gpt2", "opt", "bloom")
BY_TORCH = (("llama", 18, True), ("llama", 23, True), ("gpt2", 17, False))


class Step(nn.Module):
    """A decoder of transformers with its caches as flat inputs and outputs; positions are counted behind the past."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the logits and, per layer, the keys and values."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        found = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        return (found.logits, *(part for layer in found.past_key_values.layers for part in (layer.keys, layer.values)))


def main(exporter: str) -> None:
    """Export all that one environment makes."""
    warnings.simplefilter("ignore")
    for name, path in (by_optimum if exporter == "optimum" else by_torch)():
        model = ir.load(path)
        shorten(model)
        ir.save(model, HERE / f"{name}.onnx")


def decoder(name: str) -> nn.Module:
    """A decoder with weights that are large enough for attention to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for weight in model.parameters():
        weight.data.mul_(8 if weight.dim() > 1 else 1)
    return model


def by_optimum() -> Iterator[tuple[str, Path]]:
    """optimum's own exports, without anything done afterwards."""
    from optimum.exporters.onnx import main_export

    for name in BY_OPTIMUM:
        with tempfile.TemporaryDirectory() as folder:
            decoder(name).save_pretrained(folder)
            output = Path(folder, "onnx")
            main_export(folder, output, task="text-generation-with-past", no_post_process=True, do_validation=False)
            yield f"{name}_past_optimum", output / "model.onnx"


def by_torch() -> Iterator[tuple[str, Path]]:
    """torch's two exporters."""
    for name, opset, dynamo in BY_TORCH:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            export(decoder(name), path, opset, dynamo)
            yield f"{name}_past_{'dynamo' if dynamo else 'script'}{opset}", path


def export(model: nn.Module, path: Path, opset: int, dynamo: bool) -> None:
    """Export one step of a decoder."""
    config = model.config
    layers, heads = config.num_hidden_layers, getattr(config, "num_key_value_heads", config.num_attention_heads)
    dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    past = [torch.randn(2, heads, 5, dim) for _ in range(2 * layers)]
    inputs = (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 8, dtype=torch.long), *past)
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    names = ["input_ids", "attention_mask", *(f"past_key_values.{part}" for part in parts)]
    outputs = ["logits", *(f"present.{part}" for part in parts)]
    if dynamo:
        batch, sequence, length = (torch.export.Dim(name) for name in ("batch", "sequence", "past"))
        shapes = (
            {0: batch, 1: sequence},
            {0: batch, 1: torch.export.Dim.DYNAMIC},
            tuple({0: batch, 2: length} for _ in past),
        )
        options: dict[str, object] = {"dynamo": True, "dynamic_shapes": shapes, "external_data": False}
    else:
        axes = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "total"}}
        axes |= {name: {0: "batch", 2: "past"} for name in names[2:]} | {outputs[0]: {0: "batch", 1: "sequence"}}
        options = {"dynamo": False, "dynamic_axes": axes | {name: {0: "batch", 2: "total"} for name in outputs[1:]}}
    torch.onnx.export(
        Step(model), inputs, path, input_names=names, output_names=outputs, opset_version=opset, **options
    )


def shorten(model: ir.Model) -> None:
    """Remove stack traces and long names."""
    ClearMetadataAndDocStringPass()(model)
    for number, node in enumerate(model.graph.all_nodes()):
        node.name = f"{node.op_type}_{number}"
        for place, value in enumerate(node.outputs):
            value.name = value.name if value.is_graph_output() else f"t{number}" + "_" * place
            value.metadata_props.clear()
    for number, value in enumerate(model.graph.initializers.copy().values()):
        value.name = f"w{number}"
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


if __name__ == "__main__":
    main(sys.argv[1])
