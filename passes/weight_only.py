"""Store the weights of matrix products in 8, 4 or 3 bits; activations and everything else stay as they are.

1. Where the target reads blocks: ``W -> op`` becomes ``integers -> DequantizeLinear -> op``, with a block for each
   group of inputs, or an axis for one scale an output channel. A Gemm keeps its transposition and its bias.
2. Where it has a kernel for them: ``x, W -> MatMul`` becomes ``x, integers, scales -> MatMulNBits``; the bias of a
   Gemm becomes an Add.

Codes that an earlier pass left on a weight (:func:`qexport.passes.numbers.groups.codes_of`) are stored as they are,
others are rounded to the nearest here. Codes of 3 bits are stored in 4: no target computes with a narrower type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from qexport.errors import UsageError
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.numbers.groups import (
    SMALLEST_GROUP,
    Grid,
    as_matrix,
    check_group,
    codes_of,
    misfit_groups,
    quantize_groups,
)
from qexport.passes.placement import Site
from qexport.passes.target import Target, find_target
from qexport.passes.writing.fit import fitted
from qexport.passes.writing.lowbit import AXIS_OPSET, BLOCK_OPSET, SCALED, Choice, Editor, decision, is_scaled
from qexport.passes.writing.qdq import needs_half
from qexport.passes.writing.stored import Dequantize, NBits, Writer, kernel_block

Format = Literal["dequantize", "nbits"]


@dataclass(frozen=True)
class WeightOnly(Pass):
    """Store the weights of matrix products in 8, 4 or 3 bits."""

    exact: ClassVar[bool] = False
    quantizes: ClassVar[bool] = True

    target: str = "tensorrt-rtx"
    bits: Literal[8, 4, 3] = 4
    group: int = 128
    """Inputs that share a scale; 0 gives one scale to each output channel."""
    fit: bool = False
    """Whether the group is halved, down to 16, for a product whose inputs it does not divide."""
    symmetric: bool = True
    """Whether there are no zero points; engines take none."""
    clip: bool = False
    """Whether the range of each group is the one of least squared error, instead of all of it."""
    format: Format | None = None
    """How weights are read: "dequantize", or "nbits" (onnxruntime's MatMulNBits); else what suits the target."""
    accuracy_level: Literal[0, 1, 4] = 4
    """What MatMulNBits computes in: 4 rounds activations to 8 bits, block by block; 0 and 1 stay in float32."""
    min_dim: int = 32
    """Smallest K and N of a product worth storing in few bits."""
    head: bool = True
    """Whether the product that makes an output of the model is stored in few bits too."""
    keep: tuple[str, ...] = ()
    """Names of nodes that stay in float."""

    def __post_init__(self) -> None:
        if self.group and self.group < SMALLEST_GROUP:
            raise ValueError(f"group must be 0 or at least {SMALLEST_GROUP}, got {self.group}")

    def call(self, model: ir.Model) -> Outcome:
        """Replace the weights; what suits neither the target nor a node is a ``UsageError`` before any edit."""
        target, opset = find_target(self.target), model.opset_imports.get("", 1)
        form = self._form(target)
        sites, refused = Choice(self.min_dim, self.keep, self.head).linears(model)
        for site in sites:
            _check(site, self._grid(site), form, target)
        reasons = {site: self._reason(site, form, target, opset) for site in sites}
        writer = NBits(Editor(model), self.accuracy_level) if form == "nbits" else Dequantize(Editor(model), target)
        done = [self._store(site, writer, target) for site, reason in reasons.items() if reason is None]
        refused += [decision(site.node, "skipped", reason) for site, reason in reasons.items() if reason is not None]
        return Outcome(model, bool(done), (*done, *refused))

    def _form(self, target: Target) -> Format:
        """Engines, and graphs that become half precision, get the standard operator."""
        if self.format == "nbits":
            target.demand("nbits", "option 'format'")
        suits_nbits = "nbits" in target.formats and target.rest == "float32"
        return self.format or ("nbits" if suits_nbits else "dequantize")

    def _grid(self, site: Site) -> Grid:
        found = codes_of(site.node.inputs[1])
        if found is not None:
            return found.grid
        inputs = site.kernel.numpy().shape[1 - site.axis]
        return fitted(Grid(self.bits, self.group, self.symmetric), inputs, site.node.name or "", fit=self.fit)

    def _reason(self, site: Site, form: Format, target: Target, opset: int) -> str | None:
        """Why a weight stays in float although the target reads the grid, if it does."""
        needed = _opset(self._grid(site)) if form == "dequantize" else 1
        if opset < needed:
            return f"needs opset {needed}, model has {opset}"
        if form == "nbits" and is_scaled(site.node):
            return SCALED
        if codes_of(site.node.inputs[1]) is not None:
            return None
        return misfit_groups(as_matrix(site), self._grid(site), half=needs_half(target, site.kernel.dtype))

    def _store(self, site: Site, writer: Writer, target: Target) -> Decision:
        grid, half = self._grid(site), needs_half(target, site.kernel.dtype)
        codes = codes_of(site.node.inputs[1]) or quantize_groups(as_matrix(site), grid, half=half, clip=self.clip)
        share = f"groups of {grid.group}" if grid.group else "one scale an output channel"
        done = decision(site.node, "quantized", f"weight in {grid.bits} bits, {share}")
        writer.write(site, codes)
        return done


def _check(site: Site, grid: Grid, form: Format, target: Target) -> None:
    """Raise ``UsageError`` naming the node where the target cannot read the grid, or the grid does not fit the node."""
    where = f"node {site.node.name!r}"
    if form == "dequantize" and grid.bits < 8:
        target.demand("int4", where)
    if form == "dequantize" and _opset(grid) > target.opset:
        raise UsageError(
            f"groups of weights need opset {BLOCK_OPSET}, target {target.name} reads up to {target.opset}",
            where=where,
            hint="set group = 0 for one scale an output channel",
        )
    if target.engine is not None and not grid.symmetric:
        raise UsageError(f"target {target.name} takes no zero points", where=where, hint="set symmetric = true")
    k = site.kernel.numpy().shape[1 - site.axis]
    check_group(grid, k, site.node.name or "")
    if form == "nbits" and not kernel_block(grid, k):
        raise UsageError(
            f"MatMulNBits has no block that divides a group of {grid.group}",
            where=where,
            hint="take a multiple of 16, or format = 'dequantize'",
        )


def _opset(grid: Grid) -> int:
    return BLOCK_OPSET if grid.group or grid.bits < 8 else AXIS_OPSET
