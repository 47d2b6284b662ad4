"""MiniLM and ResNet-20 as torch has them, made of the numbers that everyone can get, and what their layers read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import images
import onnx
import sentences
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional


class Encoder:
    """all-MiniLM-L6-v2 from its folder.

    Attributes:
        model: The encoder.
        few: The first calibration sentences, each a batch of one.
    """

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self.model = transformers.BertModel.from_pretrained(
            asked["minilm"], attn_implementation="eager", add_pooling_layer=False
        ).eval()
        seen = asked["tokens"]["calibration"]
        self.few = [tensors(sentences.pad([tokens])) for tokens in seen[: asked["few"]]]
        alike = [[tokens for tokens in seen if len(tokens) == size] for size in sorted(set(map(len, seen)))]
        self._seen = [tensors(sentences.pad(tokens)) for tokens in alike]  # nothing is padded
        self._test = tensors(sentences.pad(asked["tokens"]["test"]))

    @property
    def layers(self) -> nn.ModuleList:
        """The layers."""
        found: nn.ModuleList = self.model.encoder.layer
        return found

    def linears(self) -> dict[str, nn.Linear]:
        """Linear layers by the name of the node that stands for them."""
        return {f"{name}/MatMul": part for name, part in self.model.named_modules() if isinstance(part, nn.Linear)}

    def run(self) -> None:
        """Run all calibration samples."""
        for feeds in self._seen:
            self.model(**feeds)

    def answers(self) -> Tensor:
        """Hidden states of the test sentences, masked positions left out."""
        hidden: Tensor = self.model(**self._test).last_hidden_state
        return hidden[self._test["attention_mask"] == 1]


class Classifier:
    """CIFAR-10 ResNet-20 from the numbers in the uncut file.

    Attributes:
        convolutions: By the name of the node.
        linear: Weight and bias of the last layer.
        added: Channels of zeros before and behind those that enter a wider stage.
    """

    def __init__(self, asked: Mapping[str, Any]) -> None:
        folder = Path(asked["resnet20"])
        self._seen, self._test = (
            torch.from_numpy(images.batches(folder / f"{name}.npz")[0]["input"][: asked[count]])
            for name, count in (("calibration", "seen"), ("test", "tested"))
        )
        graph = onnx.load(folder / "resnet20.onnx").graph
        held = {tensor.name: tensors({"": onnx.numpy_helper.to_array(tensor)})[""] for tensor in graph.initializer}
        self.convolutions: dict[str, nn.Conv2d] = {}
        for node in graph.node:
            if node.op_type == "Conv":
                strides = next(list(a.ints) for a in node.attribute if a.name == "strides")
                self.convolutions[node.name] = convolution(held[node.input[1]], held[node.input[2]], strides)
        self.linear = held["linear.weight"], held["linear.bias"]
        self.added = {2: (8, 8), 3: (16, 16)}

    def __call__(self, image: Tensor) -> Tensor:
        """Logits; a shortcut to a wider stage takes every other pixel and adds channels of zeros on both sides."""
        x = functional.relu(self.convolutions["/conv1/Conv"](image))
        for stage in (1, 2, 3):
            for block in (0, 1, 2):
                first, second = (self.convolutions[inside(stage, block, place)] for place in (1, 2))
                made = second(functional.relu(first(x)))
                wider = block == 0 and stage in self.added
                short = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *self.added[stage])) if wider else x
                x = functional.relu(made + short)
        return functional.linear(x.mean((2, 3)), *self.linear)

    def run(self) -> None:
        """Run all calibration samples."""
        self(self._seen)

    def answers(self) -> Tensor:
        """Logits of the test images."""
        return self(self._test)


def inside(stage: int, block: int, place: int) -> str:
    """Name of a convolution of a block."""
    return f"/layer{stage}/layer{stage}.{block}/conv{place}/Conv"


def convolution(weight: Tensor, bias: Tensor, strides: Sequence[int]) -> nn.Conv2d:
    """A convolution with zeros around, as wide as its kernel needs."""
    outputs, inputs, side, _ = weight.shape
    made = nn.Conv2d(inputs, outputs, side, tuple(strides), side // 2)
    made.weight, made.bias = nn.Parameter(weight), nn.Parameter(bias)
    return made


def tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Arrays as torch has them."""
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def read_by(layers: Iterable[nn.Module], run: Callable[[], None]) -> list[Tensor]:
    """What layers read while samples run, as rows ``[n, K]`` in double precision."""
    watched = list(layers)
    found: list[list[Tensor]] = [[] for _ in watched]

    def rows(layer: nn.Module, given: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            patches = functional.unfold(given, layer.kernel_size, padding=layer.padding, stride=layer.stride)
            return patches.transpose(1, 2).flatten(0, 1)
        return given.flatten(0, -2)

    hooks = [
        layer.register_forward_pre_hook(lambda layer, given, held=held: held.append(rows(layer, given[0])))
        for layer, held in zip(watched, found, strict=True)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts).double() for parts in found]
