"""``qexport sensitivity``: which activations and which layers cannot bear fewer bits."""

from __future__ import annotations

from itertools import islice
from typing import Any, Literal

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field

from qexport.calibration.running.execute import open_model
from qexport.exporter.precision.activations import find_groups, leave_one_out, measure_ranges
from qexport.exporter.precision.costs import attribute
from qexport.exporter.precision.lab import Lab, Question, open_lab
from qexport.exporter.precision.layers import correlation, estimate, measure_groups, open_probe, weight_bytes
from qexport.exporter.precision.regions import Region, label
from qexport.exporter.precision.yardstick import Score
from qexport.exporter.recipe import instantiate
from qexport.exporter.recipe_files import override
from qexport.passes.numbers.range import SQNR_KEY
from qexport.passes.pipeline import run
from qexport.runtime.profile import profile
from qexport.runtime.session import SessionOptions

RANGE_SAMPLES = 128  # from which the extremes of the activation groups are taken
FUSE_ATTENTION = "fuse-attention"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Measured(_Record):
    """Outputs against those of float.

    Attributes:
        error: Squared error over squared signal of the main output.
        sqnr: The same in dB.
        cosine_mean: Mean cosine over the samples.
        cosine_worst: The smallest.
        drop: Loss of the task metric, if the data carries labels.
    """

    error: float
    sqnr: float
    cosine_mean: float
    cosine_worst: float
    drop: float | None = None


class ActivationRow(Measured):
    """All activations in 8 bits but one group.

    Attributes:
        left_out: The group that stays in float.
        tensors: How many tensors it has.
    """

    left_out: str
    tensors: int


class LayerRow(Measured):
    """One layer alone quantized.

    Attributes:
        node: Its name.
        op: Its operator.
        estimate: The Fisher estimate of ``error``.
        layer_sqnr: SQNR of its own output, its input in float, in dB.
        bytes: Size of its float weight.
        share: Its share of the float model's time in onnxruntime on the CPU.
    """

    node: str
    op: str
    estimate: float | None
    layer_sqnr: float | None
    bytes: int
    share: float


class Sensitivity(_Record):
    """What was found.

    Attributes:
        schema_version: Version of this schema.
        model: The model that was asked about.
        target: Whose integers were tried.
        data: Where the samples came from.
        samples: How many.
        task: The metric that ``drop`` is of.
        activations: Leave-one-out by activation group; the first row leaves nothing out.
        layers: One row for each layer, the most sensitive first.
        correlation: Spearman's rank correlation between estimate and measurement over the layers.
        warnings: What is doubtful.
    """

    schema_version: Literal["qexport.sensitivity/1"] = Field("qexport.sensitivity/1", alias="schema")
    model: str
    target: str
    data: str
    samples: int
    task: str | None
    activations: tuple[ActivationRow, ...]
    layers: tuple[LayerRow, ...]
    correlation: float | None
    warnings: tuple[str, ...]

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        from qexport.exporter.report.notebook import sensitivity_html

        return sensitivity_html(self)


def analyse(question: Question) -> Sensitivity:
    """Measure activation groups and layers.

    Raises:
        UsageError: There is no calibration data, or nothing to quantize.
    """
    lab = open_lab(question)
    stages = question.options.progress
    with stages.stage("activations"):
        activations = activation_rows(lab)
    layers, agreement = layer_rows(lab, question)
    notes = [] if activations else ["there is no Softmax with products around it: activation groups were not measured"]
    return Sensitivity(
        schema="qexport.sensitivity/1",
        model=str(question.model),
        target=lab.target.name,
        data=lab.judge.data.name,
        samples=len(lab.excerpt.samples),
        task=None if lab.excerpt.task is None else lab.excerpt.task.name,
        activations=activations,
        layers=layers,
        correlation=agreement,
        warnings=(*lab.samples.warnings, *lab.product.warnings, *notes),
    )


def activation_rows(lab: Lab) -> tuple[ActivationRow, ...]:
    """The leave-one-out table; empty where the model has no attention."""
    model = decomposed(lab)
    groups = find_groups(model.graph)
    if len(groups) < 2 or lab.samples.calibration is None:
        return ()
    ranges = measure_ranges(model, groups, islice(lab.samples.calibration, RANGE_SAMPLES))
    rows = leave_one_out(model, groups, ranges, lab.excerpt, lab.target)
    return tuple(ActivationRow(left_out=row.name, tensors=row.tensors, **_numbers(row.score)) for row in rows)


def decomposed(lab: Lab) -> ir.Model:
    """The cleaned float model with attention in its parts, as engine builders see it."""
    recipe = lab.recipe
    if any(step.pass_ == FUSE_ATTENTION for step in recipe.step):
        recipe = override(recipe, [f"{FUSE_ATTENTION}.enabled=false"])
    steps = instantiate(recipe, {"data": lab.samples.calibration})
    model, _ = run(lab.source.model, [step for step in steps if step[1].exact and "data" not in step[1].options()])
    return model


def layer_rows(lab: Lab, question: Question) -> tuple[tuple[LayerRow, ...], float | None]:
    """Every layer quantized alone, and how well the estimate agrees."""
    assert lab.product.snapshot is not None
    model, stages = lab.product.snapshot.model, question.options.progress
    probe = open_probe(lab.product, lab.excerpt, lab.target)
    names = [port.node for port in probe.ports]
    with stages.stage("layers", len(lab.excerpt.samples)) as advance:
        scores = dict(zip(names, measure_groups(probe, [[name] for name in names], advance), strict=True))
    with stages.stage("estimate"):
        estimated = estimate(probe)
    with stages.stage("profile"):
        shares = time_shares(model, [Region((name,), ("",)) for name in names], lab)
    sizes, rated = weight_bytes(model, names), {node.name: node.meta.get(SQNR_KEY) for node in model.graph}
    rows = [
        LayerRow(
            node=port.node,
            op=port.op,
            estimate=estimated.get(port.node),
            layer_sqnr=rated[port.node],
            bytes=sizes[port.node],
            share=share,
            **_numbers(scores[port.node]),
        )
        for port, share in zip(probe.ports, shares, strict=True)
    ]
    agreement = correlation({name: score.error for name, score in scores.items()}, estimated)
    return tuple(sorted(rows, key=lambda row: -row.error)), agreement


def time_shares(model: ir.Model, layers: list[Region], lab: Lab) -> list[float]:
    """Share of the float model's time that each layer takes, with what follows from it up to the next one."""
    kernels = profile(lambda options: open_model(model, options), SessionOptions(threads=1), lab.batch)
    times = attribute(kernels, label(model.graph, layers), len(layers))
    whole = max(1e3 * sum(kernel.seconds for kernel in kernels), 1e-9)
    return [time / whole for time in times]


def _numbers(score: Score) -> dict[str, Any]:
    return {
        "error": score.error,
        "sqnr": score.sqnr,
        "cosine_mean": score.cosine_mean,
        "cosine_worst": score.cosine_worst,
        "drop": score.drop,
    }
