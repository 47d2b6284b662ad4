"""What a convolution multiplies with its kernel: the input's patches as rows (im2col)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

CHUNK_BYTES = 16 << 20  # patches that are held at once

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Patch:
    """How a convolution walks over its input; one entry of each for a spatial axis.

    Attributes:
        kernel: Sides of the kernel.
        strides: Steps between patches.
        dilations: Steps inside a patch.
        pads: Zeros before and behind, as ONNX orders them: all the former first.
        auto: ``NOTSET``, ``VALID``, ``SAME_UPPER`` or ``SAME_LOWER``.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto: str = "NOTSET"

    def rows(self, image: Floats) -> Iterator[Floats]:
        """Yield the patches of ``[N, C, ...]`` as ``[n, C * prod(kernel)]``, in chunks of at most 16 MB or one line.

        A kernel ``[M, C, ...]`` reshaped to ``[M, -1]`` has its numbers in the same order.
        """
        axes = tuple(range(2, image.ndim))
        windows = np.lib.stride_tricks.sliding_window_view(self._padded(image), self._reach(), axes)
        places = tuple(slice(None, None, step) for step in self.strides)
        inside = tuple(slice(None, None, step) for step in self.dilations)
        windows = np.moveaxis(windows[(slice(None), slice(None), *places, *inside)], 1, len(axes) + 1)
        columns = image.shape[1] * int(np.prod(self.kernel))
        line = max(int(np.prod(windows.shape[2 : len(axes) + 1])) * columns * 4, 1)
        step = max(CHUNK_BYTES // line, 1)
        for picture in windows:
            for start in range(0, len(picture), step):
                yield np.ascontiguousarray(picture[start : start + step], np.float32).reshape(-1, columns)

    def sums(self, image: Floats) -> tuple[NDArray[np.float64], int]:
        """The sum of all those rows and how many they are, one spatial axis after the other and without any row."""
        total, count = self._padded(image).sum(axis=0, dtype=np.float64), len(image)  # [C, ...]
        for axis, (side, reach) in enumerate(zip(self.kernel, self._reach(), strict=True), start=1):
            stride, dilation = self.strides[axis - 1], self.dilations[axis - 1]
            places = (total.shape[axis] - reach) // stride + 1
            starts = range(0, side * dilation, dilation)
            lines = (np.arange(start, start + (places - 1) * stride + 1, stride) for start in starts)
            total = np.stack([total.take(line, axis).sum(axis=axis) for line in lines], axis=axis)
            count *= places
        return total.reshape(-1), count

    def _reach(self) -> tuple[int, ...]:
        return tuple((side - 1) * step + 1 for side, step in zip(self.kernel, self.dilations, strict=True))

    def _padded(self, image: Floats) -> Floats:
        return np.pad(image, [(0, 0), (0, 0), *self._padding(image.shape[2:], self._reach())])

    def _padding(self, sides: Sequence[int], reach: Sequence[int]) -> list[tuple[int, int]]:
        if self.auto == "VALID":
            return [(0, 0)] * len(sides)
        if self.auto == "NOTSET":
            half = len(self.kernel)
            return list(zip(self.pads[:half], self.pads[half:], strict=True))
        missing = (
            max((-(-side // step) - 1) * step + size - side, 0)
            for side, step, size in zip(sides, self.strides, reach, strict=True)
        )
        upper = self.auto == "SAME_UPPER"
        return [(n // 2, n - n // 2) if upper else (n - n // 2, n // 2) for n in missing]


def patch_of(node: ir.Node, kernel: Sequence[int]) -> Patch:
    """The walk of a Conv whose weight has the shape ``kernel``."""
    sides = tuple(int(side) for side in kernel[2:])

    def numbers(name: str, otherwise: Sequence[int]) -> tuple[int, ...]:
        return tuple(node.attributes.get_ints(name, ()) or otherwise)

    ones = (1,) * len(sides)
    pads = numbers("pads", (0, 0) * len(sides))
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    return Patch(sides, numbers("strides", ones), numbers("dilations", ones), pads, auto)
