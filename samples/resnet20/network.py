"""ResNet-20 for CIFAR-10 as a torch module (He et al. 2015, section 4.2) with the weights of ``resnet20.onnx``.

``qexport export samples/resnet20/network.py:resnet20 --input "input:float32[batch,3,32,32]" -o build/resnet20``
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

WEIGHTS = Path(__file__).with_name("resnet20.onnx")
WIDTHS = (16, 32, 64)
BLOCKS = 3
CLASSES = 10


class Block(nn.Module):
    """Two convolutions and a shortcut; batch normalization is part of the convolutions.

    Into a wider stage the shortcut takes every other pixel and adds channels of zeros on both sides (option A).
    """

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.stride, self.more = (1, 0) if width == wide else (2, (wide - width) // 2)
        self.conv1 = nn.Conv2d(width, wide, 3, self.stride, 1)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width, height, width] to [batch, wide, ...], half as high and wide where it is wider."""
        made = self.conv2(functional.relu(self.conv1(x)))
        if self.more:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return functional.relu(made + x)


class ResNet20(nn.Module):
    """Images, normalized, float32 [batch, 3, 32, 32], to logits [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1)
        before = (WIDTHS[0], *WIDTHS)
        for stage, wide in enumerate(WIDTHS):
            blocks = [Block(wide if block else before[stage], wide) for block in range(BLOCKS)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(WIDTHS[-1], CLASSES)

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        """The logits."""
        x = self.layer3(self.layer2(self.layer1(functional.relu(self.conv1(input)))))
        return {"logits": self.linear(x.mean((2, 3)))}


def resnet20() -> nn.Module:
    """Return the trained network."""
    graph = onnx.load(WEIGHTS).graph
    held = {tensor.name: torch.from_numpy(np.array(onnx.numpy_helper.to_array(tensor))) for tensor in graph.initializer}
    state = {name: held[name] for name in ("linear.weight", "linear.bias")}
    for node in graph.node:
        if node.op_type == "Conv":  # "/layer1/layer1.0/conv1/Conv" is the module "layer1.0.conv1"
            place = ".".join(part for part in node.name.split("/")[1:-1] if part not in ("layer1", "layer2", "layer3"))
            state |= {f"{place}.weight": held[node.input[1]], f"{place}.bias": held[node.input[2]]}
    network = ResNet20()
    network.load_state_dict(state)
    return network
