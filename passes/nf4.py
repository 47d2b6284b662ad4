"""Store the weights of matrix products in NF4: the 16 levels that fit normally distributed weights best.

1. A weight is read by output channel, ``[N, K]``, and cut into blocks of 64; each is divided by its largest magnitude,
   and what is left is rounded to the nearest of 16 quantiles of the normal distribution.
2. Double quantization: the magnitudes of the blocks, less their mean, are stored as 8-bit integers with a scale for
   every 256 of them, and read back in the graph. That makes 4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight.
3. ``x, W -> MatMul`` becomes ``x, codes, magnitudes -> MatMulBnb4``; the bias of a Gemm becomes an Add.

Dettmers et al. 2023 (QLoRA), section 3; the levels are those of its appendix E, the layout that of bitsandbytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.base import Outcome, Pass
from qexport.passes.numbers.groups import Matrix, as_matrix
from qexport.passes.placement import Site
from qexport.passes.target import find_target
from qexport.passes.writing.lowbit import AXIS_OPSET, SCALED, Choice, Editor, decision, is_scaled

LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
NESTED = 256  # magnitudes that share a scale
KERNEL_BLOCKS = (16, 32, 64, 128, 256)
NF4_TYPE = 1  # as MatMulBnb4 numbers it

Flat = NDArray[np.float32]  # one number each block


@dataclass(frozen=True, slots=True, eq=False)
class Magnitudes:
    """The largest magnitudes of the blocks, in 8 bits.

    Attributes:
        values: ``[rows, 256]``, the last row filled up with zeros.
        scale: Of every row, ``[rows]``.
        mean: What to add.
        count: How many there are.
    """

    values: NDArray[np.int8]
    scale: Flat
    mean: np.float32
    count: int

    def dequantize(self) -> Flat:
        """The magnitudes that the integers stand for, ``[count]``."""
        return np.asarray((self.values * self.scale[:, None] + self.mean).reshape(-1)[: self.count], np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class NormalFloats:
    """A weight in NF4.

    Attributes:
        levels: Indices into ``LEVELS``, ``[N * K]`` by output channel.
        magnitudes: One for each block.
        shape: K and N.
        block: Weights that share a magnitude; blocks may go over the end of a channel, the last one may be shorter.
    """

    levels: NDArray[np.uint8]
    magnitudes: Magnitudes
    shape: tuple[int, int]
    block: int

    def dequantize(self) -> Matrix:
        """The weight that the levels stand for, ``[K, N]``."""
        spread = np.repeat(self.magnitudes.dequantize(), self.block)[: self.levels.size]
        return np.asarray((LEVELS[self.levels] * spread).reshape(self.shape[::-1]).T)

    def packed(self) -> NDArray[np.uint8]:
        """Two levels to a byte, the first one in the high half."""
        even = np.pad(self.levels, (0, self.levels.size % 2))
        return np.asarray(even[0::2] << 4 | even[1::2], np.uint8)

    @property
    def bits(self) -> float:
        """Bits of storage for each weight."""
        parts = (self.packed(), self.magnitudes.values, self.magnitudes.scale, self.magnitudes.mean)
        return 8 * sum(part.nbytes for part in parts) / self.levels.size


def quantize_nf4(weight: Matrix, block: int = 64) -> NormalFloats:
    """Round ``weight``, ``[K, N]``, to the nearest level of each block."""
    k, n = weight.shape
    flat = np.asarray(weight, np.float32).T.reshape(-1)
    magnitudes = quantize_magnitudes(np.maximum.reduceat(np.abs(flat), np.arange(0, flat.size, block)))
    spread = magnitudes.dequantize()  # levels are chosen for what the graph will read
    share = flat / np.repeat(np.where(spread == 0, 1, spread), block)[: flat.size]
    borders = (LEVELS[1:] + LEVELS[:-1]) / 2
    return NormalFloats(np.searchsorted(borders, share).astype(np.uint8), magnitudes, (k, n), block)


def quantize_magnitudes(magnitudes: Flat) -> Magnitudes:
    """Store magnitudes in 8 bits: less their mean, with a scale for every 256 of them."""
    mean = magnitudes.mean(dtype=np.float64).astype(np.float32)
    centred = np.pad(magnitudes - mean, (0, -magnitudes.size % NESTED)).reshape(-1, NESTED)
    scale = np.abs(centred).max(axis=1) / 127
    scale = np.where(scale == 0, np.float32(1), scale).astype(np.float32)
    return Magnitudes(np.rint(centred / scale[:, None]).astype(np.int8), scale, mean, magnitudes.size)


@dataclass(frozen=True)
class NF4(Pass):
    """Store the weights of matrix products in NF4 with double quantization (QLoRA)."""

    exact: ClassVar[bool] = False
    quantizes: ClassVar[bool] = True

    target: str = "ort-cpu"
    block: int = 64
    """Weights that share a magnitude: 16, 32, 64, 128 or 256."""
    min_dim: int = 32
    """Smallest K and N of a product worth storing in few bits."""
    head: bool = True
    """Whether the product that makes an output of the model is stored in few bits too."""
    keep: tuple[str, ...] = ()
    """Names of nodes that stay in float."""

    def __post_init__(self) -> None:
        if self.block not in KERNEL_BLOCKS:
            raise ValueError(f"block must be one of {', '.join(map(str, KERNEL_BLOCKS))}, got {self.block}")

    def call(self, model: ir.Model) -> Outcome:
        """Replace the products; a target without a kernel for NF4 is a ``UsageError``."""
        find_target(self.target).demand("nf4", "step nf4")
        sites, refused = Choice(self.min_dim, self.keep, self.head).linears(model)
        opset = model.opset_imports.get("", 1)
        reasons = {site: _reason(site, opset) for site in sites}
        editor = Editor(model)
        shared: dict[tuple[ir.Value | None, int], list[ir.Value]] = {}
        done = []
        for site in (site for site, reason in reasons.items() if reason is None):
            done.append(decision(site.node, "quantized", f"weight in NF4, blocks of {self.block}"))
            key = site.node.inputs[1], site.axis
            if key not in shared:
                shared[key] = _constants(quantize_nf4(as_matrix(site), self.block), str(key[0] and key[0].name), editor)
            k, n = as_matrix(site).shape
            sizes = {"K": k, "N": n, "block_size": self.block, "quant_type": NF4_TYPE}
            editor.replace_product(site, "MatMulBnb4", shared[key], **sizes)
        refused += [decision(site.node, "skipped", reason) for site, reason in reasons.items() if reason is not None]
        return Outcome(model, bool(done), (*done, *refused))


def _reason(site: Site, opset: int) -> str | None:
    if opset < AXIS_OPSET:
        return f"needs opset {AXIS_OPSET}, model has {opset}"
    if site.kernel.dtype != ir.DataType.FLOAT:
        return "MatMulBnb4 computes in float32 only"
    if not np.isfinite(site.kernel.numpy()).all():
        return "weights are not finite"
    return SCALED if is_scaled(site.node) else None


def _constants(weight: NormalFloats, name: str, editor: Editor) -> list[ir.Value]:
    """The levels, and the magnitudes as the graph reads them back."""
    held = weight.magnitudes
    integers = editor.constant(f"{name}/magnitudes", held.values)
    scale, mean = editor.constant(f"{name}/scale", held.scale), editor.constant(f"{name}/mean", np.array(held.mean))
    nodes = [editor.node("DequantizeLinear", [integers, scale], name, None, axis=0)]
    nodes.append(editor.node("Add", [nodes[-1].outputs[0], mean], name, None))
    flat = editor.constant(f"{name}/flat", np.array([-1]))
    nodes.append(editor.node("Reshape", [nodes[-1].outputs[0], flat], name, None))
    if held.count < held.values.size:
        ends = [editor.constant(f"{name}/{end}", np.array([at])) for end, at in (("start", 0), ("end", held.count))]
        nodes.append(editor.node("Slice", [nodes[-1].outputs[0], *ends], name, None))
    editor.first(nodes)
    return [editor.constant(f"{name}/levels", weight.packed()), nodes[-1].outputs[0]]
