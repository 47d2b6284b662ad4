"""Numbers that a caller gave, looked at before anything is done with them: by type, and by range."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from qexport.errors import UsageError


def is_integer(value: object) -> bool:
    """Whether it is an integer, of Python or numpy; truth values are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite number, of Python or numpy, that a float can hold; truth values are none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def demand_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise :class:`UsageError` unless it is an integer from ``least`` to ``most``, or without an end."""
    if not (is_integer(value) and value >= least and (most is None or value <= most)):
        expected = f"{least} or more" if most is None else f"{least} to {most}"
        raise UsageError(f"{name} is {value!r}, expected {expected}")


def demand_names(name: str, value: Any, *, empty: bool = False) -> None:
    """Raise :class:`UsageError` unless it is a tuple of texts, with one at least unless it may be ``empty``."""
    if not isinstance(value, tuple) or not all(isinstance(one, str) for one in value) or not (value or empty):
        raise UsageError(f"{name} is {value!r}, expected a tuple of names")
