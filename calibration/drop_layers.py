"""Remove the layers of a residual network that do least, one after the other, each measured on what is left.

A layer hands on what it reads with something added. Where that is little, or nothing that the output shows, the model
does without the layer: the ones behind read what it read, and its nodes and weights are gone.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import onnx_ir as ir

from qexport.calibration.cutting.affine import Affine, Removed, fit, fold
from qexport.calibration.cutting.excerpt import spread
from qexport.calibration.cutting.influence import change, influences
from qexport.calibration.few_bits import UNSEEN, every
from qexport.calibration.least import check_least
from qexport.calibration.reading.data import Dataset, Sample
from qexport.errors import UsageError
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.match import maker
from qexport.passes.pruning.blocks import Block, find_blocks, find_layers, remove
from qexport.passes.writing.quantized import quantized_nodes

COUNT_KEY = "qexport.layers"  # on the graph: how many units it had, by kind
FEW = "no more are left than are to stay"
LEAST, MORE = "it does least", "others do less"
SPARED = "spared by name"
REPAIRED = "scale and offset that make up for a removed neighbour"

Unit = Literal["layer", "block"]
FIND: dict[Unit, Callable[[ir.Model], tuple[Block, ...]]] = {"layer": find_layers, "block": find_blocks}


@dataclass(frozen=True)
class Layers(Pass):
    """Remove the layers, or single residual blocks, that do least (Men et al. 2024, ShortGPT)."""

    exact: ClassVar[bool] = False

    data: Dataset | None = field(default=None, metadata={"bound": True})
    advance: Callable[[], None] = field(default=lambda: None, metadata={"bound": True})
    samples: int = 512
    """How many samples to look at; of more than 64 as many, from all over them, for models run whole many times."""
    keep: float = 0.75
    """Share of the layers that stay, in whole ones."""
    unit: Unit = "layer"
    """What is removed: whole layers, or attentions and feed-forward blocks by themselves."""
    criterion: Literal["influence", "change"] = "influence"
    """What tells which ones do least: one minus the cosine between what a layer reads and makes, or the relative change
    of the model's outputs without it, for which the samples run once for every layer that could go."""
    repair: bool = True
    """Whether the normalization in front of a removed layer makes up for it, by a scale and offset of each channel."""
    spare: tuple[str, ...] = ()
    """Names of layers that stay."""
    missing: Literal["error", "skip"] = "error"
    """What a model is that has no layers which can be removed: an error, or left as it is."""

    def __post_init__(self) -> None:
        check_least("layers", self, samples=1)
        if not 0 < self.keep < 1:
            what = f"keep is {self.keep:g}, expected a share between 0 and 1"
            raise UsageError(what, where="layers.keep", hint="0.75 lets three of four layers stay")

    def call(self, model: ir.Model) -> Outcome:
        """Remove layers until the share is reached.

        Raises:
            UsageError: No data; no layers, or none that can be removed; fewer of these than are to go; a name in
                ``spare`` that no layer has.
        """
        if quantized_nodes(model):
            return Outcome(model, False, (Decision("", "graph", "skipped", "already quantized"),))
        if self.data is None:
            raise UsageError("layers need calibration data to be rated", hint="give real samples with --calib")
        found = FIND[self.unit](model)
        free = [block for block in found if block.refusal is None and block.name not in self.spare]
        refused = [
            _decision(block, self.unit, "skipped", (block.refusal, "")) for block in found if block.refusal is not None
        ]
        if len(refused) == len(found):
            return self._nothing(model, refused)
        self._check_spare(found)
        whole = {**model.graph.meta.get(COUNT_KEY, {})}
        stay = round(self.keep * whole.setdefault(self.unit, len(found)))
        if stay < 1:
            what = f"to keep {self.keep:g} of {whole[self.unit]} {self.unit}s would leave nothing of the model"
            raise UsageError(what, where="layers.keep", hint="keep more")
        count = len(found) - stay
        if count <= 0:
            return Outcome(model, False, (Decision("", "graph", "skipped", FEW), *refused))
        self._check_budget((count, len(found), len(free)), refused)
        search = _Search(self, model.clone(), model, spread(self.data, self.samples))
        steps = list(search.run([block.name for block in free], count))
        if not steps:
            return Outcome(model, False, (Decision("", "graph", "skipped", UNSEEN), *refused))
        done = [decision for step in steps for decision in step.apply(model, self.unit)]
        model.graph.meta[COUNT_KEY] = whole
        spared = [_decision(block, self.unit, "kept", (SPARED, "")) for block in found if block.name in self.spare]
        return Outcome(model, True, (*done, *search.stayed(), *spared, *refused))

    def _nothing(self, model: ir.Model, refused: Sequence[Decision]) -> Outcome:
        """No unit can be removed: refuse, or leave the model as it is."""
        reasons = dict.fromkeys(f"{decision.node!r}: {decision.reason}" for decision in refused)
        what = f"no {self.unit} can be removed, {'; '.join(reasons)}" if refused else f"no residual {self.unit}s"
        if self.missing == "error":
            hint = "leave the step out, or set layers.missing='skip'"
            raise UsageError(f"the model has {what}" if not refused else what, where="layers", hint=hint)
        return Outcome(model, False, tuple(refused) or (Decision("", "graph", "skipped", what),))

    def _check_spare(self, found: Sequence[Block]) -> None:
        known = [block.name for block in found]
        for name in self.spare:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
                raise UsageError(f"no {self.unit} is called {name!r}", where="layers.spare", hint=hint)

    def _check_budget(self, counts: tuple[int, int, int], refused: Sequence[Decision]) -> None:
        count, found, free = counts
        if count > free:
            reasons = "; ".join(f"{decision.node!r}: {decision.reason}" for decision in refused)
            what = f"{count} of {found} {self.unit}s are to go, {free} can" + (f" ({reasons})" if reasons else "")
            raise UsageError(what, where="layers.keep", hint="keep more, or spare fewer")


