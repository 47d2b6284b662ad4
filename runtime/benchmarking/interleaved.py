"""Several ways to decode the same prompts, in turn in one run, so that what disturbs one disturbs all.

Each prompt is decoded in every way before the next one is, in another order each time. A way's speed over the baseline
is the ratio of their tokens per second over all prompts; its interval is that of a bootstrap over prompts, whose ways
stay together (Efron 1979): what the choice of prompts leaves open, not what a noisy machine does to a single call, of
which every prompt's median over the rounds is taken.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qexport.errors import UsageError
from qexport.runtime.accounting.records import Run
from qexport.runtime.generation.generator import Generator
from qexport.runtime.generation.prompts import Prompt, Text
from qexport.runtime.generation.stops import Stop
from qexport.runtime.sampling.settings import Sampling

RESAMPLES = 2000
COVERED = (2.5, 97.5)  # percentiles of the interval


@dataclass(frozen=True, slots=True)
class Decoded:
    """One prompt, decoded once.

    Attributes:
        tokens: What came out.
        seconds: From the call to the last token, the prompt included, by a clock outside of the runtime.
        run: What the runtime says of it.
    """

    tokens: tuple[int, ...]
    seconds: float
    run: Run


@dataclass(frozen=True, slots=True)
class Way:
    """A way to decode.

    Attributes:
        name: Short and unique.
        decode: Decodes the prompt of a number.
        ahead: Tokens that a draft proposes, where their number is fixed.
    """

    name: str
    decode: Callable[[int], Decoded]
    ahead: int | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """What one way did.

    Attributes:
        way: Which.
        decoded: ``[rounds][prompts]``.
    """

    way: Way
    decoded: tuple[tuple[Decoded, ...], ...]

    @property
    def runs(self) -> list[Run]:
        """Of all rounds."""
        return [found.run for row in self.decoded for found in row]

    @property
    def tokens(self) -> NDArray[np.float64]:
        """Tokens of each prompt."""
        return np.array([len(found.tokens) for found in self.decoded[0]], np.float64)

    @property
    def seconds(self) -> NDArray[np.float64]:
        """Seconds of each prompt: the median of its rounds."""
        return np.array([statistics.median(row[i].seconds for row in self.decoded) for i in range(len(self.tokens))])

    @property
    def tokens_per_second(self) -> float:
        """Over all prompts."""
        return float(self.tokens.sum() / self.seconds.sum())

    def same(self, other: Timing) -> int:
        """How many prompts have the same tokens in both."""
        return sum(a.tokens == b.tokens for a, b in zip(self.decoded[0], other.decoded[0], strict=True))


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of speeds and the interval that holds it in 95 of 100 choices of prompts."""

    value: float
    low: float
    high: float


def interleave(ways: Sequence[Way], prompts: int, rounds: int, told: Callable[[], None] = lambda: None) -> list[Timing]:
    """Decode all prompts in all ways.

    Args:
        ways: In the order of the result.
        prompts: How many.
        rounds: How often.
        told: Is called after each prompt.

    Raises:
        UsageError: There is nothing to do.
    """
    if not ways or prompts < 1 or rounds < 1:
        raise UsageError(f"{len(ways)} ways, {prompts} prompts, {rounds} rounds", hint="each has to be one at least")
    for way in ways:
        way.decode(0)  # warms up
    found: list[list[list[Decoded]]] = [[[] for _ in range(rounds)] for _ in ways]
    for number in range(rounds):
        for prompt in range(prompts):
            first = (number * prompts + prompt) % len(ways)
            for place in (*range(first, len(ways)), *range(first)):
                found[place][number].append(ways[place].decode(prompt))
            told()
    return [Timing(way, tuple(map(tuple, rows))) for way, rows in zip(ways, found, strict=True)]


def generator_way(
    name: str, generator: Generator, prompts: Sequence[Text | Prompt], sampling: Sampling | None, stop: Stop
) -> Way:
    """A generator as a way to decode: each prompt is a request of its own."""
    ahead = generator.options.speculate

    def decode(number: int) -> Decoded:
        began = time.perf_counter()
        batch = generator.batch([prompts[number]], sampling, stop)
        tokens = tuple(token.id for _, token in batch)
        return Decoded(tokens, time.perf_counter() - began, batch.runs[0])

    return Way(name, decode, ahead if isinstance(ahead, int) else None)


def compare(timing: Timing, baseline: Timing) -> Ratio:
    """Tokens per second of one way over those of another."""
    return ratio_of_speeds((timing.tokens, timing.seconds), (baseline.tokens, baseline.seconds))


def ratio_of_speeds(
    over: tuple[NDArray[np.float64], NDArray[np.float64]], under: tuple[NDArray[np.float64], NDArray[np.float64]]
) -> Ratio:
    """The ratio of two sums of tokens over two sums of seconds, ``[prompts]`` each, with its interval."""
    columns = np.stack([*over, *under])
    count = columns.shape[1]
    drawn = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    sums = columns[:, drawn].sum(axis=2)  # [4, resamples]
    ratios = sums[0] / sums[1] * sums[3] / sums[2]
    whole = columns.sum(axis=1)
    low, high = np.percentile(ratios, COVERED)
    return Ratio(float(whole[0] / whole[1] * whole[3] / whole[2]), float(low), float(high))
