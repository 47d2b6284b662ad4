"""What was seen at each tensor that was measured, and which range each method would have chosen for it."""

from __future__ import annotations

import onnx_ir as ir

from qexport.calibration.statistics.methods import METHODS, squared_error
from qexport.calibration.statistics.sketch import Sketch, sketch_of
from qexport.exporter.report.values import Activation, Candidate
from qexport.passes.numbers.formats import Kind
from qexport.passes.numbers.range import SQNR_KEY, Range, integers_for, range_of
from qexport.passes.quantize import needs_half
from qexport.passes.target import Target

BINS = 80
SLOW = {"entropy", "mse"}
"""Methods that search, some ten milliseconds a tensor."""
SEARCHED = 48
"""Tensors that these are asked about: those whose readers have the least SQNR."""


def activation_rows(model: ir.Model, target: Target) -> tuple[Activation, ...]:
    """Return one row for each value of ``model`` that calibration left a sketch on, in graph order."""
    found: dict[ir.Value, Sketch] = {}
    for node in model.graph:
        for value in (*node.inputs, *node.outputs):
            known = None if value is None else sketch_of(value)
            if value is not None and known is not None and known.total and range_of(value) is not None:
                found.setdefault(value, known)
    searched = set(sorted(found, key=_least_sqnr)[:SEARCHED])
    return tuple(_row(value, known, target, search=value in searched) for value, known in found.items())


def _least_sqnr(value: ir.Value) -> float:
    return min((node.meta.get(SQNR_KEY, float("inf")) for node in value.consumers()), default=float("inf"))


def _row(value: ir.Value, known: Sketch, target: Target, *, search: bool) -> Activation:
    kind, span = target.activation, range_of(value)
    assert span is not None
    edges, counts = known.bins(BINS)
    methods = [name for name in METHODS if search or name not in SLOW]
    spans = {"chosen": span} | {name: METHODS[name](known, kind) for name in methods}
    half = needs_half(target, value.dtype or ir.DataType.FLOAT)
    return Activation(
        value=value.name or "",
        readers=tuple(dict.fromkeys(node.name or "" for node in value.consumers())),
        kind=kind,
        low=known.low,
        high=known.high,
        scale=integers_for(span, kind, half=half).scale,
        zeros=known.zeros,
        total=known.total,
        edges=tuple(map(float, edges)),
        counts=tuple(map(int, counts)),
        candidates=tuple(_candidate(name, found, known, kind) for name, found in spans.items()),
    )


def _candidate(name: str, span: Range, known: Sketch, kind: Kind) -> Candidate:
    values, counts = known.table()
    power = float(counts @ values**2)
    noise = squared_error(values, counts, span, kind) / power if power else 0.0
    return Candidate(name, span.low, span.high, known.clipped(span.low, span.high), noise)
