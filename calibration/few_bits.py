"""What passes share that choose how weights in few bits are rounded, by the Gram matrices of what they read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar, Literal

import onnx_ir as ir

from qexport.calibration.least import check_least
from qexport.calibration.reading.data import Dataset
from qexport.calibration.statistics.gram import Gram, Tap, measure
from qexport.errors import UsageError
from qexport.passes.base import Decision, Pass
from qexport.passes.numbers.groups import Grid
from qexport.passes.placement import Site
from qexport.passes.target import find_target
from qexport.passes.writing.fit import choose_grids
from qexport.passes.writing.lowbit import Choice

UNSEEN = "not calibrated: no sample reached it"


@dataclass(frozen=True)
class FewBits(Pass):
    """Options of a pass that works for ``weight-only``, which has to be given the same grid."""

    one_at_a_time: ClassVar[bool] = True

    data: Dataset | None = field(default=None, metadata={"bound": True})
    advance: Callable[[], None] = field(default=lambda: None, metadata={"bound": True})
    target: str = "tensorrt-rtx"
    samples: int = 128
    bits: Literal[8, 4, 3] = 4
    group: int = 128
    """Inputs that share a scale; 0 gives one scale to each output channel."""
    fit: bool = False
    """Whether the group is halved, down to 16, for a product whose inputs it does not divide."""
    symmetric: bool = True
    """Whether there are no zero points; engines take none."""
    min_dim: int = 32
    """Smallest K and N of a product worth storing in few bits."""
    head: bool = True
    """Whether the product that makes an output of the model is stored in few bits too."""
    keep: tuple[str, ...] = ()
    """Names of nodes that are left alone; weight-only must keep them too if they are to stay in float."""

    def __post_init__(self) -> None:
        check_least(type(self).__name__.lower(), self, samples=1, group=0)

    def chosen(self, model: ir.Model) -> tuple[dict[Site, Grid], list[Decision]]:
        """The products to look at, each with its grid, and why others are not.

        Raises:
            UsageError: There is no data; a group fits not; a name in ``keep`` is no node's.
        """
        self.demand_data()
        choice, wanted = Choice(self.min_dim, self.keep, self.head), Grid(self.bits, self.group, self.symmetric)
        return choose_grids(model, choice, wanted, find_target(self.target), fit=self.fit)

    def demand_data(self) -> None:
        """Raise ``UsageError`` where there is none."""
        if self.data is None:
            name = type(self).__name__.lower()
            raise UsageError(f"{name} needs calibration data", hint="give real samples with --calib")

    def measured(self, rounds: Sequence[Sequence[Tap]], model: ir.Model) -> Iterator[tuple[Tap, Gram]]:
        """Gram matrices of one round after the other, each of the model as it is by then."""
        assert self.data is not None
        advance = every(len(rounds), self.advance)
        for taps in rounds:
            yield from measure(model, taps, islice(self.data, self.samples), advance).items()


def every(count: int, advance: Callable[[], None]) -> Callable[[], None]:
    """Call ``advance`` at every ``count``-th call: the progress of one round over the samples, for many."""
    calls = itertools.count(1)

    def tick() -> None:
        if next(calls) % count == 0:
            advance()

    return tick
