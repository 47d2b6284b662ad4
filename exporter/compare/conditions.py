"""Conditions on a diff, such as ``spearman<-0.2`` or ``latency>+3%``: where one holds, the comparison fails."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass

from qexport.errors import GateFailed, UsageError
from qexport.exporter.compare.changes import Change, Diff
from qexport.exporter.compare.metrics import METRICS, TASKS
from qexport.exporter.steps import suggest

_FORM = re.compile(r"\s*([A-Za-z]\w*)\s*(<=|>=|<|>)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(%?)\s*", re.ASCII)
_OPERATORS = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge}
_EXAMPLES = (
    "write METRIC<NUMBER or METRIC>NUMBER about the second minus the first, such as 'spearman<-0.2' or 'latency>+3%'"
)


@dataclass(frozen=True)
class Condition:
    """A bound on how much a number may change from the first side to the second.

    Attributes:
        metric: Its name.
        op: ``<``, ``>``, ``<=`` or ``>=``.
        bound: What the change is compared with.
        percent: Whether in percent of the first side.
        text: As it was written.
    """

    metric: str
    op: str
    bound: float
    percent: bool
    text: str


def parse(text: str) -> Condition:
    """Read a condition; ``UsageError`` where it has another form, or names no metric."""
    match = _FORM.fullmatch(text)
    where = f"--fail-if {text[:200]}"
    if match is None or not math.isfinite(float(match[3])):
        raise UsageError("not a condition", where=where, hint=_EXAMPLES)
    metric, op, bound, percent = match.groups()
    if metric not in METRICS and metric not in TASKS:
        raise UsageError(f"no metric called {metric!r}", where=where, hint=suggest(metric, {*METRICS, *TASKS}))
    return Condition(metric, op, float(bound), bool(percent), text.strip())


def hold(found: Diff, conditions: Iterable[Condition]) -> Diff:
    """Hold the conditions against a diff; those that fail are in the ``failed`` of what is returned.

    Raises:
        UsageError: A number was not measured on both sides, or cannot be compared: that is no pass.
    """
    changes = {change.name: change for change in found.metrics}
    told = [line for condition in conditions if (line := _broken(condition, changes.get(condition.metric)))]
    return found.model_copy(update={"failed": tuple(told)})


def check(found: Diff, conditions: Iterable[Condition]) -> None:
    """The same, with ``GateFailed`` where conditions fail."""
    if failed := hold(found, conditions).failed:
        raise GateFailed("; ".join(failed), where=f"{found.a} -> {found.b}")


def _broken(condition: Condition, change: Change | None) -> str:
    """What fails, or nothing."""
    where = f"--fail-if {condition.text}"
    if change is None or change.a is None or change.b is None:
        side = "either side" if change is None else f"the {'first' if change.a is None else 'second'} side"
        hint = "compare folders that qexport build wrote with --eval, or leave the condition out"
        raise UsageError(f"{condition.metric} was not measured on {side}", where=where, hint=hint)
    if change.delta is None:
        raise UsageError(f"{condition.metric} cannot be compared: {change.note or 'it is not finite'}", where=where)
    value = change.percent if condition.percent else change.delta
    if value is None:
        raise UsageError(f"{condition.metric} is 0 on the first side, of which there is no percentage", where=where)
    if not _OPERATORS[condition.op](value, condition.bound):
        return ""
    unit = "%" if condition.percent else f" {change.unit}".rstrip()
    return f"{condition.text}: {change.a:.6g} -> {change.b:.6g}, a change of {value:+.6g}{unit}"
