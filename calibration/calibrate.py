"""Measure activation ranges on data: the pass that leaves a ``Range`` on every value to be quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.layers import Layer, sqnr
from qexport.calibration.least import check_least
from qexport.calibration.outputs import least_row_error, signal
from qexport.calibration.reading.data import Dataset
from qexport.calibration.statistics.collect import Statistics, collect, workers
from qexport.calibration.statistics.excerpts import Window
from qexport.calibration.statistics.methods import METHODS
from qexport.calibration.statistics.sketch import sketch
from qexport.calibration.statistics.store import Store
from qexport.errors import UsageError
from qexport.passes.base import Outcome, Pass
from qexport.passes.numbers.formats import FORMATS
from qexport.passes.numbers.notes import KERNEL_KEY, SKETCH_KEY
from qexport.passes.numbers.range import RANGE_KEY, SQNR_KEY, Range
from qexport.passes.placement import Outputs, Plan, Site, plan
from qexport.passes.target import Target, find_target

OUTPUT_MSE = "output-mse"
CONVOLUTIONS = ("Conv", "ConvTranspose")
PATCH = 12  # side of the windows that images are rated on
WHOLE_ROWS: Window = ()
COARSE = np.linspace(0.3, 1.0, 8)  # candidate clips of output-mse, as shares of the extremes
FINE = np.linspace(-0.08, 0.08, 5)  # what is tried around the best of them


@dataclass(frozen=True)
class Calibrate(Pass):
    """Measure activation ranges on calibration data."""

    exact: ClassVar[bool] = True

    data: Dataset | None = field(default=None, metadata={"bound": True})
    advance: Callable[[], None] = field(default=lambda: None, metadata={"bound": True})
    store: Store = field(default=Store(), metadata={"bound": True})
    target: str = "tensorrt-rtx"
    method: str = "output-mse"
    """output-mse, or by the values alone: minmax, percentile, entropy, mse."""
    samples: int = 512
    attention: bool = False
    """Whether products of two computed tensors are measured too; needed by quantize.attention."""
    format: Literal["fp8"] | None = None
    """8-bit numbers that ranges are searched for: unset, the integers that the target takes; as in quantize.format."""
    outputs: Outputs = "none"
    """Whether what products with 2:4 weights make is measured too; needed by quantize.outputs."""

    def __post_init__(self) -> None:
        check_least("calibrate", self, samples=1)

    def call(self, model: ir.Model) -> Outcome:
        """Leave a range on each value, and on each node the SQNR of its output and its weight before any rounding.

        No data is a ``UsageError``.
        """
        if self.data is None:
            raise UsageError("quantization needs calibration data", hint="give real samples with --calib")
        if self.method != OUTPUT_MSE and self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}", hint=f"known: {', '.join([*METHODS, OUTPUT_MSE])}")
        target = find_target(self.target).using(self.format, "calibrate.format")
        found = plan(model, target, attention=self.attention, outputs=self.outputs)
        values = {value.name or "": value for site in found.sites for value in site.measured}
        taps = dict.fromkeys(values, WHOLE_ROWS) | _windows(found)
        journal = self.store.entry(model, taps, self.data.digests[: self.samples])
        statistics = collect(model, taps, islice(self.data, self.samples), self.advance, journal)
        spans = self._ranges(found, statistics, target)
        modified = False
        for name, span in spans.items():
            modified |= values[name].meta.get(RANGE_KEY) != span
            values[name].meta[RANGE_KEY] = span
            values[name].meta[SKETCH_KEY] = sketch(statistics[name].histogram)
        for site in found.roots:
            if site.weight is not None:
                site.node.meta[KERNEL_KEY] = site.kernel
        _rate(found, statistics, spans, target)
        for name, value in _outputs(found).items():
            found_signal = signal(statistics[name], spans[name], target.activation) if name in spans else None
            if found_signal is not None:
                value.meta[SQNR_KEY] = found_signal
        return Outcome(model, modified)

    def _ranges(self, found: Plan, statistics: Mapping[str, Statistics], target: Target) -> dict[str, Range]:
        seen = {name: known.histogram for name, known in statistics.items() if known.histogram.total}
        if self.method != OUTPUT_MSE:
            with ThreadPoolExecutor(workers()) as pool:  # numpy lets go of the interpreter in its loops
                found_spans = pool.map(lambda known: METHODS[self.method](known, target.activation), seen.values())
                return dict(zip(seen, found_spans, strict=True))
        readers: dict[str, list[Site]] = {name: [] for name in seen}
        for site in found.sites:
            for value in site.values:
                readers.get(value.name or "", []).append(site)
        made = {name for name in _outputs(found) if not readers.get(name)}

        def choose(name: str) -> Range:
            by_row = least_row_error(statistics[name], target.activation) if name in made else None
            return by_row or _least_output_error(statistics[name], readers[name], target)

        with ThreadPoolExecutor(workers()) as pool:
            return dict(zip(seen, pool.map(choose, seen), strict=True))


def _least_output_error(known: Statistics, readers: list[Site], target: Target) -> Range:
    """The clip with the least relative error at the outputs of everything that reads the value.

    There are two such errors: that of each row by itself, and that of all rows together, in which a few large rows
    decide. Either alone ruins a model now and then: sentence encoders have rows a hundred times the others, which the
    first would clip, and all that the second would see. So a clip is rated by how many times the least it makes of
    each.

    Ranges are shares of the extremes of all samples, while the rows that rate them are few and hardly ever hold those
    extremes: what a range clips is judged by rows it was not derived from. Where no reader has a weight, as in a
    product of two computed tensors, the value itself decides (``mse``).
    """
    low, high = known.histogram.low, known.histogram.high
    pieces = known.excerpts.stacked()
    layers = [Layer(site, pieces, target) for site in readers if site.weight is not None]

    def losses(shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of all readers, for each share: of the rows, each by itself, and of all rows together."""
        spans = [Range(low * share, high * share) for share in shares]
        found = [rated for layer in layers if (rated := layer.losses(spans)).size]
        return np.sum(found, axis=0) if found else np.zeros((2, 0))

    stretches = FORMATS[target.activation].stretches
    coarse = np.concatenate([COARSE, stretches[1:]])
    rough = losses(coarse)
    if not rough.size:
        return METHODS["mse"](known.histogram, target.activation)
    best = np.maximum(rough.min(axis=1, keepdims=True), 1e-30)
    fine = np.minimum(coarse[int((rough / best).sum(axis=0).argmin())] + FINE, stretches[-1])
    share = float(fine[int((losses(fine) / best).sum(axis=0).argmin())])
    return Range(low * share, high * share)


