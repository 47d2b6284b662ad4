"""Insert Q/DQ pairs from calibrated ranges and store weights in 8 bits.

1. Activation: ``x -> op`` becomes ``x -> QuantizeLinear -> DequantizeLinear -> op``, for the quantized consumers of x
   only; they share one pair.
2. Weight: ``W -> op`` becomes ``int8 W -> DequantizeLinear -> op`` (or fp8), symmetric per output channel, rounded as
   ``adaround`` chose if it did, else to the nearest; the float weight is dropped when nothing else reads it.
3. Output, where asked for: everything that reads what a product with 2:4 weights makes, its bias and Relu included,
   reads it through a pair, the same one that quantized consumers share.
4. Embedding table: rows are stored as int8, whatever the format, with one scale each (``target.table`` says how they
   are read back), where nothing else needs the float rows.
5. Biases stay float.

Scales have the type of what they scale, and are float16 numbers wherever half precision may come to read them.

Equations: Jacob et al. 2018, eq. 1; symmetric ranges of Wu et al. 2020, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qexport.errors import UsageError
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.match import check_names, constant
from qexport.passes.numbers.formats import FORMATS
from qexport.passes.numbers.range import HALF_QUANTIZERS, SQNR_KEY, beyond_half, range_of
from qexport.passes.numbers.weights import misfit
from qexport.passes.placement import Outputs, Site, plan, residual_sites
from qexport.passes.target import Target, find_target
from qexport.passes.writing.qdq import Editor, float_type, needs_half
from qexport.passes.writing.quantized import quantized_nodes

__all__ = ["KEPT", "NOT_CALIBRATED", "STAY_KEY", "Quantize", "float_type", "needs_half", "quantized_nodes"]

MIN_TABLE = 1 << 16  # elements; below it an int8 table saves nothing worth a node
NOT_CALIBRATED = "not calibrated: no sample reached it"
KEPT = "kept in float by name"
STAY_KEY = "qexport.stay"
"""Metadata of a node: why it should stay in float, where a pass before this one has found a reason."""


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantize weights and activations to 8 bits where the target gains from it."""

    exact: ClassVar[bool] = False
    quantizes: ClassVar[bool] = True

    target: str = "tensorrt-rtx"
    min_sqnr: float = 22.0
    """A node whose output would have less signal over quantization noise than this (dB) stays in float."""
    keep: tuple[str, ...] = ()
    """Names of nodes that stay in float."""
    attention: bool = False
    """Whether products of two computed tensors are quantized; needs calibrate.attention, and no fuse-attention."""
    format: Literal["fp8"] | None = None
    """8-bit numbers of the products: unset, the integers that the target takes; fp8 is float8e4m3fn."""
    outputs: Outputs = "none"
    """Whether products with 2:4 weights have their output quantized, too: engines have sparse kernels for integers in
    and integers out alone. Needs calibrate.outputs; nothing happens for targets without such kernels."""
    min_output_sqnr: float = 10.0
    """With outputs: one whose rows would have less signal over quantization noise than this (dB) stays in float."""

    def call(self, model: ir.Model) -> Outcome:
        """Insert the quantizers; a model that has some, or an opset without them, is left alone with a reason.

        Nothing calibrated at all, or a name in ``keep`` that no node has, is a ``UsageError``,
        and so is a format that the target does not read.
        """
        target, opset = find_target(self.target).using(self.format, "quantize.format"), model.opset_imports.get("", 1)
        refusal = _refusal(model, FORMATS[target.activation].opset)
        if refusal is not None:
            return Outcome(model, False, (Decision("", "graph", "skipped", refusal),))
        check_names(self.keep, model)
        found = plan(model, target, attention=self.attention, outputs=self.outputs)
        rules = _Rules(target, opset, self.keep, (self.min_sqnr, self.min_output_sqnr))
        chosen, refused = rules.split(found.roots)
        if any(d.reason == NOT_CALIBRATED for d in refused) and not any(map(_calibrated, found.roots)):
            raise UsageError("no tensor has a calibrated range", hint="put a calibrate step before quantize")
        skips, refused_skips = rules.split(residual_sites(model.graph, chosen, target))
        editor = Editor(model.graph, target)
        done = [editor.quantize(site) for site in chosen + skips]
        for site in chosen:
            editor.quantize_output(site)
        tables, refused_tables = rules.split_tables(model.graph)
        done += [editor.quantize_table(node) for node in tables]
        editor.finish()
        return Outcome(model, bool(done), (*done, *found.refused, *refused, *refused_skips, *refused_tables))


def _refusal(model: ir.Model, need: int) -> str | None:
    if quantized_nodes(model):
        return "already quantized"
    opset = model.opset_imports.get("", 1)
    return f"needs opset {need}, model has {opset}" if opset < need else None


