"""``qexport plan``: which layers to leave in float so that the result stays inside a budget, tried for real.

Layers go back to float in the order of what their error costs per share of time and size that float costs; points on
that road are built, judged on all evaluation data and timed; between the last one outside and the first one inside the
budget the road is halved a few times more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field

from qexport.errors import GateFailed, UsageError
from qexport.exporter.outcome.result import Latency, Quality
from qexport.exporter.precision.bench import BuildBench
from qexport.exporter.precision.lab import CHOOSERS, MIN_SQNR, Lab, Question
from qexport.exporter.precision.regions import find_units
from qexport.exporter.precision.sensitivity import LayerRow, layer_rows
from qexport.exporter.product import KEEP, Product
from qexport.exporter.proof.gates import check_gates
from qexport.exporter.steps import find_pass

SHARES = (0.5, 0.25, 0.1, 0.03)  # of the summed error: where the points between all int8 and all float lie
HALVINGS = 3
Unit = tuple[str, ...]
STEP = 1.03  # speeds closer than this are alike, and the smaller file wins


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Point(_Record):
    """One choice of layers, built and measured.

    Attributes:
        quantized: How many layers are in few bits.
        kept: How many are left in float.
        drop: Loss of the task metric, if the data carries labels.
        cosine_mean: Smallest mean cosine of any output; ``None`` where one holds NaN or infinity.
        cosine_worst: Smallest cosine of any sample at any output, likewise.
        bytes: Size of the model.
        milliseconds: Latency of a typical batch.
        speedup: Against the model as it came, paired.
        foreign: Whether the time is that of another runtime than the target's, and counts for nothing.
        fits: Whether it is inside the budget.
        pareto: Whether no other point is at least as good in quality, size and time, and better in one.
    """

    quantized: int
    kept: int
    drop: float | None
    cosine_mean: float | None
    cosine_worst: float | None
    bytes: int
    milliseconds: float
    speedup: float
    foreign: bool
    fits: bool
    pareto: bool = False

    @property
    def costs(self) -> tuple[float, int, float]:
        """What should be small: loss, size, time."""
        loss = self.drop
        if loss is None:
            loss = math.inf if self.cosine_mean is None else 1 - self.cosine_mean
        return loss, self.bytes, 0.0 if self.foreign else self.milliseconds


class Plan(_Record):
    """What was found.

    Attributes:
        schema_version: Version of this schema.
        model: The model that was asked about.
        target: Where it runs.
        data: What it was judged on.
        task: The metric that ``drop`` is of.
        budget: The gates that must hold.
        points: All points, most int8 first.
        chosen: Index of the one that the recipe holds.
        keep: Names of the layers it leaves in float.
        warnings: What is doubtful.
    """

    schema_version: Literal["qexport.plan/1"] = Field("qexport.plan/1", alias="schema")
    model: str
    target: str
    data: str
    task: str | None
    budget: dict[str, float]
    points: tuple[Point, ...]
    chosen: int
    keep: tuple[str, ...]
    warnings: tuple[str, ...]

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        from qexport.exporter.report.notebook import plan_html

        return plan_html(self)


@dataclass(slots=True)
class _Road:
    """Points on the way from all int8 to all float.

    Attributes:
        lab: The model.
        bench: What measures.
        order: Layers that go together, the first ones to go to float first.
        points: How many of ``order`` are in float to what was measured.
    """

    lab: Lab
    bench: BuildBench
    order: Sequence[Unit]
    points: dict[int, Point] = field(default_factory=dict)
    failure: GateFailed | None = None

    def fits(self, count: int) -> bool:
        """Build, judge and time the point with ``count`` units in float, once; whether it is inside the budget."""
        if count not in self.points:
            product = self.lab.product if count == 0 else self.bench.again(self.names(count))
            quality: Quality | None = None
            try:
                quality = self.bench.judge(product)
                check_gates(quality, self.lab.recipe.gates)
            except GateFailed as error:  # also from the judge, where the result is not finite
                self.failure = error
                fits = False
            else:
                fits = True
            latency = self.bench.time(product)
            assert latency is not None
            self.points[count] = _point(product, len(self.names(count)), quality, latency, fits=fits)
        return self.points[count].fits

    def names(self, count: int) -> tuple[str, ...]:
        """Names of the layers of the first ``count`` units."""
        return tuple(name for unit in self.order[:count] for name in unit)


def make_plan(question: Question, lab: Lab) -> Plan:
    """Measure layers, walk the road, choose.

    Raises:
        GateFailed: Not even float is inside the budget.
    """
    rows, _ = layer_rows(lab, question)
    assert lab.product.snapshot is not None
    units = find_units(lab.product.snapshot.model.graph, [row.node for row in rows])
    road = _Road(lab, lab.bench(question.options), order_units(rows, units))
    last = len(road.order)
    for count in (0, *milestones(rows, road.order), last):
        road.fits(count)
    _halve(road)
    inside = [count for count, point in road.points.items() if point.fits]
    if not inside:
        assert road.failure is not None
        raise GateFailed(
            f"{road.failure.what}, with all {len(rows)} layers in float",
            where=road.failure.where,
            hint="nothing was written; the budget is narrower than what the rest of the recipe costs",
        )
    chosen = choose({count: road.points[count] for count in inside})
    points = with_pareto([road.points[count] for count in sorted(road.points)])
    judge, gates = lab.judge, lab.recipe.gates
    return Plan(
        schema="qexport.plan/1",
        model=str(question.model),
        target=lab.target.name,
        data=judge.data.name,
        task=None if judge.task is None else judge.task.name,
        budget={name: value for name, value in gates.model_dump().items() if value is not None},
        points=tuple(points),
        chosen=sorted(road.points).index(chosen),
        keep=road.names(chosen),
        warnings=(*lab.samples.warnings, *lab.product.warnings),
    )


def order_units(rows: Sequence[LayerRow], units: Sequence[Unit]) -> list[Unit]:
    """The units in the order in which they go to float: what loses most for the least time and size first."""
    known = {row.node: row for row in rows}
    whole = max(sum(row.bytes for row in rows), 1)

    def worth(unit: Unit) -> float:
        cost = sum(known[name].share + known[name].bytes / whole for name in unit)
        return sum(known[name].error for name in unit) / (cost + 1 / len(rows))

    return sorted(units, key=worth, reverse=True)


def milestones(rows: Sequence[LayerRow], order: Sequence[Unit]) -> list[int]:
    """How many units are in float where the errors of the others add up to each of ``SHARES`` of what is finite."""
    error = {row.node: row.error for row in rows}
    whole = sum(number for number in error.values() if number < math.inf)
    parts = [sum(error[name] for name in unit) for unit in order]
    left = [sum(parts[count:]) for count in range(len(order) + 1)]
    found = {next(count for count, rest in enumerate(left) if rest <= share * whole + 1e-12) for share in SHARES}
    return sorted(found)


def _halve(road: _Road) -> None:
    """Look between the last point outside and the first one inside the budget that follows it."""
    for _ in range(HALVINGS):
        known = sorted(road.points)
        outside = max((count for count in known if not road.points[count].fits), default=-1)
        behind = [count for count in known if count > outside]
        if outside < 0 or not behind or behind[0] - outside < 2:
            return
        road.fits((outside + behind[0]) // 2)


def choose(points: dict[int, Point]) -> int:
    """Of points inside the budget, the fastest where the time counts; the smallest of those that are alike."""

    def key(count: int) -> tuple[int, int, int]:
        point = points[count]
        speed = 0 if point.foreign else round(math.log(max(point.speedup, 1e-6)) / math.log(STEP))
        return -speed, point.bytes, count

    return min(points, key=key)


def with_pareto(points: Sequence[Point]) -> list[Point]:
    """The points, each with whether another one beats it; what is not finite is beaten by anything."""
    beaten = (p.cosine_mean is None or any(_beats(other, p) for other in points) for p in points)
    return [point.model_copy(update={"pareto": not lost}) for point, lost in zip(points, beaten, strict=True)]


def _beats(one: Point, other: Point) -> bool:
    return one.costs != other.costs and all(a <= b for a, b in zip(one.costs, other.costs, strict=True))


def _point(product: Product, kept: int, quality: Quality | None, latency: Latency, *, fits: bool) -> Point:
    return Point(
        quantized=len(product.quantized),
        kept=kept,
        drop=None if quality is None or quality.task is None else quality.task.drop,
        cosine_mean=None if quality is None else quality.least_mean,
        cosine_worst=None if quality is None else quality.least,
        bytes=ir.to_proto(product.model).ByteSize(),
        milliseconds=latency.result_ms,
        speedup=latency.speedup,
        foreign=latency.foreign,
        fits=fits,
    )


def recipe_document(lab: Lab, plan: Plan, extends: str) -> dict[str, Any]:
    """The plan as a recipe that extends the one it was made for; every quantizing step gets its own names."""
    mine = _by_step(lab.product, set(plan.keep))
    steps: list[dict[str, Any]] = []
    number = -1
    for step in lab.recipe.step:
        number += step.enabled
        cls = find_pass(step.pass_, lab.recipe.name)
        if step.pass_ in CHOOSERS:
            steps.append({"pass": step.pass_, "enabled": False})
        if not cls.quantizes:
            continue
        told: dict[str, Any] = {"pass": step.pass_}
        if step.enabled and MIN_SQNR in cls.options():
            told[MIN_SQNR] = 0.0
        if step.enabled and KEEP in cls.options():
            told[KEEP] = [*step.options.get(KEEP, ()), *mine.get(number, ())]
        steps.append(told)
    return {
        "description": f"{lab.recipe.name} with {len(plan.keep)} layers in float, planned for {plan.target}",
        "extends": extends,
        "step": steps,
        "export": {"target": plan.target, "never_worse": False},
        "gates": dict(plan.budget),
    }


def _by_step(product: Product, keep: set[str]) -> dict[int, list[str]]:
    """Per pass of the product, the names among ``keep`` that it would have quantized."""
    return {
        number: [d.node for d in step.decisions if d.action == "quantized" and d.node in keep]
        for number, step in enumerate(product.steps)
    }


def with_budget(question: Question, max_drop: float | None, min_cosine: float | None) -> Question:
    """The question with the budget among its options.

    Raises:
        UsageError: There is no budget, or it is no number that could hold.
    """
    if max_drop is None and min_cosine is None:
        raise UsageError("no budget", hint="give --max-drop POINTS with labelled --eval data, or --min-cosine")
    settings = question.options.set if min_cosine is None else (*question.options.set, f"gates.min_cosine={min_cosine}")
    return replace(question, options=replace(question.options, set=settings, max_drop=max_drop))
