"""Multiply the few feature columns with outliers in float and all others in int8 (LLM.int8()).

With the columns ``O`` of ``X`` whose largest magnitude over the calibration data exceeds a threshold::

    X W = X[:, O] W[O, :] + X' W'         X' = X and W' = W with the columns, and rows, O zero

The first product stays in float; the second one is

- per token and column where the target takes ranges per call: ``X' = X * mask``, quantized as in ``per_call``;
- with one calibrated scale for the tensor elsewhere: ``X -> Q -> DQ`` with the range of the other columns. There is
  no mask: what the outliers saturate to meets zero rows of W'.

The columns are chosen when the model is built, since they are the same ones for every input. The threshold of 6.0 is
the paper's, which knows activations behind a normalization; where all of a model's activations are larger or smaller,
``relative`` measures a column by the others instead.

Source: Dettmers et al. 2022, LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.errors import UsageError
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.dynamic import decision, refuse
from qexport.passes.folding.activation import MIXED, Activation, activation_of, why_unknown
from qexport.passes.match import check_names, replace, sweep
from qexport.passes.numbers.range import HALF_QUANTIZERS, RANGE_KEY, Range, beyond_half
from qexport.passes.numbers.weights import misfit
from qexport.passes.placement import Site, plan
from qexport.passes.quantize import KEPT
from qexport.passes.target import Target, find_target
from qexport.passes.writing.per_call import FLOAT, NEEDS, PerCall, matrix, unfit
from qexport.passes.writing.qdq import float_type, needs_half

Columns = NDArray[np.int64]  # of the activation, ascending


@dataclass(frozen=True)
class LlmInt8(Pass):
    """Multiply columns with outliers in float and the others in int8 (LLM.int8(), Dettmers et al. 2022)."""

    exact: ClassVar[bool] = False
    quantizes: ClassVar[bool] = True

    target: str = "tensorrt-rtx"
    threshold: float = 6.0
    """A column of an activation that exceeds this in magnitude, on any sample, is multiplied in float."""
    relative: float | None = None
    """If given, a column is an outlier when it exceeds this many times the median of the columns' magnitudes."""
    max_share: float = 0.125
    """A node with a larger share of outliers among its columns stays in float."""
    ranges: Literal["auto", "token", "static"] = "auto"
    """token: one scale for each position, at every call. static: one for the tensor. auto: token where it is read."""
    keep: tuple[str, ...] = ()
    """Names of nodes that stay in float."""

    def __post_init__(self) -> None:
        for name, value in (("threshold", self.threshold), ("relative", self.relative)):
            if value is not None and not 0 < value < np.inf:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if not 0 <= self.max_share <= 1:
            raise ValueError(f"max_share must lie between 0 and 1, got {self.max_share!r}")

    def call(self, model: ir.Model) -> Outcome:
        """Replace the products; a quantized model, or an opset too old, is left alone with a reason.

        Nothing observed at all, ranges that the target does not read, or a name in ``keep`` that no node has, is a
        ``UsageError``.
        """
        target = find_target(self.target)
        token = self.ranges == "token" or (self.ranges == "auto" and "dynamic" in target.formats)
        if token:
            target.demand("dynamic", "llm-int8.ranges")
        refusal = refuse(model, NEEDS["token"] if token else HALF_QUANTIZERS)
        if refusal is not None:
            return Outcome(model, False, (Decision("", "graph", "skipped", refusal),))
        check_names(self.keep, model)
        found = plan(model, target)
        if found.roots and not any(_activation(site) or _unknown(site) == MIXED for site in found.roots):
            raise UsageError("no activation was looked at", hint="put an observe step before llm-int8")
        reasons = [(site, self._reason(site, target, token=token)) for site in found.roots]
        chosen = [(site, self._outliers(site)) for site, reason in reasons if reason is None]
        editor = _Decomposer(model.graph, target, "token")
        for site, columns in chosen:
            if token:
                editor.per_token(site, columns)
            else:
                editor.static(site, columns)
        editor.finish()
        done = [decision(site, "quantized", f"{len(columns)} outlier columns in float") for site, columns in chosen]
        refused = [decision(site, "skipped", reason) for site, reason in reasons if reason is not None]
        return Outcome(model, bool(done), (*done, *found.refused, *refused))

    def _outliers(self, site: Site) -> Columns:
        seen = _activation(site)
        reach = np.zeros(0) if seen is None else seen.reach
        limit = self.threshold if self.relative is None else self.relative * float(np.median(reach))
        return np.flatnonzero(reach > limit)

    def _reason(self, site: Site, target: Target, *, token: bool) -> str | None:
        """Why a site stays in float, if it does."""
        seen = _activation(site)
        if site.node.name in self.keep:
            return KEPT
        if site.node.op_type not in ("MatMul", "Gemm"):
            return "not a matrix product"
        if seen is None:
            return _unknown(site)
        if not seen.reach.any():
            return "its input is always zero"
        if len(self._outliers(site)) > self.max_share * len(seen.reach):
            return f"more than {self.max_share:.3g} of its columns are outliers"
        return unfit(site) if token else _static_misfit(site, _rest(seen, self._outliers(site)), target)