@dataclass(frozen=True, slots=True)
class _Step:
    """One unit to remove: its name, what it was rated, and what makes up for it, if anything can."""

    name: str
    rated: str
    repair: Affine | str | None

    def apply(self, model: ir.Model, unit: Unit) -> Iterator[Decision]:
        """Remove it."""
        block, before = _named(model, unit, self.name), _parameters(model)
        remove(block)
        fewer = before - _parameters(model)
        yield _decision(block, unit, "pruned", (LEAST, f"{self.rated}, {fewer:,} parameters fewer"))
        if isinstance(self.repair, Affine):
            norm = maker(block.entry)
            fold(norm, self.repair)
            yield Decision(norm.name or "", norm.op_type, "folded", REPAIRED)
        elif self.repair is not None:
            yield Decision(self.name, f"{unit}s", "skipped", self.repair)


@dataclass
class _Search:
    """Removes units from a copy of a model.

    Attributes:
        asked: The options.
        work: The copy.
        whole: The model as it was.
        samples: What it is measured on.
    """

    asked: Layers
    work: ir.Model
    whole: ir.Model
    samples: Sequence[Sample]
    _left: dict[str, float] = field(default_factory=dict)

    def run(self, free: Sequence[str], count: int) -> Iterator[_Step]:
        """Find what to remove, the least first, until ``count`` are gone; nothing where no sample was seen."""
        rounds = count if self.asked.criterion == "influence" else sum(range(len(free) - count + 1, len(free) + 1))
        advance = every(rounds, self.asked.advance)
        if not self.samples:
            return
        means: dict[str, str] = {}  # value of the copy to the value of the whole model that it stands for
        for _ in range(count):
            blocks = {b.name: b for b in FIND[self.asked.unit](self.work) if b.name in free and b.refusal is None}
            rated = self._rated(list(blocks.values()), advance)
            if not rated:
                return
            name = min(rated, key=rated.__getitem__)
            block = blocks[name]
            self._left = {other: number for other, number in rated.items() if other != name}
            target = means.pop(str(block.exit.name), str(block.exit.name))
            repair = None
            if self.asked.repair:
                without = partial(self._without, name)
                repair = fit((self.work, block), (self.whole, target), self.samples, without)
            step = _Step(name, f"{self.asked.criterion} {rated[name]:.4f}", repair)
            list(step.apply(self.work, self.asked.unit))
            means[str(block.entry.name)] = target
            yield step

    def stayed(self) -> Iterator[Decision]:
        """Say how the others were rated in the end."""
        for block in FIND[self.asked.unit](self.work):
            if block.name in self._left:
                rated = f"{self.asked.criterion} {self._left[block.name]:.4f}"
                yield _decision(block, self.asked.unit, "kept", (MORE, rated))

    def _rated(self, blocks: Sequence[Block], advance: Callable[[], None]) -> dict[str, float]:
        if self.asked.criterion == "influence":
            return influences(self.work, blocks, self.samples, advance)
        names = [block.name for block in blocks]
        return {name: change(self.whole, self._without(name)[0], self.samples, advance) for name in names}

    def _without(self, name: str) -> Removed:
        copy = self.work.clone()
        block = _named(copy, self.asked.unit, name)
        remove(block)
        return copy, block.entry.producer()


def _named(model: ir.Model, unit: Unit, name: str) -> Block:
    return next(block for block in FIND[unit](model) if block.name == name)


def _parameters(model: ir.Model) -> int:
    """Numbers in the initializers of the main graph."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.size for tensor in tensors if tensor is not None)


def _decision(block: Block, unit: Unit, action: str, told: tuple[str, str] = ("", "")) -> Decision:
    """What became of a unit: the reason, and its numbers; one that is pruned is none of one."""
    return Decision(block.name, f"{unit}s", action, *told, (0 if action == "pruned" else 1, 1))
