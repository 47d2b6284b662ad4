"""Remove the units that a model can best do without, and let what reads them make up for their loss.

The story of a structured cut: find the spaces and what goes with their units (``passes.pruning``), score the units on
calibration data, choose within the budget, and then space by space fit the weights that read the units to the outputs
they had (least squares with a ridge, the mean of what is lost going into the bias), and cut. Every space is measured
on the model with all earlier ones cut already, so that weights are fitted to what they will really read.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.cutting.budget import Budget
from qexport.calibration.cutting.excerpt import spread
from qexport.calibration.cutting.readers import Repair, hessians, merged, readers_of, repair, taps_of
from qexport.calibration.cutting.scores import CRITERIA, Evidence, unmeasured
from qexport.calibration.few_bits import every
from qexport.calibration.least import check_least
from qexport.calibration.reading.data import Dataset, Sample
from qexport.calibration.statistics.halves import measure_halves
from qexport.errors import UsageError
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.numbers.refit import RIDGE
from qexport.passes.pruning.cut import Cut, Keep, find_cut
from qexport.passes.pruning.spaces import Space, find_spaces
from qexport.passes.writing.quantized import quantized_nodes

CUT_KEY = "qexport.cut"
"""With the kind behind it, left on all values whose units were looked at: what was cut is not cut again."""
LISTED = 12  # units that a report names
UNREPAIRED = "what reads it is not refitted"
SPARED, DONE = "spared by name", "cut already"
Kind = Literal["heads", "neurons", "channels"]


@dataclass(frozen=True)
class Prune(Pass):
    """Base of the passes that remove heads, neurons and channels."""

    exact: ClassVar[bool] = False
    one_at_a_time: ClassVar[bool] = True
    kind: ClassVar[Kind]
    of: ClassVar[Literal["units", "work"]] = "units"

    data: Dataset | None = field(default=None, metadata={"bound": True})
    advance: Callable[[], None] = field(default=lambda: None, metadata={"bound": True})
    keep: float = 0.75
    """Share that stays, above 0 and below 1."""
    per: Literal["layer", "model"] = "model"
    """Whether every layer keeps this share, or all layers together, some losing more than others."""
    criterion: Literal["magnitude", "activation", "surgery", "likeness", "change", "gradient"] = "surgery"
    """What tells which units go: their weights, the energy they add to what reads them, the error that is left once
    all others have made up for it, their likeness to others, how much the model's outputs change without them, or the
    gradient of that."""
    multiple: int = 1
    """What the number that stays in a layer is a multiple of, for the sake of the kernels."""
    repair: bool = True
    """Whether the weights that read the units are fitted to the outputs they had, by least squares."""
    ridge: float | None = None
    """Share of the mean square of an input that is added to all of them, so that noise is not fitted; unset, what is
    best for one half of the samples when fitted to the other."""
    samples: int = 512
    spare: tuple[str, ...] = ()
    """Names of layers that lose nothing."""
    missing: Literal["error", "skip"] = "error"
    """Whether a model without such units is an error."""

    def __post_init__(self) -> None:
        check_least(self.kind, self, samples=1, multiple=1)
        if self.ridge is not None and not (math.isfinite(self.ridge) and self.ridge >= 0):
            what = f"ridge is {self.ridge:g}, expected a number not below 0"
            raise UsageError(what, where=f"{self.kind}.ridge", hint="leave it out to have it searched")
        _ = self.budget  # a share that is none is told at once

    @property
    def budget(self) -> Budget:
        """How much may stay; ``UsageError`` for a share outside (0, 1)."""
        return Budget(self.keep, self.per, self.of, self.multiple, f"{self.kind}.keep")

    def call(self, model: ir.Model) -> Outcome:
        """Cut; a model without such units, a budget that empties a layer, and data that is missing are errors."""
        if quantized_nodes(model):
            return Outcome(model, False, (Decision("", "graph", "skipped", "already quantized"),))
        if self.data is None and (self.repair or self.criterion != "magnitude"):
            raise UsageError(f"{self.kind} needs calibration data", hint="give real samples with --calib")
        found = find_spaces(model, self.kind)
        spaces, decisions = self._spaces(found)
        if not spaces:
            return Outcome(model, False, tuple(decisions))
        scores = CRITERIA[self.criterion](spaces, self._evidence(model))
        chosen = list(zip(spaces, self.budget.choose(model, spaces, scores), strict=True))
        for space, keep in chosen:
            reason = "all of it stays" if keep.all() else space.found.refusal(keep)
            if reason is not None:
                decisions.append(self._whole(space, reason))
        losing = [(space, keep) for space, keep in chosen if not keep.all() and space.found.refusal(keep) is None]
        advance = every(max(len(losing), 1), self.advance)
        for space, keep in losing:
            decisions.append(self._remove(model, space, keep, advance))
        for value in (value for space in spaces for value in space.found.values):
            value.meta[_key(self.kind)] = True
        place = {space.name: at for at, space in enumerate(found)}
        decisions.sort(key=lambda decision: place.get(decision.node, -1))
        return Outcome(model, any(d.action == "pruned" for d in decisions), tuple(decisions))

    def _spaces(self, found: Sequence[Space]) -> tuple[list[Space], list[Decision]]:
        """The spaces to cut, and why others stay whole."""
        self._check_spared(found)
        reasons = {space: self._refusal(space) for space in found}
        refused = [self._whole(space, why) for space, why in reasons.items() if why]
        able = [space for space, why in reasons.items() if not why]
        if not able and not {SPARED, DONE} & set(reasons.values()):
            what, space = f"the model has no {self.kind}", next(iter(_telling(reasons)), None)
            if space is not None:
                what = f"no {self.kind} of the model can be removed: {reasons[space]} (at {space.name!r})"
            if self.missing == "error":
                hint = f"leave the step out, or set {self.kind}.missing=skip"
                raise UsageError(what, where=self.kind, hint=hint)
            refused = [Decision("", "graph", "skipped", what)]
        return able, refused

    def _check_spared(self, found: Sequence[Space]) -> None:
        names = [space.name for space in found]
        for name in self.spare:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1) or names[:1]
                hint = f"did you mean {near[0]!r}?" if near else "there is none"
                raise UsageError(f"no {self.kind} are called {name!r}", where=f"{self.kind}.spare", hint=hint)

    def _refusal(self, space: Space) -> str | None:
        """Why a space stays whole."""
        if _key(self.kind) in space.value.meta:
            return DONE
        if isinstance(space.cut, str):
            return space.cut
        if space.name in self.spare:
            return SPARED
        if space.count <= self.multiple and self.multiple > 1:
            return f"no more than {self.multiple} {self.kind}"
        return unmeasured(space.cut, self.criterion)

    def _whole(self, space: Space, reason: str) -> Decision:
        """Say why a space stays whole; its units count, where they are known."""
        units = (space.count, space.count) if space.count and reason != DONE else None
        return Decision(space.name, self.kind, "skipped", reason, units=units)

    def _evidence(self, model: ir.Model) -> Evidence:
        ridge = RIDGE if self.ridge is None else self.ridge
        if self.data is None or self.criterion not in ("change", "gradient"):
            return Evidence(model, self._samples, ridge)
        few = spread(self.data, self.samples)
        return Evidence(model, lambda: iter(few), ridge)

    def _samples(self) -> Iterator[Sample]:
        return islice(iter(self.data or ()), self.samples)

    def _remove(self, model: ir.Model, space: Space, keep: Keep, advance: Callable[[], None]) -> Decision:
        """Cut one space, its readers fitted to what they made on the model as it is by now."""
        cut = find_cut(space.value, space.ids, space.count)
        reason = cut if isinstance(cut, str) else cut.refusal(keep)
        if isinstance(cut, str) or reason is not None:
            return self._whole(space, f"what was cut before has changed it: {reason}")
        repairs = self._repairs(model, cut, keep, advance)
        gone = int(cut.parameters()[~keep].sum())
        cut.apply(keep)
        for done in repairs:
            done.write()
        detail = f"{gone:,} parameters fewer{_told(repairs)}; without {_listed(np.flatnonzero(~keep))}"
        what = "what reads it is refitted" if self.repair else "those that stay take over"
        units = (int(keep.sum()), space.count)
        return Decision(space.name, self.kind, "pruned", what if repairs else UNREPAIRED, detail, units)

    def _repairs(self, model: ir.Model, cut: Cut, keep: Keep, advance: Callable[[], None]) -> list[Repair]:
        readers = readers_of(cut)
        merges = self.criterion == "likeness"
        if not readers or not (self.repair or merges):
            return []
        grams = measure_halves(model, taps_of(readers), self._samples(), advance)
        if self.repair:
            found = [repair(reader, grams[reader.tap], keep, self.ridge) for reader in readers]
            return [done for done in found if done is not None]
        return merged(readers, hessians(readers, grams), keep)


def _told(repairs: Sequence[Repair]) -> str:
    """The worst output error, in whole decibels, of a cut alone and with what makes up for it."""
    if not repairs:
        return ""
    masked, left = (
        10 * math.log10(max(max(rows), 1e-12)) for rows in zip(*((r.masked, r.left) for r in repairs), strict=True)
    )
    return f", error {left:.0f} dB, {masked:.0f} dB if nothing made up for it"


def _listed(numbers: NDArray[np.intp]) -> str:
    """The first of some numbers, and how many more they are."""
    more = f" and {len(numbers) - LISTED} more" if len(numbers) > LISTED else ""
    return ", ".join(map(str, numbers[:LISTED])) + more


def _telling(reasons: Mapping[Space, str | None]) -> list[Space]:
    """Spaces that stay whole, those first that could be cut but for an option."""
    return sorted(reasons, key=lambda space: isinstance(space.cut, str))


def _key(kind: str) -> str:
    return f"{CUT_KEY}/{kind}"
