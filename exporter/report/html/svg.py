"""Scales, axes and marks of plots: pure functions from numbers to SVG.

Geometry stands in attributes and looks are classes of the style sheet, so a plot follows the page into dark mode and
onto paper. A mark that belongs to a node is a link to its row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from qexport.exporter.report.html import words

Place = tuple[float, float]  # x to the right, y down, in units of the picture
MANTISSAS = (1, 2, 5)
ENDS = 1e-9  # share of the span by which a tick may miss the end it stands for


@dataclass(frozen=True, slots=True)
class Scale:
    """From numbers to places: ``domain`` is mapped to ``range``, and what lies outside to its ends.

    Both ends of the domain are finite, the first is the smaller one, and both are positive where ``kind`` is ``log``.
    """

    kind: Literal["linear", "log"]
    domain: Place
    range: Place

    def at(self, value: float) -> float:
        """The place of ``value``."""
        low, high = (self._bent(end) for end in self.domain)
        share = (self._bent(value) - low) / (high - low) if high > low else 0.5
        start, stop = self.range
        return start + min(max(share, 0.0), 1.0) * (stop - start)

    def ticks(self, count: int = 6) -> tuple[float, ...]:
        """About ``count`` round numbers inside the domain, ascending: 1, 2 or 5 times a power of ten."""
        if self.kind == "log":
            return _log_ticks(*self.domain, count)
        low, high = self.domain
        return _multiples(low, high, *_step(low, high, count)) if high > low else (low,)

    def _bent(self, value: float) -> float:
        return value if self.kind == "linear" else math.log10(max(value, self.domain[0]))


def _step(low: float, high: float, count: int) -> tuple[int, int]:
    """Mantissa and exponent of the smallest round step of which at most ``count`` fit between both ends."""
    rough = (high - low) / max(count, 1)
    exponent = math.floor(math.log10(rough))
    base = rough / 10**exponent
    return next(((m, exponent) for m in MANTISSAS if m >= base * (1 - ENDS)), (1, exponent + 1))


def _multiples(low: float, high: float, mantissa: int, exponent: int) -> tuple[float, ...]:
    """Every multiple of the step inside; each is the number that its digits say."""
    step, slack = float(f"{mantissa}e{exponent}"), (high - low) * ENDS
    first, last = math.ceil((low - slack) / step), math.floor((high + slack) / step)
    found = (float(f"{i * mantissa}e{exponent}") for i in range(first, last + 1))
    return tuple(dict.fromkeys(min(max(tick, low), high) for tick in found))


def _log_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    """Powers of ten, some left out where there are many; with their 2 and 5 where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first + 1) / max(count, 1)))
    mantissas = MANTISSAS if math.log10(high / low) * len(MANTISSAS) <= count else MANTISSAS[:1]
    found = (float(f"{m}e{e}") for e in range(first, last + 1) if e % stride == 0 for m in mantissas)
    return tuple(tick for tick in found if low <= tick <= high)


def covering(values: Iterable[float], span: Place, *, zero: bool = False) -> Scale:
    """A linear scale over round numbers that holds all finite values, and 0 where asked."""
    known = [value for value in values if math.isfinite(value)] + ([0.0] if zero else [])
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if not high - low > 1e-12 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    mantissa, exponent = _step(low, high, 5)
    step = float(f"{mantissa}e{exponent}")
    ends = math.floor(low / step + ENDS), math.ceil(high / step - ENDS)
    return Scale("linear", (float(f"{ends[0] * mantissa}e{exponent}"), float(f"{ends[1] * mantissa}e{exponent}")), span)


def covering_log(values: Iterable[float], span: Place, room: float = 1.5) -> Scale:
    """A logarithmic scale that holds all positive finite values, and ``room`` times as much at both ends."""
    known = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
    return Scale("log", (min(known) / room, max(known) * room), span)


