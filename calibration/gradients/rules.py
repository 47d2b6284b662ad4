"""The table of gradients: which operator has which rule, and where gradients end."""

from __future__ import annotations

from qexport.calibration.gradients import convolutions, elementwise, layouts, products, reductions
from qexport.calibration.gradients.tape import Rule

RULES: dict[str, Rule] = {
    **convolutions.RULES,
    **elementwise.RULES,
    **layouts.RULES,
    **products.RULES,
    **reductions.RULES,
}

STOPS = frozenset(
    (
        "And",
        "ArgMax",
        "ArgMin",
        "Ceil",
        "ConstantOfShape",
        "Equal",
        "Floor",
        "Greater",
        "GreaterOrEqual",
        "IsInf",
        "IsNaN",
        "Less",
        "LessOrEqual",
        "NonZero",
        "Not",
        "OneHot",
        "Or",
        "Range",
        "Round",
        "Shape",
        "Sign",
        "Size",
        "Xor",
    )
)
"""Operators whose output does not change with their inputs, or in steps only."""
