"""Write the tiny models that torch's exporters make, one file per spelling that a fusion has to recognise.

Needs torch and transformers (2.13 and 5.23 were used), which the tests do not: ``python tests/models/make.py``.
Stack traces that the exporters leave as metadata are removed,
and names are shortened.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

HERE = Path(__file__).parent
SIZES = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


class RMSNorm(nn.Module):
    """Root-mean-square normalization as LLaMA's code in transformers writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize the last axis."""
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class Attention(nn.Module):
    """Two heads of size 4, by torch's own attention or written out."""

    def __init__(self, eager: bool) -> None:
        super().__init__()
        self.eager = eager
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attend from x to x."""
        batch, length, _ = x.shape
        q, k, v = (part(x).view(batch, length, 2, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.eager:
            scores = q @ k.transpose(-1, -2) / math.sqrt(4)
            y = torch.softmax(scores if mask is None else scores + mask, -1) @ v
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).reshape(batch, length, 8)


class Encoder(nn.Module):
    """A transformers model with tensors in, a tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the last hidden state."""
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def bert() -> nn.Module:
    """One layer of BERT with torch's attention."""
    return Encoder(BertModel(BertConfig(**SIZES, max_position_embeddings=16), add_pooling_layer=False))


def llama() -> nn.Module:
    """One layer of LLaMA with two query heads for one key head."""
    return Encoder(LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=1, max_position_embeddings=16, use_cache=False)))


def main() -> None:
    """Export everything."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    x, ids, ones = torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
    added, allowed = torch.zeros(2, 1, 1, 3), torch.ones(2, 1, 1, 3, dtype=torch.bool)
    cases = [
        ("gelu", nn.GELU(), (x,), (13, -18)),
        ("gelu_tanh", nn.GELU("tanh"), (x,), (13, -18)),
        ("layer_norm", nn.LayerNorm(8), (x,), (13,)),
        ("layer_norm_no_bias", nn.LayerNorm(8, bias=False), (x,), (13,)),
        ("layer_norm_plain", nn.LayerNorm(8, elementwise_affine=False), (x,), (13,)),
        ("rms_norm", RMSNorm(), (x,), (13, 18, -18)),
        ("rms_norm_half", RMSNorm().half(), (x.half(),), (13, -18)),
        ("rms_norm_torch", nn.RMSNorm(8, eps=1e-6), (x,), (-18,)),
        ("attention", Attention(False), (x,), (17, -18)),
        ("attention_mask", Attention(False), (x, added), (17, 18, -20)),
        ("attention_bool", Attention(False), (x, allowed), (17, -18)),
        ("attention_eager", Attention(True), (x,), (13, -18, -23)),
        ("attention_eager_mask", Attention(True), (x, added), (13, -18)),
        ("bert", bert(), (ids, ones), (18, -18)),
        ("llama", llama(), (ids, ones), (-18,)),
    ]
    for name, module, inputs, opsets in cases:
        for opset in opsets:
            export(name, module.eval(), inputs, opset)


def export(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], opset: int) -> None:
    """Export one file; a negative opset asks for the exporter that is built on torch.export (dynamo)."""
    path = HERE / f"{name}_{'dynamo' if opset < 0 else 'script'}{abs(opset)}.onnx"
    axes = [{0: "batch", tensor.ndim - 1 if tensor.ndim != 3 else 1: "length"} for tensor in inputs]
    names = ["x", "mask"][: len(inputs)]
    if opset < 0:
        dims = {"batch": torch.export.Dim("batch"), "length": torch.export.Dim("length")}
        shapes = tuple({axis: dims[symbol] for axis, symbol in each.items()} for each in axes)
        options: dict[str, object] = {"dynamo": True, "dynamic_shapes": shapes, "external_data": False}
    else:
        options = {"dynamo": False, "dynamic_axes": dict(zip(names, axes, strict=True))}
    torch.onnx.export(module, inputs, path, input_names=names, output_names=["y"], opset_version=abs(opset), **options)
    model = ir.load(path)
    ClearMetadataAndDocStringPass()(model)
    for number, node in enumerate(model.graph.all_nodes()):
        node.name = f"{node.op_type}_{number}"
        for value in node.outputs:
            value.name = value.name if value.is_graph_output() else f"t{number}"
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    ir.save(model, path)


if __name__ == "__main__":
    main()