def _calibrated(site: Site) -> bool:
    return any(range_of(value) is not None for value in site.values)


@dataclass(frozen=True)
class _Rules:
    """Which sites and tables are not quantized although the target could: by request, by their numbers.

    Attributes:
        min_sqnr: Least SQNR of what a layer makes from quantized inputs, and of its rows if these are quantized.
    """

    target: Target
    opset: int
    keep: tuple[str, ...]
    min_sqnr: tuple[float, float]

    def split(self, sites: Iterable[Site]) -> tuple[list[Site], list[Decision]]:
        """The sites to quantize, and why the others are not."""
        chosen, refused = [], []
        for site in sites:
            reason = self._site(site)
            loose = None if reason else self._output(site)
            if reason is None:
                chosen.append(site if loose is None else replace(site, output=None))
            if reason or loose:
                told = reason or f"output stays in float: {loose}"
                refused.append(Decision(site.node.name or "", site.node.op_type, "skipped", told))
        return chosen, refused

    def split_tables(self, graph: ir.Graph) -> tuple[list[ir.Node], list[Decision]]:
        """The Gathers whose tables are to be quantized, and why others are not.

        A table is stored once: a reader that needs its float rows keeps it in float for all.
        """
        if self.target.table == "float":
            return [], []
        gathers = [node for node in graph if node.op_type == "Gather" and node.domain == "" and self._is_table(node)]
        reasons = {node: self._table(node) for node in gathers}
        willing = {node for node, reason in reasons.items() if reason is None}
        for node in willing:
            table = node.inputs[0]
            if table is None or table.is_graph_output() or any(user not in willing for user in table.consumers()):
                reasons[node] = "something else reads the float table"
        refused = [Decision(node.name or "", "Gather", "skipped", reason) for node, reason in reasons.items() if reason]
        return [node for node, reason in reasons.items() if reason is None], refused

    def _site(self, site: Site) -> str | None:
        if site.node.name in self.keep:
            return KEPT
        told = site.node.meta.get(STAY_KEY)
        if isinstance(told, str):
            return told
        ranges = [range_of(value) for value in site.values]
        if any(span is None for span in ranges):
            return NOT_CALIBRATED
        if any(span.low == span.high == 0 for span in ranges if span is not None):
            return "its input is always zero"
        sqnr = site.node.meta.get(SQNR_KEY)
        if sqnr is not None and sqnr < self.min_sqnr[0]:
            return f"output SQNR below {self.min_sqnr[0]:g} dB"
        return self._numbers(site)

    def _output(self, site: Site) -> str | None:
        """Why what a chosen site makes cannot be quantized."""
        if site.output is None:
            return None
        span = range_of(site.output)
        if span is None:
            return NOT_CALIBRATED
        if site.output.meta.get(SQNR_KEY, np.inf) < self.min_sqnr[1]:
            return f"SQNR of its rows below {self.min_sqnr[1]:g} dB"
        return beyond_half(span, self.target.activation) if self._half(float_type(site)) else None

    def _numbers(self, site: Site) -> str | None:
        """Why 8-bit numbers with scales of the right type cannot stand for a calibrated site."""
        dtype = float_type(site)
        if dtype == ir.DataType.FLOAT16 and self.opset < HALF_QUANTIZERS:
            return f"float16 Q/DQ needs opset {HALF_QUANTIZERS}"
        half = self._half(dtype)
        for value in site.values:
            span = range_of(value)
            reason = beyond_half(span, self.target.activation) if half and span is not None else None
            if reason is not None:
                return reason
        if site.weight is None:
            return None
        kind = FORMATS[self.target.activation].weight
        return misfit(site.kernel.numpy(), site.axis, half=half, kind=kind)

    def _is_table(self, node: ir.Node) -> bool:
        tensor = constant(node.inputs[0])
        return (
            tensor is not None
            and tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
            and len(tensor.shape) == 2
            and tensor.size >= MIN_TABLE
            and tensor.numpy().shape[1] >= self.target.min_dim
            and node.attributes.get_int("axis", 0) == 0
        )

    def _table(self, node: ir.Node) -> str | None:
        tensor = constant(node.inputs[0])
        if node.name in self.keep:
            return KEPT
        if tensor is None:
            return "its table is computed"
        if tensor.dtype == ir.DataType.FLOAT16 and self.target.table == "dequantize" and self.opset < HALF_QUANTIZERS:
            return f"float16 Q/DQ needs opset {HALF_QUANTIZERS}"
        return misfit(tensor.numpy(), 0, half=self._half(tensor.dtype))

    def _half(self, dtype: ir.DataType) -> bool:
        return needs_half(self.target, dtype)
