"""Experiments: the first tokens of many rows of the real loop, counted into the cells of their exact distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qexport.runtime.certifying import gtest
from qexport.runtime.certifying.exact import Tree
from qexport.runtime.certifying.gtest import Fit, Table
from qexport.runtime.certifying.log import record
from qexport.runtime.certifying.subject import LOOKUP, PLAIN, Subject, Way, make_rows
from qexport.runtime.sampling.settings import Sampling
from qexport.runtime.speculation.proposal import Reference

SIMULATED = 5_000  # experiments that a seed is compared with


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to decode, many times over.

    Attributes:
        name: For the certificate.
        sampling: Settings; each experiment has a seed of its own.
        ahead: Tokens that are proposed at most.
        proposer: As :class:`Way` has it.
        steady: The same.
        coupled: The same.
        share: Of the samples that arms have.
        batch: Rows of a batch; as many as an experiment has where it is 0.
    """

    name: str
    sampling: Sampling
    ahead: int
    proposer: str
    steady: bool = True
    coupled: bool = False
    share: float = 1.0
    batch: int = 0


@dataclass(frozen=True, slots=True)
class Counted:
    """What an arm gave.

    Attributes:
        arm: Which.
        trees: One for each prompt.
        counts: ``[seeds, cells]`` for each prompt.
    """

    arm: Arm
    trees: Sequence[Tree]
    counts: Sequence[NDArray[np.int64]]

    def tables(self) -> list[Table]:
        """All seeds together."""
        return [Table(counts.sum(axis=0), tree.chances) for tree, counts in zip(self.trees, self.counts, strict=True)]

    def fit(self) -> Fit:
        """The G-test of all seeds and prompts."""
        return gtest.fit(self.tables())


def count(subject: Subject, arm: Arm, trees: Sequence[Tree], seeds: Sequence[int], samples: int) -> Counted:
    """Run an arm.

    Args:
        subject: Whose loop runs.
        arm: How.
        trees: One for each prompt; rows have them in turn, so that batches are ragged.
        seeds: One experiment each.
        samples: Rows of all experiments together.
    """
    rows = max(len(trees), round(samples * arm.share / len(seeds)))
    copied = [tree.prompt for tree in trees] if LOOKUP in arm.proposer else []
    sources = references(subject, copied, 2 * trees[0].depth)
    counts = [np.zeros((len(seeds), tree.chances.size), np.int64) for tree in trees]
    for place, seed in enumerate(seeds):
        outcomes: list[list[list[int]]] = [[] for _ in trees]
        way = Way(replace(arm.sampling, seed=seed), arm.ahead, arm.proposer, arm.steady, arm.coupled)
        for index, tokens in enumerate(_outputs(subject, way, trees, (rows, arm.batch or rows), sources)):
            outcomes[index % len(trees)].append(tokens)
        for tree, found, mine in zip(trees, outcomes, counts, strict=True):
            mine[place] = tree.count(found)
    return Counted(arm, trees, counts)


def _outputs(
    subject: Subject, way: Way, trees: Sequence[Tree], sizes: tuple[int, int], sources: Sequence[Reference]
) -> Iterator[list[int]]:
    """First tokens of so many rows, in batches of so many."""
    rows, batch = sizes
    made = make_rows([tree.prompt for tree in trees], rows, sources)
    for first in range(0, rows, batch):
        yield from record(subject, way, made[first : first + batch], trees[0].depth, exact=False).outputs()


def references(subject: Subject, prompts: Sequence[Sequence[int]], length: int) -> list[Reference]:
    """Texts to copy from: each prompt with what the target likes best behind it."""
    if not prompts:
        return []
    run = record(subject, Way(Sampling(), proposer=PLAIN), make_rows(prompts, len(prompts)), length)
    rows = zip(run.prompts, run.outputs(), strict=True)
    return [Reference(f"text {index}", (*prompt, *tokens)) for index, (prompt, tokens) in enumerate(rows)]


def by_seed(arms: Sequence[Counted], rng: np.random.Generator) -> NDArray[np.float64]:
    """A p-value for each seed, of all arms together, ``[seeds]``.

    A seed has few samples, so its G is compared with that of simulated experiments instead of with chi-squared. Equal
    values are told apart at random, which makes p-values of discrete counts uniform.
    """
    tables = [(tree.chances, counts) for arm in arms for tree, counts in zip(arm.trees, arm.counts, strict=True)]
    pooled = []
    for chances, counts in tables:
        cells = gtest.pools(chances, int(counts.sum()))
        pooled.append((gtest.gather(chances, cells), np.stack([gtest.gather(row, cells) for row in counts])))
    sizes = [int(counts[0].sum()) for _, counts in pooled]
    null = np.sort(gtest.simulated([chances for chances, _ in pooled], sizes, SIMULATED, rng))
    seeds = range(len(pooled[0][1]))
    found = np.array([gtest.statistic([Table(counts[seed], chances) for chances, counts in pooled]) for seed in seeds])
    found -= 1e-9 * (1 + found)  # as the same counts may add up differently
    above = SIMULATED - np.searchsorted(null, found, side="left")
    equal = np.searchsorted(null, found + 2e-9 * (1 + found), side="right") - np.searchsorted(null, found, side="left")
    return np.asarray((above - equal + rng.random(found.size) * (equal + 1)) / (SIMULATED + 1), np.float64)
