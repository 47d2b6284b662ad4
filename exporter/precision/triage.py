"""Find the layer that would cost as much as many others together, so that it stays in float.

Each layer that ``quantize`` would store is quantized alone on a few calibration samples, by injecting its own error
into the float model, and the error at the model's output is measured. Local errors cannot tell: on sentence encoders
the first block's second product has one of the smallest, and a quarter of the damage. Shares are of the sum over
layers, as errors of different layers hardly correlate.

The idea of leave-one-out rankings: Bondarenko et al. 2021, section 4; Nagel et al. 2021, "A White Paper on Neural
Network Quantization", section 3.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar, Literal

import onnx_ir as ir

from qexport.calibration.least import check_least
from qexport.calibration.reading.data import Dataset
from qexport.calibration.reading.spec import input_specs, static_batch
from qexport.errors import UsageError
from qexport.exporter.precision.excerpt import Excerpt
from qexport.exporter.precision.layers import measure_groups
from qexport.exporter.precision.probe import Probe
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.numbers.notes import ERROR_KEY
from qexport.passes.pipeline import run
from qexport.passes.quantize import STAY_KEY, Quantize
from qexport.passes.target import find_target

OUTWEIGHS = "its error outweighs others"
SHARES = {True: 0.3, False: 0.5}  # by whether the rest computes in half precision


@dataclass(frozen=True)
class Triage(Pass):
    """Let a layer stay in float whose error at the output outweighs that of many others together."""

    exact: ClassVar[bool] = True

    data: Dataset | None = field(default=None, metadata={"bound": True})
    target: str = "tensorrt-rtx"
    share: float | None = None
    """How much of the sum of all layers' errors one of them must cause, from 0 to 1; unset: 0.3 where what stays in
    float computes in half precision, 0.5 where it does not and costs four times an integer layer."""
    most: int = 1
    """How many layers may stay in float for that reason."""
    excerpt: int = 16
    """How many samples to look at; every layer runs the model once for each."""
    format: Literal["fp8"] | None = None
    """As in quantize.format."""

    def __post_init__(self) -> None:
        check_least("triage", self, excerpt=1, most=0)
        if self.share is not None and not 0 <= self.share <= 1:
            raise UsageError(f"share is {self.share:g}, expected a number from 0 to 1", where="triage.share")

    def call(self, model: ir.Model) -> Outcome:
        """Note the layers that ``quantize`` is to leave; no data is a ``UsageError``."""
        if self.data is None:
            raise UsageError("triage needs calibration data", hint="give real samples with --calib")
        before = {node.name or "": node.meta.pop(STAY_KEY, None) for node in model.graph}
        errors = self._errors(model)
        half = find_target(self.target).rest == "float16"
        found = dominant(errors, self.share if self.share is not None else SHARES[half], self.most)
        decisions = []
        for node in model.graph:
            if node.name in errors:
                node.meta[ERROR_KEY] = errors[node.name]
            if node.name in found:
                node.meta[STAY_KEY] = OUTWEIGHS
                told = f"{OUTWEIGHS}: {found[node.name]:.0%} of the sum"
                decisions.append(Decision(node.name, node.op_type, "kept", told))
        modified = {name for name, reason in before.items() if reason} != set(found)
        return Outcome(model, modified, tuple(decisions))

    def _errors(self, model: ir.Model) -> dict[str, float]:
        """The relative squared error at the output with each layer quantized alone, by name."""
        assert self.data is not None
        quantized, (record,) = run(model, [("quantize", Quantize(target=self.target, format=self.format))])
        nodes = [d.node for d in record.decisions if d.action == "quantized" and d.op != "Gather"]
        samples = tuple(islice(self.data, self.excerpt))
        if len(nodes) < 2 or not samples:
            return {}
        excerpt = Excerpt(samples, None, static_batch(input_specs(model)))
        probe = Probe(model, quantized, nodes, excerpt, find_target(self.target))
        scores = measure_groups(probe, [[node] for node in nodes])
        return {node: score.error for node, score in zip(nodes, scores, strict=True)}


def dominant(errors: Mapping[str, float], share: float, most: int) -> dict[str, float]:
    """The layers, at most ``most``, each of which causes more than ``share`` of what it and the rest sum up to."""
    rest, found = dict(errors), dict[str, float]()
    while rest and len(found) < most:
        worst = max(rest, key=lambda name: rest[name])
        total = sum(rest.values())
        if not rest[worst] > share * total:
            break
        found[worst] = rest.pop(worst) / total
    return found
