"""What lies between two sides: measurements, nodes, engines, and how both were made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field

from qexport.exporter.compare.metrics import METRICS, TASKS, Metric, incomparable, task_of
from qexport.exporter.compare.nodes import NodeChange, compare_nodes
from qexport.exporter.compare.sides import Side, open_side, side_of
from qexport.exporter.outcome.result import Result

_ENGINE = ("module", "version", "compute_capabilities", "profiles")
NO_GRAPHS = "graphs were not compared: a side has none"
_APART = (
    "latencies were measured in separate runs, maybe under different load: compare speedups, each of which was "
    "measured in turn with its own float model"
)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Change(_Record):
    """One number on both sides, ``None`` where it was not measured.

    Attributes:
        name: What a condition calls it.
        unit: Of the numbers and the difference.
        better: Which way is good; empty where that is a matter of taste.
        a: The first.
        b: The second.
        delta: The second minus the first; ``None`` where one is missing or they cannot be compared.
        percent: The same in percent of the first, where that is not zero.
        note: Why they cannot be compared.
    """

    name: str
    unit: str
    better: Literal["higher", "lower", ""]
    a: float | None
    b: float | None
    delta: float | None = None
    percent: float | None = None
    note: str = ""


class Fact(_Record):
    """Something told in words that is not the same; empty where a side does not have it."""

    name: str
    a: str
    b: str


class Diff(_Record):
    """All that differs between two sides.

    Attributes:
        a: What the first is called.
        b: What the second is called.
        metrics: Every number that at least one side has, equal ones too.
        nodes: Differences of the graphs, where both sides have one.
        engine: Differences of the engines.
        made: Differences of source, target, recipe, calibration data and tools.
        notes: What to mind when reading.
        failed: The conditions that were asked for and hold, each with its numbers.
    """

    schema_version: Literal["qexport.diff/1"] = Field("qexport.diff/1", alias="schema")
    a: str
    b: str
    metrics: tuple[Change, ...] = ()
    nodes: tuple[NodeChange, ...] = ()
    engine: tuple[Fact, ...] = ()
    made: tuple[Fact, ...] = ()
    notes: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether graphs, engines and making are equal, as far as both sides have them; measurements may differ."""
        return not (self.nodes or self.engine or self.made)

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        from qexport.exporter.report.notebook import table_html

        rows = [(change.name, change.unit, change.a, change.b, change.delta) for change in self.metrics]
        nodes = [(change.name, change.kind, change.a, change.b) for change in self.nodes]
        tables = [table_html(("", "unit", "A:", "B:", "B - A:"), rows)]
        return "".join([*tables, table_html(("node", "differs in", "A", "B"), nodes)] if nodes else tables)


def diff(a: Side | Result | str | Path, b: Side | Result | str | Path) -> Diff:
    """Hold two models or builds against each other; nothing is run.

    Args:
        a: The first: a folder that ``build`` or ``export`` wrote, an .onnx file, a ``result.json``, or a ``Result``.
        b: The second.

    Raises:
        QexportError: One cannot be read; see ``open_side``.
    """
    one, other = _side(a), _side(b)
    both = one.model is not None and other.model is not None
    nodes = compare_nodes(one.model, other.model) if one.model is not None and other.model is not None else ()
    metrics = tuple(_metrics(one, other))
    return Diff(
        schema="qexport.diff/1",
        a=one.path,
        b=other.path,
        metrics=metrics,
        nodes=tuple(nodes),
        engine=tuple(_engine(one.engine, other.engine)),
        made=tuple(_made(one, other)),
        notes=tuple(_notes(metrics, graphs=both)),
    )


def _side(given: Side | Result | str | Path) -> Side:
    if isinstance(given, Side):
        return given
    return side_of(given) if isinstance(given, Result) else open_side(given)


