"""Plots of the whole model: before and after in a few strokes, quality against cost, the roofline, samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from qexport.exporter.outcome.result import Latency, StepInfo
from qexport.exporter.report.html.svg import (
    Axis,
    Scale,
    axes,
    bar,
    covering,
    covering_log,
    dot,
    join,
    legend,
    line,
    linked,
    picture,
    rule,
    text,
    titled,
)
from qexport.exporter.report.html.words import fixed, middle, number, si
from qexport.exporter.report.values import Dot, Point, Roofline

WIDE, HALF, CARD, SPARK = 1200, 590, 400, 240  # widths of pictures
FLAT = 1e-3  # least span of cosines, of which four digits are told


def spark_steps(steps: Sequence[StepInfo]) -> Markup:
    """The seconds of all steps as one bar in pieces; empty where they took none."""
    whole = sum(step.seconds for step in steps)
    marks, start = [bar(0, 10, (SPARK, 10), "quiet")], 0.0
    for step in steps if whole > 0 else ():
        width = SPARK * step.seconds / whole
        title = f"{middle(step.name, 40)}: {number(step.seconds)} s"
        marks += [titled(bar(start, 10, (width, 10), "a"), title)] if width >= 1 else []
        start += width
    return picture((SPARK, 30), "share of each step in the time", marks, "spark") if whole > 0 else Markup("")


def spark_size(before: int, after: int) -> Markup:
    """Both sizes as bars."""
    largest = max(before, after, 1)
    marks = (bar(0, 4, (SPARK * before / largest, 8), "quiet"), bar(0, 18, (SPARK * after / largest, 8), "a"))
    return picture((SPARK, 30), f"{before} bytes before, {after} after", marks, "spark")


def spark_speed(latency: Latency) -> Markup:
    """The speed over float with its interval, beside the line where both are equal."""
    low, high = latency.speedup_low, latency.speedup_high
    x = covering((low, high, latency.speedup, 1.0), (2, SPARK - 2), zero=True)
    even = x.at(1)
    marks = (
        rule((x.at(0), 18), (x.at(x.domain[1]), 18), "axis"),
        rule((even, 2), (even, 18), "guide"),
        rule((x.at(low), 9), (x.at(high), 9), "trace-a"),
        dot(x.at(latency.speedup), 9, "a"),
        text(even, 29, "float", "tick", "middle"),
    )
    return picture((SPARK, 30), f"{low:.2f} to {high:.2f} times the speed; the line is float", marks, "spark")


def spark_deciles(deciles: Sequence[float]) -> Markup:
    """Tenths of the samples by their cosine, from the worst to the best; empty without any."""
    known = [value for value in deciles if math.isfinite(value)]
    if not known:
        return Markup("")
    x = Scale("linear", (min(known), max(known)), (2, SPARK - 2))
    marks = [rule((2, 18), (SPARK - 2, 18), "axis"), *(rule((x.at(v), 5), (x.at(v), 18), "trace-a") for v in known)]
    marks.append(text(0, 29, f"{min(known):.4f}", "tick"))
    marks.append(text(SPARK, 29, f"cosine of samples  {max(known):.4f}", "tick", "end"))
    title = f"tenths of the samples by cosine, {min(known):.4f} to {max(known):.4f}"
    return picture((SPARK, 30), title, marks, "spark")


def plot_deciles(deciles: Sequence[float]) -> Markup:
    """Cosine to float by the share of samples that are worse."""
    if len(deciles) < 2 or not all(map(math.isfinite, deciles)):
        return Markup("")
    x = Scale("linear", (0, 100), (58, CARD - 12))
    y = covering([*deciles, max(deciles) - FLAT], (150, 26))
    shares = [100 * i / (len(deciles) - 1) for i in range(len(deciles))]
    places = [(x.at(share), y.at(value)) for share, value in zip(shares, deciles, strict=True)]
    marks = [axes(Axis(x, "samples that are worse, %", 5), Axis(y, "cosine", 5, _cosine)), line(places, "trace-a")]
    marks += [
        titled(dot(*place, "a", size=3), f"{share:.0f} % of the samples are below {value:.4f}")
        for place, share, value in zip(places, shares, deciles, strict=True)
    ]
    return picture((CARD, 190), "Cosine to float by share of samples", marks)


def _cosine(value: float) -> str:
    return fixed(value, 4).rstrip("0").rstrip(".") or "0"


def plot_pareto(points: Sequence[Point], cost: str, gate: float | None) -> Markup:
    """Loss against ``cost``, which is ``size`` or ``latency``; lower left is better. Empty without two points."""
    value, label = COSTS[cost]
    placed = [(x, p.loss, p) for p in points if p.loss is not None and (x := value(p)) is not None]
    if len(placed) < 2:
        return Markup("")
    x_scale = covering([x for x, _, _ in placed], (60, HALF - 16))
    y_scale = covering([loss for _, loss, _ in placed], (280, 34))
    unit = placed[0][2].unit
    marks = [axes(Axis(x_scale, label), Axis(y_scale, f"loss, {middle(unit, 40)}"))]
    if gate is not None and y_scale.domain[0] <= gate <= y_scale.domain[1]:
        level = y_scale.at(gate)
        marks.append(rule((60, level), (HALF - 16, level), "guide"))
        marks.append(text(HALF - 18, level - 5, f"gate {gate:g}", "tick", "end"))
    front = _front([(x, loss) for x, loss, p in placed if p.measured])
    marks.append(line([(x_scale.at(x), y_scale.at(loss)) for x, loss in front], "front"))
    for x, loss, point in sorted(placed, key=lambda entry: entry[2].chosen):
        marks.append(_point(x_scale.at(x), y_scale.at(loss), point))
    return picture((HALF, 320), f"Loss against {cost}", marks)


COSTS: dict[str, tuple[Callable[[Point], float | None], str]] = {
    "size": (lambda point: point.bytes / 1e6, "model, MB"),
    "latency": (lambda point: point.ms, "one call, ms"),
}


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the stairs under which there is no point, from the cheapest on."""
    corners: list[tuple[float, float]] = []
    for x, loss in sorted(points):
        if not corners:
            corners.append((x, loss))
        elif loss < corners[-1][1]:
            corners += [(x, corners[-1][1]), (x, loss)]
    return corners


def _point(x: float, y: float, point: Point) -> Markup:
    shape = "circle" if point.fits else "cross"
    css = ("a" if point.fits else "stroke-b") if point.measured else ("hollow" if point.fits else "stroke-soft")
    mark = dot(x, y, css, shape, 5)
    if point.chosen:
        left = x > HALF * 0.6
        mark += dot(x, y, "ring", size=9)
        level = y + 23 if y < 70 else y - 14  # clear of the label of the axis
        mark += text(x + (-8 if left else 8), level, middle(point.label, 28), "name", "end" if left else "start")
    kind = "measured" if point.measured else "estimated"
    facts = [f"loss {number(point.loss)} {point.unit}", f"{point.bytes / 1e6:.3g} MB"]
    facts += [f"{number(point.ms)} ms"] if point.ms is not None else []
    return titled(mark, f"{middle(point.label, 60)}, {kind}: {', '.join(facts)}")


def pareto_legend() -> Markup:
    """What the marks of both plots mean."""
    return legend(
        (
            (dot(7, 7, "ring", size=6) + dot(7, 7, "a", size=3.5), "published"),
            (dot(7, 7, "a"), "built and measured"),
            (dot(7, 7, "stroke-b", "cross"), "outside the gates"),
            (dot(7, 7, "hollow"), "estimated"),
            (line([(0, 3), (6, 3), (6, 11), (14, 11)], "front"), "nothing measured is below this line"),
        )
    )


def plot_roofline(roof: Roofline, rows: dict[str, int]) -> Markup:
    """Rate of each operator by its intensity, under what the machine can do; larger marks take more time."""
    dots = [d for d in roof.dots if 0 < d.intensity < math.inf and 0 < d.rate < math.inf]
    if not dots or not (roof.flops > 0 and roof.memory > 0):
        return Markup("")
    peaks = [("float", roof.flops, "roof"), ("8 bits", roof.flops_int8 or 0.0, "roof-8")]
    ridges = [peak / roof.memory for _, peak, _ in peaks if peak]
    x = covering_log([*(d.intensity for d in dots), *ridges], (64, WIDE - 106), 2)
    y = covering_log([*(d.rate for d in dots), *(peak for _, peak, _ in peaks)], (330, 30), 1.8)
    marks = [axes(Axis(x, "operations per byte", 9), Axis(y, "operations per second", 9, si))]
    marks += [_roof(x, y, roof.memory, peak) for peak in peaks if peak[1]]
    marks.append(_memory(x, y, roof.memory, max(peak for _, peak, _ in peaks)))
    longest = max(d.ms for d in dots) or 1.0
    marks += [_operator(d, x, y, longest, rows.get(d.node)) for d in sorted(dots, key=lambda d: -d.ms)]
    entries = (
        (dot(7, 7, "stroke-b", "diamond"), "float model"),
        (dot(7, 7, "a see"), "result"),
        (rule((0, 7), (14, 7), "roof"), "peak in float"),
        (rule((0, 7), (14, 7), "roof-8"), "peak in 8 bits"),
    )
    return legend(entries) + picture((WIDE, 370), "Roofline of the machine with every operator", marks)


def _roof(x: Scale, y: Scale, memory: float, peak: tuple[str, float, str]) -> Markup:
    """The flat part from the ridge on, and the slope up to it where it can be seen."""
    words, height, css = peak
    ridge = max(height / memory, x.domain[0])
    path = [(x.at(ridge), y.at(height)), (x.range[1], y.at(height))]
    label = text(x.range[1] + 8, y.at(height) + 4, f"{words}: {si(height)}/s", "label")
    return line(path, css) + label


def _memory(x: Scale, y: Scale, memory: float, peak: float) -> Markup:
    """The slope that the memory's speed allows, from the first place inside the picture to the highest roof."""
    first = max(x.domain[0], y.domain[0] / memory)
    last = min(x.domain[1], peak / memory)
    if last <= first:
        return Markup("")
    start, stop = (x.at(first), y.at(first * memory)), (x.at(last), y.at(last * memory))
    middle_of = (start[0] * 0.4 + stop[0] * 0.6 - 10, start[1] * 0.4 + stop[1] * 0.6 - 4)
    return line([start, stop], "roof") + text(*middle_of, f"memory: {si(memory)}B/s", "label", "end")


def _operator(found: Dot, x: Scale, y: Scale, longest: float, row: int | None) -> Markup:
    size = 2.5 + 7.5 * math.sqrt(max(found.ms, 0.0) / longest)
    shape, css = ("diamond", "stroke-b") if found.model == "float" else ("circle", "a see")
    title = f"{middle(found.node, 70)}, {found.model}: {number(found.ms)} ms, {si(found.rate)}/s"
    return linked(join([dot(x.at(found.intensity), y.at(found.rate), css, shape, size)]), row, title)
