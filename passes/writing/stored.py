"""Write weights in few bits into a graph: DequantizeLinear in blocks or channels, or onnxruntime's MatMulNBits."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.numbers.groups import Codes, Grid
from qexport.passes.placement import Site
from qexport.passes.target import Target
from qexport.passes.writing.lowbit import Editor

KERNEL_BLOCKS = (256, 128, 64, 32, 16)  # what MatMulNBits computes with
ENGINE_BLOCKS = (128, 64, 32, 16)  # what engines have a fused 4-bit kernel for, whatever the size of a channel


class Writer(Protocol):
    """Gives products their weights in few bits."""

    def write(self, site: Site, codes: Codes) -> None:
        """Let ``site`` read its weight as ``codes``; products that share a weight give the same ones."""


class Dequantize:
    """Puts DequantizeLinear, once for each weight, before its products; a Gemm stays as it is.

    Args:
        editor: Of the graph.
        target: Whose kernels decide how one scale a channel is spelled in 4 bits.
    """

    def __init__(self, editor: Editor, target: Target) -> None:
        self.editor, self.target = editor, target
        self._read: dict[tuple[ir.Value, int], ir.Value] = {}

    def write(self, site: Site, codes: Codes) -> None:
        """Let ``site`` read its weight as ``codes``."""
        weight = site.node.inputs[1]
        assert weight is not None
        if (weight, site.axis) not in self._read:
            self._read[weight, site.axis] = self._node(weight, codes, site)
        site.node.replace_input_with(1, self._read[weight, site.axis])
        self.editor.drop([weight])

    def _node(self, weight: ir.Value, codes: Codes, site: Site) -> ir.Value:
        k, dtype = codes.values.shape[0], site.kernel.dtype.numpy()
        grid = replace(codes.grid, group=self._block(codes.grid, k))
        kind = (ir.DataType.INT8 if grid.bits == 8 else ir.DataType.INT4).numpy()
        repeats = codes.grid.rows(k) // grid.rows(k)
        arrays = [("codes", codes.values.astype(kind)), ("scale", np.repeat(codes.scale, repeats, 0).astype(dtype))]
        if codes.zero is not None:
            arrays.append(("zero_point", np.repeat(codes.zero, repeats, 0).astype(kind)))
        if site.axis == 0:  # a Gemm that reads its weight transposed
            arrays = [(name, array.T) for name, array in arrays]
        shape = {"axis": 1 - site.axis, "block_size": grid.group}
        if not grid.group:
            arrays[1:] = [(name, array.reshape(-1)) for name, array in arrays[1:]]
            shape = {"axis": site.axis}
        inputs = [self.editor.constant(f"{weight.name}/{name}", array) for name, array in arrays]
        node = self.editor.node("DequantizeLinear", inputs, str(weight.name), weight, **shape)
        self.editor.first([node])
        return node.outputs[0]

    def _block(self, grid: Grid, k: int) -> int:
        if grid.group or grid.bits == 8 or self.target.engine is None:
            return grid.group
        return next((block for block in ENGINE_BLOCKS if k % block == 0), 0)


class NBits:
    """Puts MatMulNBits for the product, and an Add for the bias of a Gemm.

    Args:
        editor: Of the graph.
        accuracy_level: The operator's attribute.
    """

    def __init__(self, editor: Editor, accuracy_level: int) -> None:
        self.editor, self.accuracy_level = editor, accuracy_level
        self._stored: dict[tuple[ir.Value, int], list[ir.Value]] = {}

    def write(self, site: Site, codes: Codes) -> None:
        """Let ``site`` read its weight as ``codes``."""
        weight = site.node.inputs[1]
        assert weight is not None
        k, n = codes.values.shape
        block = kernel_block(codes.grid, k)
        if (weight, site.axis) not in self._stored:
            arrays = pack_nbits(codes, block)
            arrays["scale"] = arrays["scale"].astype(site.kernel.dtype.numpy())
            stored = [self.editor.constant(f"{weight.name}/{name}", array) for name, array in arrays.items()]
            self._stored[weight, site.axis] = stored
        sizes = {"K": k, "N": n, "bits": _width(codes.grid), "block_size": block, "accuracy_level": self.accuracy_level}
        self.editor.replace_product(site, "MatMulNBits", self._stored[weight, site.axis], **sizes)


def kernel_block(grid: Grid, k: int) -> int:
    """The block of MatMulNBits for a grid: it divides the group, then pads K the least, then is the largest.

    Returns 0 where the kernel has none.
    """
    fitting = [block for block in KERNEL_BLOCKS if grid.group % block == 0]
    return min(fitting, key=lambda block: -(-k // block) * block, default=0)


def pack_nbits(codes: Codes, block: int) -> dict[str, NDArray[np.generic]]:
    """Codes as MatMulNBits reads them: by output channel, in blocks along K, low bits first, 2^(bits-1) added.

    Returns:
        ``codes``: uint8 ``[N, blocks, block * bits / 8]``, the last block filled up with codes of zero; ``scale``:
        float32 ``[N * blocks]``, one repeated for all blocks of its group; ``zero_point``, where there is one: uint8,
        a row for each output channel, packed like the codes.
    """
    k, n = codes.values.shape
    blocks, bits = -(-k // block), _width(codes.grid)
    middle = 1 << (bits - 1)
    filled = np.full((n, blocks * block), middle, np.uint8)
    filled[:, :k] = codes.values.T.astype(np.int16) + middle
    repeats = -(-codes.grid.rows(k) // block)
    packed: dict[str, NDArray[np.generic]] = {
        "codes": _pack(filled, bits).reshape(n, blocks, -1),
        "scale": np.repeat(codes.scale.T, repeats, axis=1).reshape(-1),
    }
    if codes.zero is not None:
        zero = (codes.zero.T.astype(np.int16) + middle).astype(np.uint8)
        packed["zero_point"] = _pack(np.repeat(zero, repeats, axis=1), bits).reshape(-1)
    return packed


def _width(grid: Grid) -> int:
    """Bits that a code is stored in: there is no kernel for 3."""
    return max(grid.bits, 4)


def _pack(rows: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Two 4-bit numbers of a row to a byte, the first one in the low half; 8-bit numbers as they are."""
    if bits == 8:
        return rows
    even = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    return np.asarray(even[:, 0::2] | (even[:, 1::2] << 4), np.uint8)