def _metrics(a: Side, b: Side) -> Iterator[Change]:
    for task, unit in TASKS.items():
        yield from _change(
            task, Metric(unit, "lower" if task == "perplexity" else "higher", partial(task_of, task)), a, b
        )
    for name, metric in METRICS.items():
        yield from _change(name, metric, a, b)


def _change(name: str, metric: Metric, a: Side, b: Side) -> Iterator[Change]:
    """One number, if a side has it; what is not finite counts as not measured."""
    one, other = (None if (found := metric.of(side)) is None else float(found) for side in (a, b))
    if one is None and other is None:
        return
    note = incomparable(name, a, b)
    delta = percent = None
    if one is not None and other is not None and not note and math.isfinite(other - one):
        delta = other - one
        percent = 100 * delta / abs(one) if one else None
    yield Change(
        name=name, unit=metric.unit, better=metric.better, a=one, b=other, delta=delta, percent=percent, note=note
    )


def _engine(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> Iterator[Fact]:
    one, other = ({} if side is None else {name: side.get(name) for name in _ENGINE} for side in (a, b))
    yield from _facts(one, other)


def _made(a: Side, b: Side) -> Iterator[Fact]:
    """How the sides were made, where both tell."""
    if a.result is not None and b.result is not None:
        yield from _facts(_making(a.result), _making(b.result))
        yield from _step_facts(_steps(a.result), _steps(b.result))
    if a.data and b.data:
        yield from _facts(*({"calibration data": side.data["calibration"]} for side in (a, b)))
    if a.tools and b.tools:
        yield from _facts(*({f"tool {name}": text for name, text in side.tools.items()} for side in (a, b)))
    if a.model is not None and b.model is not None:
        yield from _facts(*(_opsets(model) for model in (a.model, b.model)))


def _opsets(model: ir.Model) -> dict[str, object]:
    return {f"opset of {domain or 'onnx'}": version for domain, version in model.opset_imports.items()}


def _making(result: Result) -> dict[str, object]:
    found: dict[str, object] = {
        "qexport": result.version,
        "target": result.target,
        "source": result.source.digest,
    }
    for section, value in result.recipe.items():
        if section != "step":
            found |= _flat(f"recipe.{section}" if not isinstance(value, Mapping) else section, value)
    return found


def _steps(result: Result) -> dict[str, str]:
    """What ran, in order, with the options that were given; a pass that runs again has a number."""
    found: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for step in result.recipe.get("step", ()):
        if step.get("enabled", True):
            name = str(step.get("pass"))
            counts[name] += 1
            options = [f"{key}={value}" for key, value in step.items() if key not in ("pass", "enabled")]
            found[name if counts[name] == 1 else f"{name} ({counts[name]})"] = ", ".join(options)
    return found


def _step_facts(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Fact]:
    """Options that differ, what runs on one side alone, and the order of the rest."""
    both = a.keys() & b.keys()

    def told(side: Mapping[str, str]) -> dict[str, object]:
        alone = (f"{name} {{{options}}}" if options else name for name, options in side.items() if name not in both)
        return {
            **{f"step {name}": options or "defaults" for name, options in side.items() if name in both},
            "steps of this side alone": ", ".join(alone),
            "order of the others": ", ".join(name for name in side if name in both),
        }

    yield from _facts(told(a), told(b))


def _flat(name: str, value: object) -> dict[str, object]:
    """Tables with one key for each value."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {key: found for inner, entry in value.items() for key, found in _flat(f"{name}.{inner}", entry).items()}


def _facts(a: Mapping[str, object], b: Mapping[str, object]) -> Iterator[Fact]:
    for name in {**a, **b}:
        one, other = ("" if side.get(name) is None else str(side[name]) for side in (a, b))
        if one != other:
            yield Fact(name=name, a=one, b=other)


def _notes(metrics: tuple[Change, ...], *, graphs: bool) -> Iterator[str]:
    yield from dict.fromkeys(change.note for change in metrics if change.note)
    if any(change.name == "latency" and change.delta is not None for change in metrics):
        yield _APART
    if not graphs:
        yield NO_GRAPHS
