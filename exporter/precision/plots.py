"""Pictures of a sensitivity analysis: a tornado of the layers, and bars of the activation groups."""

from __future__ import annotations

from typing import Any

from qexport.exporter.precision.sensitivity import Sensitivity
from qexport.runtime.figures import demand_matplotlib, new_figure, save_figure

MOST_LAYERS = 60  # rows of the tornado
ROW, HEAD, WIDTH, DPI = 0.24, 1.4, 9.0, 120  # inches, inches, inches, dots per inch
FORMATS = ("png", "svg")
MEASURED, ESTIMATED, ALL = "#33658a", "#f6ae2d", "#9aa5b1"


def draw(found: Sensitivity) -> dict[str, bytes]:
    """Return the pictures: file name to content; groups are left out where none were found."""
    demand_matplotlib()
    pictures = {"layers": _tornado(found)}
    if found.activations:
        pictures["activations"] = _bars(found)
    return {f"{name}.{kind}": save_figure(figure, kind) for name, figure in pictures.items() for kind in FORMATS}


def _tornado(found: Sensitivity) -> Any:
    """Layers from the most to the least sensitive: to the left what was measured, to the right what was estimated."""
    rows = found.layers[:MOST_LAYERS]
    figure, axes = _figure(len(rows))
    places = range(len(rows))
    # the square root, so that a layer with a tenth of the noise of another one is still seen
    axes.barh(places, [-(row.error**0.5) for row in rows], color=MEASURED, label="measured, alone in 8 bits")
    axes.barh(places, [(row.estimate or 0.0) ** 0.5 for row in rows], color=ESTIMATED, label="Fisher estimate")
    axes.set_yticks(list(places), [_short(row.node) for row in rows], fontsize=7)
    axes.axvline(0, color="black", linewidth=0.8)
    agreement = "" if found.correlation is None else f", rank correlation {found.correlation:.2f}"
    axes.set_title(f"Sensitivity of layers, {found.target}{agreement}", fontsize=10)
    axes.set_xlabel("relative error of the output (noise over signal)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.legend(fontsize=8)
    return figure


def _bars(found: Sensitivity) -> Any:
    rows = found.activations
    figure, axes = _figure(len(rows))
    places = range(len(rows))
    axes.barh(places, [row.sqnr for row in rows], color=[ALL, *[MEASURED] * (len(rows) - 1)])
    axes.axvline(rows[0].sqnr, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(list(places), [f"all but {row.left_out} ({row.tensors})" for row in rows], fontsize=8)
    axes.set_title(f"Activations in 8 bits, one group left out, {found.target}", fontsize=10)
    axes.set_xlabel("SQNR of the output, dB")
    return figure


def _figure(rows: int) -> tuple[Any, Any]:
    """As high as its rows need."""
    figure, axes = new_figure(WIDTH, HEAD + ROW * rows, DPI)
    axes.invert_yaxis()
    axes.grid(visible=True, axis="x", linewidth=0.3)
    return figure, axes


def _short(name: str, room: int = 60) -> str:
    plain = name.replace("$", r"\$")  # matplotlib reads mathematics between dollars
    return plain if len(plain) <= room else f"...{plain[-room:]}"
