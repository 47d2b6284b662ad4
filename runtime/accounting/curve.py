"""Measure t(S): what a call of a decoder takes by how many tokens it has. It decides how far to look ahead.

On some kernels five tokens cost as much as one, on others twice as much for two: no formula tells, so it is measured.
Widths take turns in an order of their own in every round, so that whatever else the machine does disturbs all of them
alike. It only ever adds time, to more than half of the calls if the machine is busy: so lower quartiles are kept, and
no width is told to take longer than a larger one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qexport.errors import QexportError, UsageError
from qexport.runtime.accounting.costs import Costs, load_costs
from qexport.runtime.accounting.machine import Fingerprint, count_threads, fingerprint
from qexport.runtime.accounting.profiles import FILE, Profile, read_profiles
from qexport.runtime.signature import Signature

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16)
VALID = 128  # tokens
ROUNDS, FEW = 25, 5  # while there is time, and until twice that is gone
QUARTILE = 0.25
MODEL = "model.onnx"


class Steps(Protocol):
    """What is measured: a decoder with an empty context."""

    signature: Signature

    @property
    def limit(self) -> int | None:
        """Tokens that a row may have; ``None`` for no end."""
        ...

    def reset(self, batch: int = 1) -> None:
        """Forget everything."""
        ...

    def extend(self, ids: NDArray[np.integer[Any]]) -> object:
        """Read more tokens of every row."""
        ...

    def rollback(self, lengths: int) -> None:
        """Go back."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        widths: Tokens of a row in one call.
        valid: Tokens in the cache before each; fewer where the model has no positions for them.
        batch: Rows.
        seconds: After which a few rounds are enough; after twice as many no further one is begun.
    """

    widths: tuple[int, ...] = WIDTHS
    valid: int = VALID
    batch: int = 1
    seconds: float = 0.4

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` on what cannot be measured."""
        if not self.widths or min(self.widths) < 1 or self.valid < 0 or self.batch < 1:
            what = f"widths are {self.widths}, valid is {self.valid}, batch is {self.batch}"
            raise UsageError(what, hint="give at least one width from 1 up, and at least one row")


@dataclass(frozen=True, slots=True)
class Setting:
    """What times depend on beside the model.

    Attributes:
        machine: Where it runs.
        threads: Threads inside one operator; 0 for all cores.
    """

    machine: Fingerprint
    threads: int = 0


def measure_profile(decoder: Steps, costs: Costs, setting: Setting | None = None, plan: Plan | None = None) -> Profile:
    """Measure a decoder, which has forgotten everything afterwards.

    Args:
        decoder: What to measure.
        costs: Of its graph.
        setting: Where it runs and how; the processor and all cores if not given.
        plan: Which calls.
    """
    where, asked = setting or Setting(fingerprint()), _fitting(plan or Plan(), decoder.limit)
    prefill = _prefill(decoder, asked)
    for width in asked.widths:  # warms up: memory is laid out for every shape once
        _call(decoder, width, asked)
    rounds: list[dict[int, float]] = []
    started, orders = time.perf_counter(), np.random.default_rng(0)
    while not rounds or _goes_on(len(rounds), time.perf_counter() - started, asked.seconds):
        rounds.append({width: _call(decoder, width, asked) for width in orders.permutation(asked.widths).tolist()})
    decoder.reset(1)
    quartiles = np.quantile([[times[width] for width in asked.widths] for times in rounds], QUARTILE, axis=0)
    least = 1e3 * np.minimum.accumulate(quartiles[::-1])[::-1]
    return Profile(
        fingerprint=where.machine,
        threads=count_threads(where.threads),
        valid=asked.valid,
        batch=asked.batch,
        curve=tuple(zip(asked.widths, least.tolist(), strict=True)),
        prefill=prefill,
        costs=costs,
    )


def _goes_on(rounds: int, seconds: float, budget: float) -> bool:
    return rounds < (ROUNDS if seconds < budget else FEW if seconds < 2 * budget else 0)


def profile_of(folder: Path, decoder: Steps, setting: Setting | None = None, batch: int = 1) -> Profile:
    """What the folder of an export says of this machine, or else what is measured now, in less than a second.

    Args:
        folder: With ``model.onnx``, and ``profile.json`` where it was measured before.
        decoder: That model, loaded; it has forgotten everything if it was measured.
        setting: Where it runs and how.
        batch: Rows.

    Raises:
        QexportError: There is no graph in the folder, and no stored profile that fits.
    """
    where = setting or Setting(fingerprint())
    stored = stored_profile(folder, where, batch)
    if stored is not None:
        return stored
    return measure_profile(decoder, load_costs(folder / MODEL), where, Plan(batch=batch))


def stored_profile(folder: Path, where: Setting, batch: int = 1) -> Profile | None:
    """The one that was measured on this machine with so many threads and rows, if there is one."""
    try:
        known = read_profiles(folder / FILE)
    except QexportError:  # not there, or from elsewhere: measuring is cheap
        return None
    threads = count_threads(where.threads)
    return next((profile for profile in known if profile.fits(where.machine, threads, batch)), None)


def _fitting(plan: Plan, positions: int | None) -> Plan:
    """The plan within the positions that the model has: widths first, what is valid gives way."""
    if positions is None:
        return replace(plan, widths=tuple(sorted(set(plan.widths))))
    widths = tuple(sorted({width for width in plan.widths if width <= positions})) or (1,)
    return replace(plan, widths=widths, valid=min(plan.valid, positions - widths[-1]))


def _prefill(decoder: Steps, plan: Plan) -> float:
    """Fill the cache, twice where that is quick; returns the milliseconds per token of the last time."""
    prompt, seconds = _tokens(decoder, max(plan.valid, 1), plan.batch), 0.0
    for _ in range(2):
        decoder.reset(plan.batch)
        seconds = _timed(decoder, prompt)
        if seconds > plan.seconds:
            break
    return 1e3 * seconds / max(plan.valid, 1)


def _call(decoder: Steps, width: int, plan: Plan) -> float:
    decoder.rollback(plan.valid)
    return _timed(decoder, _tokens(decoder, width, plan.batch))


def _timed(decoder: Steps, ids: NDArray[np.int64]) -> float:
    began = time.perf_counter()
    decoder.extend(ids)
    return time.perf_counter() - began


def _tokens(decoder: Steps, width: int, batch: int) -> NDArray[np.int64]:
    """Any tokens: how long they take does not depend on which they are."""
    ids: NDArray[np.int64] = np.arange(width * batch, dtype=np.int64).reshape(batch, width)
    return ids % decoder.signature.vocabulary
