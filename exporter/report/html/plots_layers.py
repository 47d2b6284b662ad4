"""Plots of single layers: noise along the graph, errors one by one, what activations and weights are made of."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby

from markupsafe import Markup

from qexport.exporter.report.html.shown import Shown
from qexport.exporter.report.html.svg import (
    Axis,
    Scale,
    axes,
    bar,
    box,
    covering,
    dot,
    join,
    legend,
    line,
    linked,
    picture,
    rule,
    step,
    text,
    titled,
)
from qexport.exporter.report.html.words import fixed, middle, number, percent
from qexport.exporter.report.values import Activation, Candidate, Node, Weights

WIDE, CARD = 1200, 400  # widths of pictures
BARS = 24  # layers of the tornado
AUDIBLE = 20.0  # dB at which the noise has 1 % of the signal's power
CHARACTER = 6.7  # width of one in a label

Row = tuple[int, Node]


def plot_sqnr(shown: Shown) -> Markup:
    """Noise of each layer alone and with all before it, in the order of the graph; empty where nothing is known."""
    layers = [(number, node) for number, node in shown.nodes if _rated(node) or _left(node)]
    values = [value for _, node in layers for value in (node.sqnr_own, node.sqnr) if value is not None]
    if not values:
        return Markup("")
    y = covering(values, (250, 34))
    x = Scale("linear", (-0.5, len(layers) - 0.5), (52, WIDE - 12))
    size = min(4.5, max(1.5, 0.35 * (x.at(1) - x.at(0))))
    marks = [_bands(layers, x, y), axes(Axis(x, "", 0), Axis(y, "SQNR, dB"))]
    if y.domain[0] < AUDIBLE < y.domain[1]:
        level = y.at(AUDIBLE)
        marks.append(
            titled(rule((52, level), (WIDE - 12, level), "guide"), "20 dB: the noise has 1 % of the signal's power")
        )
        marks.append(text(WIDE - 14, level - 5, "noise: 1 % of the power", "tick", "end"))
    together = [(x.at(i), y.at(n.sqnr)) for i, (_, n) in enumerate(layers) if n.sqnr is not None]
    marks.append(line(together, "trace-b"))
    marks += [_layer_marks(x.at(i), y, row, size) for i, row in enumerate(layers)]
    return _sqnr_legend([node for _, node in layers]) + picture(
        (WIDE, 280), "SQNR of each layer, in the order of the graph", marks
    )


def _rated(node: Node) -> bool:
    return node.sqnr is not None or node.sqnr_own is not None


def _left(node: Node) -> bool:
    return node.state in {"kept", "backed off"} and bool(node.weight)


def _layer_marks(x: float, y: Scale, row: Row, size: float) -> Markup:
    place, node = row
    name = middle(node.name, 80)
    marks = []
    if _left(node):
        marks.append(linked(dot(x, y.range[0] - 6, "hollow", "square", size * 0.8), place, f"{name}: {node.state}"))
    if node.sqnr is not None:
        title = f"{name}: {fixed(node.sqnr, 1)} dB with all before it"
        marks.append(linked(dot(x, y.at(node.sqnr), "b", "diamond", size * 0.9), place, title))
    if node.sqnr_own is not None:
        would = ", were it in few bits" if _left(node) else ""
        title = f"{name}: {fixed(node.sqnr_own, 1)} dB alone{would}"
        marks.append(linked(dot(x, y.at(node.sqnr_own), "a", "circle", size), place, title))
    return join(marks)


def _sqnr_legend(nodes: Sequence[Node]) -> Markup:
    """What the marks mean that there are."""
    together = rule((0, 7), (14, 7), "trace-b") + dot(7, 7, "b", "diamond")
    entries = (
        (any(n.sqnr_own is not None for n in nodes), dot(7, 7, "a"), "this layer alone"),
        (any(n.sqnr is not None for n in nodes), together, "with the noise of all layers before it"),
        (any(map(_left, nodes)), dot(7, 7, "hollow", "square", 3.5), "left in float"),
    )
    return legend((mark, told) for drawn, mark, told in entries if drawn)


def stage(name: str) -> tuple[str, str]:
    """The part of the model that a node is in, up to the first number in its name, and a short label of it."""
    parts = [part for part in re.split(r"[/.]", name) if part] or [""]
    place = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    return "/".join(parts[: place + 1]), ".".join(parts[max(place - 1, 0) : place + 1])


def _bands(layers: Sequence[Row], x: Scale, y: Scale) -> Markup:
    """Every other part of the model shaded, with labels where there is room."""
    found, start = [], 0
    for _, group in groupby(layers, key=lambda row: stage(row[1].name)[0]):
        members = list(group)
        found.append((start, start + len(members), stage(members[0][1].name)[1]))
        start += len(members)
    marks, floor, top = [], y.range[0], y.range[1]
    for i, (first, last, label) in enumerate(found if len(found) <= len(layers) / 2 else ()):
        left, right = x.at(first - 0.5), x.at(last - 0.5)
        marks += [bar(left, top, (right - left, floor - top), "band")] if i % 2 else []
        room = int((right - left) / CHARACTER)
        if len(label) <= room or room >= 12:
            marks.append(text((left + right) / 2, floor + 17, middle(label, room), "tick", "middle"))
    return join(marks)


def plot_tornado(shown: Shown) -> Markup:
    """The error of the model's output with one layer alone in few bits, largest first; empty where nothing is known."""
    rated = [(i, node, error) for i, node in shown.nodes if (error := node.error) is not None and math.isfinite(error)]
    if not rated:
        return Markup("")
    rated.sort(key=lambda entry: -entry[2])
    whole = sum(error for _, _, error in rated) or 1.0
    x = Scale("linear", (0.0, rated[0][2] or 1.0), (452, WIDE - 150))
    marks = []
    for i, (place, node, error) in enumerate(rated[:BARS]):
        top, stays = 6 + 22 * i, node.state in {"kept", "backed off", "float"}
        words = (
            text(440, top + 12, middle(node.name, 60), "name", "end")
            + bar(452, top, (x.at(error) - 452, 15), "b" if stays else "a")
            + text(x.at(error) + 8, top + 12, f"{number(error, 2)}  ·  {percent(error / whole)}", "tick")
        )
        marks.append(linked(words, place, f"{middle(node.name, 80)}: {node.state}"))
    height = 12 + 22 * len(marks)
    if len(rated) > BARS:
        rest = sum(error for _, _, error in rated[BARS:])
        marks.append(text(452, height + 8, f"{len(rated) - BARS} more: {percent(rest / whole)} together", "tick"))
        height += 20
    entries = ((bar(1, 3, (12, 8), "a"), "in few bits"), (bar(1, 3, (12, 8), "b"), "left in float"))
    return legend(entries) + picture((WIDE, height), "Error of each layer alone", marks)


