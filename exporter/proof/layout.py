"""How samples go into a model and which rows of its outputs are theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.calibration.reading.spec import Sample
from qexport.errors import ModelInvalid
from qexport.passes.portable import MASK
from qexport.runtime.backends.ort import OrtSession

BATCH = 16
ELEMENTS = 1 << 22  # of all outputs together in one run, unless a single sample has more
Feeds: TypeAlias = dict[str, NDArray[Any]]
Vectors: TypeAlias = NDArray[np.float64]  # [samples of a batch, everything else flattened]


@dataclass(frozen=True, slots=True)
class Layout:
    """How to run a model on many samples and read one row per sample.

    Attributes:
        ranks: Outputs to judge, in the model's order, and how many axes each has.
        samples: Most samples of a run.
        rows: Rows that every run must have, where the model fixes them; a short batch repeats its last sample.
        whole: Whether a run holds one sample and all of every output is its.
        wanted: The output to judge by, where the task names one.
    """

    ranks: Mapping[str, int]
    samples: int = BATCH
    rows: int | None = None
    whole: bool = False
    wanted: str | None = None

    @property
    def vectors(self) -> tuple[str, ...]:
        """Outputs with two axes, such as embeddings or logits."""
        return tuple(name for name, rank in self.ranks.items() if rank == 2)

    @property
    def main(self) -> str:
        """The output to judge by: the one wanted if there is such a one, the first vector, else the first one."""
        if self.wanted is not None and self.wanted in self.ranks:
            return self.wanted
        return next(iter(self.vectors or self.ranks))

    def run(self, session: OrtSession, feeds: Feeds, count: int) -> dict[str, Vectors]:
        """Run a batch of ``count`` samples; positions that the attention mask hides are zero in every output."""
        feeds = fill(feeds, self.rows)
        outputs = session.run(feeds, list(self.ranks))
        hidden = {name: _without_padding(array, feeds.get(MASK)) for name, array in outputs.items()}
        return {
            name: array.reshape(1, -1) if self.whole else array[:count].reshape(count, -1)
            for name, array in hidden.items()
        }


def find_layout(session: OrtSession, sample: Sample, static: int | None, wanted: str | None = None) -> Layout:
    """Try a model on copies of one sample: an output is judged by rows if it has as many as there are copies.

    Where no output has, samples are to be run one by one. Outputs of integers count only where there are no others.

    Args:
        session: The model.
        sample: Any sample.
        static: The batch size, where the model fixes it.
        wanted: The output that a task judges, where it names one.

    Raises:
        ModelInvalid: No output is a tensor of numbers.
    """
    sizes = (2, 3) if static is None else (static,)
    tried = [session.run({name: np.repeat(a[None], size, axis=0) for name, a in sample.items()}) for size in sizes]
    numbers = {name: array for name, array in tried[0].items() if _kind(array) in "fiub"}
    names = [name for name, array in numbers.items() if _kind(array) == "f"] or list(numbers)
    if not names:
        raise ModelInvalid("no output is a tensor of numbers")
    rows = [n for n in names if all(t[n].shape[:1] == (size,) for t, size in zip(tried, sizes, strict=True))]
    if static == 1 or not rows:
        return Layout({name: numbers[name].ndim for name in names}, samples=1, rows=static, whole=True, wanted=wanted)
    size = sum(numbers[name].size for name in rows) // sizes[0]
    samples = static or min(BATCH, max(1, ELEMENTS // max(size, 1)))
    return Layout({name: numbers[name].ndim for name in rows}, samples, rows=static, wanted=wanted)


def fill(feeds: Feeds, rows: int | None) -> Feeds:
    """Repeat the last sample of a batch until there are ``rows``; ``None`` leaves it as it is."""
    if rows is None:
        return feeds
    return {name: a if len(a) == rows else np.pad(a, _behind(a, rows), mode="edge") for name, a in feeds.items()}


def _behind(array: NDArray[Any], rows: int) -> list[tuple[int, int]]:
    return [(0, rows - len(array)), *[(0, 0)] * (array.ndim - 1)]


def _kind(array: object) -> str:
    return array.dtype.kind if isinstance(array, np.ndarray) else "?"


def _without_padding(output: NDArray[Any], mask: NDArray[Any] | None) -> Vectors:
    values = np.asarray(output, np.float64)
    if mask is not None and values.ndim >= 3 and values.shape[:2] == mask.shape:
        values = np.where(mask.reshape(*mask.shape, *[1] * (values.ndim - 2)) != 0, values, 0.0)
    return values