def _activation(site: Site) -> Activation | None:
    return activation_of(next(site.values, None))


def _unknown(site: Site) -> str:
    return why_unknown(next(site.values, None))


def _rest(seen: Activation, columns: Columns) -> Range:
    """The range of the other columns, zero included."""
    low, high = np.delete(seen.low, columns), np.delete(seen.high, columns)
    return Range(min(float(low.min(initial=0)), 0.0), max(float(high.max(initial=0)), 0.0))


def _static_misfit(site: Site, span: Range, target: Target) -> str | None:
    half = needs_half(target, float_type(site))
    reason = beyond_half(span, target.activation) if half else None
    return reason or misfit(site.kernel.numpy(), site.axis, half=half)


class _Decomposer(PerCall):
    """Splits products in two; what several of them read is made once."""

    def __init__(self, graph: ir.Graph, target: Target, granularity: Literal["token"]) -> None:
        super().__init__(graph, target, granularity)
        self._masked: dict[ir.Value, ir.Value] = {}
        self._gathered: dict[ir.Value, ir.Value] = {}

    def per_token(self, site: Site, columns: Columns) -> None:
        """Integers for each row of the activation, its outliers masked."""
        if not len(columns):
            self.replace(site)
            return
        x, weight = _inputs(site)
        kernel, scale = self.store(f"{weight.name}/rest", _without(matrix(site), columns, 0))
        few = self._few(site, columns)
        self.put(site, self._joined(site, self.product(site, self._mask(site, x, columns), kernel, scale), few))

    def static(self, site: Site, columns: Columns) -> None:
        """One pair of quantizers for the tensor, with the range of its other columns."""
        x, weight = _inputs(site)
        seen = _activation(site)
        assert seen is not None
        assert site.weight is not None
        x.meta[RANGE_KEY] = _rest(seen, columns)
        if not len(columns):
            self.quantize(site)
            return
        few = self._few(site, columns)
        cleared = _without(site.kernel.numpy(), columns, 1 - site.axis)
        site.node.replace_input_with(site.weight, self._initializer(f"{weight.name}/rest", cleared))
        self.quantize(site)
        rest = self._node(site.node.op_type, list(site.node.inputs), f"{site.node.name}")
        rest.attributes.update(site.node.attributes)
        self._describe(rest, f"{rest.name}:0", float_type(site), None)
        replace([site.node], site.node.outputs[0], self._joined(site, [rest], few))
        sweep([weight])

    def _few(self, site: Site, columns: Columns) -> ir.Node:
        """The float product of the outliers."""
        name, dtype, (x, _) = f"{site.node.name}", float_type(site), _inputs(site)
        rows = matrix(site)[columns] * np.float32(site.node.attributes.get_float("alpha", 1.0))
        if x not in self._gathered:
            indices = self._initializer(f"{x.name}/outlier_columns", columns)
            self._gathered[x] = self._before(site, self.node("Gather", [x, indices], f"{x.name}", dtype, axis=-1))
        held = self._initializer(f"{name}/outliers", rows.astype(dtype.numpy()))
        return self.node("MatMul", [self._gathered[x], held], name, dtype)

    def _joined(self, site: Site, rest: list[ir.Node], few: ir.Node) -> list[ir.Node]:
        parts: list[ir.Value | None] = [rest[-1].outputs[0], few.outputs[0]]
        return [*rest, few, self.node("Add", parts, f"{site.node.name}", float_type(site))]

    def _mask(self, site: Site, x: ir.Value, columns: Columns) -> ir.Value:
        if x not in self._masked:
            ones = np.ones(matrix(site).shape[0], np.float32)
            mask = self._initializer(f"{x.name}/mask", _without(ones, columns, 0))
            self._masked[x] = self._before(site, self.node("Mul", [x, mask], f"{x.name}", FLOAT))
        return self._masked[x]

    def _before(self, site: Site, node: ir.Node) -> ir.Value:
        self.graph.insert_before(site.node, node)
        return node.outputs[0]


def _inputs(site: Site) -> tuple[ir.Value, ir.Value]:
    x, weight = site.node.inputs[:2]
    assert x is not None
    assert weight is not None
    return x, weight


def _without(numbers: NDArray[Any], columns: Columns, axis: int) -> NDArray[Any]:
    """A copy with zeros at ``columns`` of ``axis``."""
    cleared = numbers.copy()
    np.moveaxis(cleared, axis, 0)[columns] = 0
    return cleared