def plot_histogram(activation: Activation) -> Markup:
    """Values seen at a tensor, on a logarithmic height, over the ranges that each method would take."""
    if len(activation.edges) < 2 or len(activation.edges) != len(activation.counts) + 1:
        return Markup("")
    ends = [*activation.edges, *(end for c in activation.candidates for end in (c.low, c.high))]
    x = Scale("linear", (min(ends), max(ends)), (74, CARD - 124))
    floor, top = 100.0, 12.0
    peak = math.log1p(max(activation.counts) or 1)
    heights = [floor - (floor - top) * math.log1p(count) / peak for count in activation.counts]
    edges = [x.at(edge) for edge in activation.edges]
    marks = [step(edges, heights, floor, "hist")]
    chosen = activation.candidates[0] if activation.candidates else None
    if chosen is not None:
        marks += _cut(activation, chosen, edges, heights, floor)
        marks += [rule((x.at(end), top - 6), (x.at(end), floor), "chosen") for end in (chosen.low, chosen.high)]
    marks.append(axes(Axis(x, "", 4), Axis(Scale("linear", (0, 1), (floor, top)), "", 0)))
    lanes = activation.candidates
    if lanes:
        heads = ((CARD - 58, "clipped"), (CARD - 2, "noise"))
        marks += [text(place, 134, words, "label", "end") for place, words in heads]
    marks += [_lane(candidate, x, 150 + 16 * i, chosen=not i) for i, candidate in enumerate(lanes)]
    return picture((CARD, 142 + 16 * len(lanes)), f"Histogram of {middle(activation.value, 60)}", marks)


def _cut(
    activation: Activation, chosen: Candidate, edges: list[float], heights: list[float], floor: float
) -> list[Markup]:
    """The bins outside the chosen range."""
    middles = [(a + b) / 2 for a, b in zip(activation.edges, activation.edges[1:], strict=False)]
    first = sum(place < chosen.low for place in middles)
    last = len(middles) - sum(place > chosen.high for place in middles)
    parts = ((edges[: first + 1], heights[:first]), (edges[last:], heights[last:]))
    return [step(places, tops, floor, "cut") for places, tops in parts if tops]


def _lane(candidate: Candidate, x: Scale, y: float, *, chosen: bool) -> Markup:
    """One method: its range on the scale of the histogram, what it clips, how much noise it makes."""
    low, high, css = x.at(candidate.low), x.at(candidate.high), "chosen" if chosen else "lane"
    ends = join(rule((end, y - 4), (end, y + 4), css) for end in (low, high))
    words = "label" if chosen else "tick"
    marks = (
        text(66, y + 4, middle(candidate.method, 10), words, "end"),
        rule((low, y), (high, y), css),
        ends,
        text(CARD - 58, y + 4, percent(candidate.clipped), words, "end"),
        text(CARD - 2, y + 4, number(candidate.noise, 2), words, "end"),
    )
    return titled(join(marks), f"{candidate.method}: {number(candidate.low)} to {number(candidate.high)}")


def plot_boxes(weights: Weights, channels: int) -> Markup:
    """The channels with the largest values, with the maximum of a typical channel as dashed lines."""
    shown = [c for c in weights.worst if all(map(math.isfinite, (c.low, c.q25, c.q50, c.q75, c.high)))][:channels]
    if not shown:
        return Markup("")
    y = covering([value for c in shown for value in (c.low, c.high)], (140, 22))
    x = Scale("linear", (-0.5, max(len(shown), 12) - 0.5), (46, CARD - 4))
    typical = weights.spread[2] if len(weights.spread) == 5 else math.inf
    marks = [axes(Axis(x, "", 0), Axis(y, "", 5))]
    levels = [y.at(level) for level in (-typical, typical) if y.domain[0] < level < y.domain[1]]
    marks += [rule((46, level), (CARD - 4, level), "guide") for level in levels]
    for i, channel in enumerate(shown):
        five = [y.at(v) for v in (channel.low, channel.q25, channel.q50, channel.q75, channel.high)]
        title = f"channel {channel.index}: {number(channel.low)} to {number(channel.high)}"
        marks.append(titled(box(x.at(i), 6.5, five, "box"), title))
    marks.append(text(x.range[0], 157, f"channel {shown[0].index}", "tick"))
    marks.append(text(x.range[1], 157, f"{len(shown)} channels, the largest first", "tick", "end"))
    return picture((CARD, 164), f"Largest channels of {middle(weights.node, 60)}", marks)