def num(value: float) -> str:
    """A coordinate with at most one digit behind the point."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def join(marks: Iterable[Markup]) -> Markup:
    """Marks in a row."""
    return Markup("").join(marks)


def bar(x: float, y: float, size: Place, css: str) -> Markup:
    """A rectangle of ``size``; one that is too thin to be seen is drawn half a unit wide."""
    width, height = (num(max(side, 0.5)) for side in size)
    return Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"/>').format(css, num(x), num(y), width, height)


def rule(start: Place, stop: Place, css: str) -> Markup:
    """A straight line."""
    ends = [num(value) for value in (*start, *stop)]
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(css, *ends)


def line(points: Sequence[Place], css: str, *, closed: bool = False) -> Markup:
    """A line through ``points``; a closed one is an area."""
    if not points:
        return Markup("")
    path = "M" + "L".join(f"{num(x)} {num(y)}" for x, y in points) + ("Z" if closed else "")
    return Markup('<path class="{}" d="{}"/>').format(css, path)


def step(edges: Sequence[float], heights: Sequence[float], floor: float, css: str) -> Markup:
    """The area of a histogram: ``heights[i]`` between ``edges[i]`` and ``edges[i + 1]``, all as places."""
    points = [(edges[0], floor)] if heights else []
    for left, right, height in zip(edges, edges[1:], heights, strict=False):
        points += [(left, height), (right, height)]
    return line([*points, (points[-1][0], floor)] if points else [], css, closed=True)


def box(x: float, width: float, heights: Sequence[float], css: str) -> Markup:
    """A box of quartiles with whiskers to the extremes; ``heights`` are the places of the five, lowest first."""
    low, q25, q50, q75, high = heights
    return join(
        (
            rule((x, low), (x, high), "whisker"),
            bar(x - width / 2, q75, (width, q25 - q75), css),
            rule((x - width / 2, q50), (x + width / 2, q50), "median"),
        )
    )


def dot(x: float, y: float, css: str, shape: str = "circle", size: float = 4) -> Markup:
    """A mark: ``circle``, ``diamond``, ``square`` or ``cross``; shapes tell series apart where colours do not."""
    if shape == "circle":
        return Markup('<circle class="{}" cx="{}" cy="{}" r="{}"/>').format(css, num(x), num(y), num(size))
    if shape == "square":
        return bar(x - size, y - size, (2 * size, 2 * size), css)
    if shape == "cross":
        path = f"M{num(x - size)} {num(y - size)}l{num(2 * size)} {num(2 * size)}m0 {num(-2 * size)}"
        return Markup('<path class="{}" d="{}"/>').format(css, f"{path}l{num(-2 * size)} {num(2 * size)}")
    wide = size * 1.25
    return line([(x, y - wide), (x + wide, y), (x, y + wide), (x - wide, y)], css, closed=True)


def text(x: float, y: float, told: str, css: str = "", anchor: str = "start") -> Markup:
    """One line of text; ``anchor`` is start, middle or end."""
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(css, num(x), num(y), anchor, told)


def titled(mark: Markup, title: str) -> Markup:
    """The mark with words that show on demand."""
    return Markup("<g>{}<title>{}</title></g>").format(mark, title)


def linked(mark: Markup, row: int | None, title: str) -> Markup:
    """The mark as a link to a row of the table; without one it has its title alone.

    The keyboard reaches rows in the table and skips the marks.
    """
    if row is None:
        return titled(mark, title)
    link = Markup('<a href="#n{}" data-node="{}" tabindex="-1">{}<title>{}</title></a>')
    return link.format(row, row, mark, title)


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale with what is written at it: what it counts, how many ticks, and how numbers look if not as usual."""

    scale: Scale
    label: str
    count: int = 6
    words: Callable[[float], str] | None = None

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Places and words of the ticks."""
        found = self.scale.ticks(self.count) if self.count else ()
        if self.words is not None:
            told = [self.words(tick) for tick in found]
        else:
            told = [words.ticks([t])[0] for t in found] if self.scale.kind == "log" else words.ticks(found)
        yield from zip(map(self.scale.at, found), told, strict=True)


def axes(x: Axis, y: Axis) -> Markup:
    """Grid lines at the ticks of ``y``, short ticks at those of ``x``, and both labels; the floor is a full line."""
    left, right = x.scale.range
    bottom, top = y.scale.range
    marks = []
    for place, told in y.ticks():
        marks += [rule((left, place), (right, place), "grid"), text(left - 8, place + 4, told, "tick", "end")]
    for place, told in x.ticks():
        marks.append(rule((place, bottom), (place, bottom + 4), "axis"))
        marks.append(text(place, bottom + 17, told, "tick", "middle"))
    marks += [rule((left, bottom), (right, bottom), "axis")]
    marks += [text(left, top - 10, y.label, "label")] if y.label else []
    marks += [text(right, bottom + 33, x.label, "label", "end")] if x.label else []
    return join(marks)


def picture(size: tuple[int, int], title: str, marks: Iterable[Markup], css: str = "plot") -> Markup:
    """A whole plot; ``title`` says in words what it shows."""
    start = Markup('<svg class="{}" role="group" aria-label="{}" viewBox="0 0 {} {}" width="{}" height="{}">')
    return start.format(css, title, *size, *size) + join(marks) + Markup("</svg>")


def legend(entries: Iterable[tuple[Markup, str]]) -> Markup:
    """What the marks mean; each is drawn around (7, 7)."""
    item = Markup('<li><svg class="key" aria-hidden="true" viewBox="0 0 14 14" width="14" height="14">{}</svg>{}</li>')
    return Markup('<ul class="legend">{}</ul>').format(join(item.format(mark, told) for mark, told in entries))
