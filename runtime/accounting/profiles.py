"""How long a decoder takes on one machine, as a value that is kept beside the model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qexport.errors import DataInvalid
from qexport.runtime.accounting.costs import Costs
from qexport.runtime.accounting.machine import Fingerprint
from qexport.safe_io import read_text

SCHEMA = "qexport.profile/1"
FILE = "profile.json"
LARGEST = 1 << 20  # bytes of such a file


@dataclass(frozen=True, slots=True)
class Profile:
    """Times of a decoder by how many tokens a call has, and what a call costs on any machine.

    Attributes:
        fingerprint: Of the machine that they were measured on.
        threads: Threads inside one operator.
        valid: Tokens in the cache before every call.
        batch: Rows.
        curve: Pairs of a width S, tokens of a row in one call, and milliseconds of a call; widths grow from 1.
        prefill: Milliseconds per token of a row, of the prompt that was read before.
        costs: Bytes and operations.
    """

    fingerprint: Fingerprint
    threads: int
    valid: int
    batch: int
    curve: tuple[tuple[int, float], ...]
    prefill: float
    costs: Costs

    def milliseconds(self, width: float) -> float:
        """t(S): what a call of ``width`` tokens takes, on a line between the widths that were measured.

        Beyond the last one the line through the last two goes on, but never falls.
        """
        points = self.curve
        if width <= points[0][0] or len(points) == 1:
            return points[0][1]
        right = next((number for number, (known, _) in enumerate(points) if known >= width), len(points) - 1)
        (low, before), (high, after) = points[right - 1], points[right]
        slope = (after - before) / (high - low)
        return before + slope * (width - low) if width <= high else after + max(slope, 0.0) * (width - high)

    def fits(self, machine: Fingerprint, threads: int, batch: int = 1) -> bool:
        """Whether it was measured on such a machine, with so many threads and rows."""
        return (self.fingerprint, self.threads, self.batch) == (machine, threads, batch)

    def as_json(self) -> dict[str, Any]:
        """Plain values, for files."""
        return asdict(self)


def profiles_json(profiles: Iterable[Profile]) -> dict[str, Any]:
    """What the file holds."""
    return {"schema": SCHEMA, "profiles": [profile.as_json() for profile in profiles]}


def read_profiles(path: Path) -> list[Profile]:
    """Read what an export or a build left.

    Raises:
        DataInvalid: It is not such a file, or a number in it is out of its range.
        QexportError: It cannot be read.
    """
    text = read_text(path, limit=LARGEST)
    try:
        return _profiles(json.loads(text))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        hint = "it may be deleted, times are measured anew then"
        raise DataInvalid(f"no profile of a decoder: {error}", where=str(path), hint=hint) from error


def _profiles(told: Mapping[str, Any]) -> list[Profile]:
    if told["schema"] != SCHEMA:
        raise ValueError(f"the schema is {told['schema']!r}")
    return [_profile(entry) for entry in told["profiles"]]


def _profile(told: Mapping[str, Any]) -> Profile:
    curve = tuple((_count(width), _positive(milliseconds)) for width, milliseconds in told["curve"])
    if not curve or [width for width, _ in curve] != sorted({width for width, _ in curve}):
        raise ValueError("the curve is empty or its widths do not grow")
    print_, costs = told["fingerprint"], told["costs"]
    return Profile(
        fingerprint=Fingerprint(
            str(print_["processor"]), _count(print_["cores"]), str(print_["runtime"]), str(print_["device"])
        ),
        threads=_count(told["threads"]),
        valid=_count(told["valid"], least=0),
        batch=_count(told["batch"]),
        curve=curve,
        prefill=_positive(told["prefill"]),
        costs=Costs(**{field.name: _count(costs[field.name], least=0) for field in fields(Costs)}),
    )


def _count(told: object, least: int = 1) -> int:
    if isinstance(told, bool) or not isinstance(told, int) or not least <= told < 1 << 62:
        raise ValueError(f"{str(told)[:40]} is not an integer from {least} up")
    return told


def _positive(told: object) -> float:
    """Milliseconds, from what no clock tells apart to ten days."""
    if isinstance(told, bool) or not isinstance(told, (int, float)) or not 1e-9 <= told <= 1e9:
        raise ValueError(f"{str(told)[:40]} is not a number from 1e-9 to 1e9")
    return float(told)
