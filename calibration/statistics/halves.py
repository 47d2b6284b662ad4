"""Gram matrices of two halves of the samples, so that what is fitted to one can be judged by the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import onnx_ir as ir

from qexport.calibration.reading.data import Sample
from qexport.calibration.statistics.collect import numbered, stream
from qexport.calibration.statistics.gram import Gram, Tap, cut
from qexport.errors import DataInvalid

Halves = tuple[Gram, Gram]


def measure_halves(
    model: ir.Model, taps: Sequence[Tap], samples: Iterable[Sample], advance: Callable[[], None] = lambda: None
) -> dict[Tap, Halves]:
    """Return the Gram matrices of ``taps`` over every other sample, and over those between, in one run of them all.

    Raises:
        DataInvalid: NaN or infinity, naming the sample and the value.
    """
    sums = {tap: (Gram(tap.size), Gram(tap.size)) for tap in taps}
    names = list(dict.fromkeys(tap.value for tap in taps))
    for turn, (index, _, values) in enumerate(stream(cut(model, names), names, numbered(samples, advance))):
        for tap, halves in sums.items():
            try:
                for rows in tap.rows(values[tap.value]):
                    halves[turn % 2].add(rows)
            except DataInvalid as error:
                raise DataInvalid(f"{error.what} at {tap.value!r}", where=f"sample {index}", hint=error.hint) from error
    for halves in sums.values():
        for half in halves:
            half.settle()
    return sums
