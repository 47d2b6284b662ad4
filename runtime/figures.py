"""Figures of matplotlib without windows or any global state; it is loaded where something is drawn."""

from __future__ import annotations

import importlib
import io
from typing import Any

from qexport.errors import EnvironmentMismatch


def demand_matplotlib() -> None:
    """Raise ``EnvironmentMismatch`` with what to install when there is no matplotlib."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise EnvironmentMismatch(
            "matplotlib is not installed, so there are no plots", hint="pip install 'qexport[report]', or leave -o out"
        ) from error


def new_figure(width: float, height: float, dpi: float = 100) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes; what has no canvas of its own draws with Agg."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), dpi=dpi)
    return figure, figure.add_subplot()


def save_figure(figure: Any, kind: str) -> bytes:
    """The file, ``svg`` or ``png``; the same bytes for the same numbers, as no date is written."""
    with io.BytesIO() as file:
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        with importlib.import_module("matplotlib").rc_context({"svg.hashsalt": "qexport"}):
            figure.savefig(file, format=kind, bbox_inches="tight", metadata=metadata)
        return file.getvalue()
