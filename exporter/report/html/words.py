"""Names and numbers as the page writes them; what is missing or not finite becomes a blank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import PurePosixPath

from qexport.errors import printable

NAME, FULL_NAME = 200, 800  # characters of a name in the text and of one that is shown on demand
MINUS, BLANK = "\u2212", ""
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def name(value: object, limit: int = NAME) -> str:
    """A name or a sentence that may hold anything, in one line of printable characters, cut after ``limit``."""
    return " ".join(printable(str(value)[: limit + 1], limit).split())


def full_name(value: object) -> str:
    """The same with more room, for what is shown on demand."""
    return name(value, FULL_NAME)


def middle(value: object, limit: int) -> str:
    """The name with its middle left out where it is longer than ``limit``: both ends tell names apart."""
    text = name(value, FULL_NAME)
    if len(text) <= limit:
        return text
    head = (limit - 1) * 2 // 5
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"


def number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, with a real minus and no padding; very small and large ones as powers of ten."""
    if value is None or not math.isfinite(value):
        return BLANK
    if abs(value) < 10**digits:
        value = float(f"{value:.{digits - 1}e}")
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 10**digits:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return _signed(f"{value:.{places}f}")
    if abs(value) < 1e6 and abs(value) >= 1:
        return _signed(f"{value:,.0f}")
    mantissa, exponent = f"{value:.1e}".split("e")
    return _signed(f"{mantissa}e{int(exponent)}").replace("e-", f"e{MINUS}")


def model_name(path: str) -> str:
    """What a model is called: its file, or its folder where the file has the usual name."""
    file = PurePosixPath(path)
    return file.parent.name if file.stem == "model" and file.parent.name else file.stem or path


def fixed(value: float | None, places: int) -> str:
    """``places`` digits behind the point, so that a column lines up."""
    return BLANK if value is None or not math.isfinite(value) else _signed(f"{value:.{places}f}")


def percent(share: float | None) -> str:
    """A share as percent, with two digits where it is small."""
    if share is None or not math.isfinite(share):
        return BLANK
    value = 100 * share
    if 0 < value < 0.001:
        return "<0.001 %"
    return f"{value:.0f} %" if abs(value) >= 10 or value == 0 else f"{number(value, 2)} %"


def ticks(values: Sequence[float]) -> list[str]:
    """Numbers of an axis: with as many digits behind the point as the one that has most."""
    plain = [f"{value:.10g}" for value in values]
    if any("e" in text for text in plain):
        return [number(value, 2) for value in values]
    places = max((len(text.partition(".")[2]) for text in plain), default=0)
    return [_signed(f"{value:,.{places}f}") for value in values]


def si(value: float) -> str:
    """A rate with its prefix: ``12 G``."""
    for size, prefix in _PREFIXES:
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def count(value: int) -> str:
    """A whole number with a comma every three digits."""
    return f"{value:,}"


def many(value: int, what: str) -> str:
    """So many of something that takes an s: ``1 node``, ``2 nodes``."""
    return f"{count(value)} {what}" if value == 1 else f"{count(value)} {what}s"


def shape(sizes: Sequence[int]) -> str:
    """Sizes of a tensor: ``8 × 16``."""
    return " × ".join(map(str, sizes))


def _signed(text: str) -> str:
    plain = text.lstrip("-")
    return plain if not text.startswith("-") or not plain.strip("0.,") else MINUS + plain
