"""Pictures of a bench: the roofline, acceptance by position, predicted against measured speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qexport.runtime.accounting.machine import Machine
from qexport.runtime.accounting.profiles import Profile
from qexport.runtime.accounting.utilization import Known
from qexport.runtime.benchmarking.result import BenchResult, predicted
from qexport.runtime.figures import demand_matplotlib, new_figure, save_figure

SIZE, GRID = (7.5, 4.6), 0.3  # inches, points
TARGET, DRAFT, ROOF, QUIET = "#33658a", "#f6ae2d", "#2f4858", "#9aa5b1"


def draw(bench: BenchResult) -> dict[str, bytes]:
    """Return the pictures: file name to content; those of a draft and of a machine only where there is one."""
    demand_matplotlib()
    pictures = {"speedup": _speedup(bench)}
    if bench.known.machine is not None:
        pictures["roofline"] = _roofline(bench.known, bench.known.machine)
    if bench.acceptance is not None:
        pictures["acceptance"] = _acceptance(bench)
    return {f"{name}.svg": save_figure(figure, "svg") for name, figure in pictures.items()}


def points(profile: Profile) -> list[tuple[int, float, float]]:
    """For each width of a curve: the width, operations per byte, and operations per second."""
    rows, valid, costs = profile.batch, profile.valid, profile.costs
    found = []
    for width, milliseconds in profile.curve:
        pairs = rows * (width * valid + width * (width + 1) / 2)
        done = costs.operations(rows * width, pairs)
        found.append((width, done / costs.bytes_read(rows * (valid + width)), done / milliseconds * 1e3))
    return found


def attainable(machine: Machine, intensity: float, rate: float) -> float:
    """Operations per second that the machine allows at most: min(peak, intensity times bytes per second)."""
    return min(machine.flops, intensity * rate)


def _roofline(known: Known, machine: Machine) -> Any:
    """Both models at every width, under the roofs of memory and of the cache that holds the target."""
    figure, axes = _figure("operations per byte", "operations per second")
    target, draft = known.target, known.draft
    models = [("target", target, TARGET), *([("draft", draft, DRAFT)] if draft else [])]
    dots = [point for _, profile, _ in models for point in points(profile)]
    span = np.geomspace(min(dot[1] for dot in dots) / 3, max(max(dot[1] for dot in dots), _ridge(machine)) * 3, 100)
    roofs = {"memory": machine.memory} | {
        f"where the {name} stays": machine.peak(profile.costs.bytes_read(profile.valid)) for name, profile, _ in models
    }
    for (name, rate), style in zip(roofs.items(), ("-", "--", ":"), strict=False):
        height = [attainable(machine, intensity, rate) for intensity in span]
        axes.plot(span, height, style, color=ROOF, linewidth=1, label=f"{name}, {rate / 1e9:.0f} GB/s")
    for name, profile, color in models:
        widths, intensities, rates = zip(*points(profile), strict=True)
        axes.plot(
            intensities, rates, "o-", color=color, markersize=4, linewidth=0.8, label=f"{name}, S = {widths[0]} .."
        )
        for place in (0, -1):
            axes.annotate(f"S={widths[place]}", (intensities[place], rates[place]), fontsize=7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(f"Roofline, {machine.threads} threads, {machine.flops / 1e9:.0f} GFLOP/s", fontsize=10)
    axes.legend(fontsize=7)
    return figure


def _ridge(machine: Machine) -> float:
    return machine.flops / machine.memory


def _acceptance(bench: BenchResult) -> Any:
    figure, axes = _figure("position in the proposal", "share that is taken")
    found = bench.acceptance
    assert found is not None, "it is drawn only where there is one"
    places = range(1, len(found.conditional) + 1)
    axes.bar(places, found.cumulative, color=QUIET, width=0.6, label="of all that were proposed there")
    axes.plot(places, found.conditional, "o-", color=TARGET, label="once all before it are taken")
    axes.set_ylim(0, 1)
    axes.set_xticks(list(places))
    axes.set_title(f"Acceptance of {found.proposer}, {found.rate:.0%} of {found.proposed} tokens", fontsize=10)
    axes.legend(fontsize=8)
    return figure


def _speedup(bench: BenchResult) -> Any:
    """Fixed numbers of tokens ahead by what was measured and predicted; all other ways as lines."""
    figure, axes = _figure("tokens ahead, K", "speed over plain decoding")
    fixed = sorted((entry for entry in bench.entries if entry.ahead is not None), key=lambda entry: entry.ahead or 0)
    others = [entry for entry in bench.entries[1:] if entry.ahead is None]
    if fixed:
        places = [entry.ahead or 0 for entry in fixed]
        middle = [entry.speedup.value for entry in fixed]
        bars = [[e.speedup.value - e.speedup.low for e in fixed], [e.speedup.high - e.speedup.value for e in fixed]]
        axes.errorbar(places, middle, bars, fmt="o-", color=TARGET, capsize=3, label="measured")
        span = range(1, max(places) + 3)
        forecast = [predicted(bench.known, bench.acceptance, ahead) for ahead in span]
        if None not in forecast:
            axes.plot(span, forecast, "--", color=DRAFT, label="predicted by curves and acceptance")
    for entry, style in zip(others, _styles(len(others)), strict=True):
        axes.axhline(entry.speedup.value, color=QUIET, linestyle=style, label=f"{entry.name}, measured")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_title(f"{bench.prompts} prompts, up to {bench.max_tokens} tokens", fontsize=10)
    if fixed or others:
        axes.legend(fontsize=8)
    return figure


def _styles(count: int) -> Sequence[str]:
    return [("-", "-.", ":")[number % 3] for number in range(count)]


def _figure(x: str, y: str) -> tuple[Any, Any]:
    figure, axes = new_figure(*SIZE)
    axes.grid(visible=True, linewidth=GRID)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes
