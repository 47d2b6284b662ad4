"""How far a value got on calibration data: a note that ``extremes`` leaves and ``half`` reads."""

from __future__ import annotations

import onnx_ir as ir

EXTREME_KEY = "qexport.extremes"


def extreme_of(value: ir.Value | None) -> float | None:
    """The largest magnitude that was observed of ``value``; ``None`` where nobody looked."""
    found = None if value is None else value.meta.get(EXTREME_KEY)
    return found if isinstance(found, float) else None
