"""The G-test: how likely counts like these are where chances are those, and what deviation it would have found.

G = 2 sum O ln(O / E) (Wilks 1938; R. Sokal and F. Rohlf, *Biometry*, section 17.2) with Williams' correction (D.
Williams, *Biometrika* 63, 1976), which makes it follow chi-squared at small expectations too. Cells that expect less
than ``LEAST`` are one cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.errors import EnvironmentMismatch

Counts: TypeAlias = NDArray[np.int64]  # [cells]
Chances: TypeAlias = NDArray[np.float64]  # [cells], add up to 1

LEAST = 5.0  # expected in a cell (W. Cochran, 1954)
_POWER = 0.99


@dataclass(frozen=True, slots=True)
class Table:
    """Counts of one experiment beside what was to be expected.

    Attributes:
        counts: ``[cells]``.
        chances: Of the same cells.
    """

    counts: Counts
    chances: Chances


@dataclass(frozen=True, slots=True)
class Fit:
    """What a test says of some tables together.

    Attributes:
        statistic: G, with Williams' correction, summed.
        freedom: Degrees of freedom.
        p: The chance of a G this large or larger; 0 where something happened that cannot.
        samples: How many were counted.
        impossible: Samples in cells without a chance.
    """

    statistic: float
    freedom: int
    p: float
    samples: int
    impossible: int = 0


def load_scipy() -> ModuleType:
    """Import scipy with what is used of it, or say what to install."""
    try:
        import scipy.special
        import scipy.stats
    except ImportError as error:
        what = "p-values need the package scipy"
        raise EnvironmentMismatch(what, hint="pip install 'qexport[certify]'") from error
    return scipy  # type: ignore[no-any-return]  # it has no types


def fit(tables: Sequence[Table]) -> Fit:
    """Test all tables together: independent ones add up, and so do their degrees of freedom."""
    statistic, freedom, samples, impossible = 0.0, 0, 0, 0
    for table in tables:
        impossible += int(table.counts[table.chances == 0].sum())
        total = int(table.counts.sum())
        samples += total
        cells = pools(table.chances, total)
        counts, chances = gather(table.counts, cells), gather(table.chances, cells)
        if counts.size > 1:
            statistic += float(_statistic(counts, chances)) / _williams(chances, total)
            freedom += counts.size - 1
    p = 0.0 if impossible else tail(statistic, freedom)
    return Fit(statistic, freedom, p, samples, impossible)


def tail(statistic: float, freedom: int) -> float:
    """The chance that chi-squared is at least that large; 1 where nothing could be compared."""
    return float(load_scipy().special.chdtrc(freedom, statistic)) if freedom else 1.0


def uniformity(values: NDArray[np.float64]) -> float:
    """p-value of A. Kolmogorov's test (1933) that these are uniform on [0, 1]; exact up to some thousands."""
    return float(load_scipy().stats.kstest(values, "uniform").pvalue)


def holm(values: Sequence[float], level: float) -> list[bool]:
    """Which hypotheses to reject so that the chance of any false alarm is at most ``level`` (S. Holm, 1979)."""
    rejected = [False] * len(values)
    for done, index in enumerate(np.argsort(values, kind="stable")):
        if values[index] > level / (len(values) - done):
            break
        rejected[index] = True
    return rejected


def power(freedom: int, samples: int, level: float) -> float:
    """The total variation from which on every deviation is found with 99 %.

    A deviation d from chances p has the noncentrality n sum d^2 / p, which is no less than 4 n TV^2 (Cauchy-Schwarz on
    the cells where d is positive and on the others). So what is found for sure follows from the noncentral chi-squared.

    Args:
        freedom: Degrees of freedom.
        samples: Of all tables; where there are several, the total variation is their mean.
        level: p-value below which the test fails.
    """
    if not freedom or not samples:
        return 1.0
    special = load_scipy().special
    noncentrality = special.chndtrinc(special.chdtri(freedom, level), freedom, 1 - _POWER)
    return min(1.0, float(np.sqrt(noncentrality / (4 * samples))))


def pools(chances: Chances, samples: int) -> NDArray[np.int64]:
    """The pool of every cell, ``[cells]``: large cells are alone, the others together, -1 is for cells with no chance.

    Where the others together expect too little, the smallest of the large ones joins them.
    """
    found = np.full(chances.size, -1, np.int64)
    order = np.flatnonzero(chances > 0)
    order = order[np.argsort(chances[order], kind="stable")]
    small = int(np.searchsorted(chances[order] * samples, LEAST))
    if small and chances[order[:small]].sum() * samples < LEAST:
        small += 1
    found[order[:small]] = 0
    found[order[small:]] = np.arange(order[small:].size) + bool(small)
    return found


def gather(numbers: NDArray[np.generic], cells: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums of ``numbers`` by pool."""
    there = cells >= 0
    return np.bincount(cells[there], weights=numbers[there].astype(np.float64)).astype(np.float64)


def simulated(chances: Sequence[Chances], samples: Sequence[int], rounds: int, rng: np.random.Generator) -> Chances:
    """G of ``rounds`` experiments in which the chances are right, with one multinomial for each table, ``[rounds]``."""
    total = np.zeros(rounds)
    for given, count in zip(chances, samples, strict=True):
        total += _statistic(rng.multinomial(count, given / given.sum(), rounds), given)
    return total


def statistic(tables: Sequence[Table]) -> float:
    """G of all tables, as it is, without pools."""
    return float(sum(_statistic(table.counts, table.chances) for table in tables))


def _statistic(counts: NDArray[np.generic], chances: Chances) -> NDArray[np.float64]:
    observed = counts.astype(np.float64)
    expected = observed.sum(axis=-1, keepdims=True) * chances
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(observed > 0, observed * np.log(observed / expected), 0.0)
    total: NDArray[np.float64] = 2 * terms.sum(axis=-1)
    return total


def _williams(chances: Chances, samples: int) -> float:
    return float(1 + ((1 / chances).sum() - 1) / (6 * samples * (chances.size - 1)))