def _outputs(found: Plan) -> dict[str, ir.Value]:
    """What products make whose output is quantized; not of convolutions, whose rows are no positions."""
    sites = (site for site in found.roots if site.node.op_type not in CONVOLUTIONS)
    return {site.output.name or "": site.output for site in sites if site.output is not None}


def _windows(found: Plan) -> dict[str, Window]:
    """What convolutions read, with a window that holds the reach of every kernel, wide enough for some outputs."""
    windows: dict[str, Window] = {}
    for site in found.sites:
        if site.weight is None or site.node.op_type not in CONVOLUTIONS:
            continue
        sides = site.kernel.numpy().shape[2:]
        steps = site.node.attributes.get_ints("dilations", ()) or [1] * len(sides)
        for value in site.values:
            before = windows.get(value.name or "", (PATCH,) * len(sides))
            reach = ((side - 1) * step + 1 for side, step in zip(sides, steps, strict=True))
            windows[value.name or ""] = tuple(map(max, before, reach))
    return windows


def _rate(found: Plan, statistics: Mapping[str, Statistics], spans: Mapping[str, Range], target: Target) -> None:
    """Leave on every node the SQNR of its output with weight and activation quantized."""
    named = [(site, next((value.name or "" for value in site.values), "")) for site in found.sites]
    rated = [(site, name) for site, name in named if site.weight is not None and name in spans]

    def rate(entry: tuple[Site, str]) -> list[float]:
        site, name = entry
        return Layer(site, statistics[name].excerpts.stacked(), target).errors([spans[name]])

    with ThreadPoolExecutor(workers()) as pool:
        for (site, _), errors in zip(rated, pool.map(rate, rated), strict=True):
            for error in errors:
                site.node.meta[SQNR_KEY] = sqnr(error)
