"""What a run shows of the numbers that it was decided by.

A token drawn by inverting a distribution tells between which bounds the number was that it was drawn with; so does a
token that was taken or not of the number that decided it. The distributions are those of whole rows that both models
read again. From the bounds follow two things: whether the number that belongs to that position and purpose lies there,
which is checked one by one, and, with a random place between the bounds, numbers that are uniform and independent if
and only if decisions were (randomized probability integral transform: J. Smith 1985).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qexport.runtime.certifying import reference
from qexport.runtime.certifying.log import Line, Run
from qexport.runtime.certifying.reference import Chances, Wanted
from qexport.runtime.certifying.subject import Subject
from qexport.runtime.decoder import Decoder
from qexport.runtime.sampling.noise import Purpose, uniform

_SLACK = 4.0  # logits that differ by d move a share by d / 2 at most, each of two models, numerators and sums
_LEAST = 1e-9


@dataclass(frozen=True, slots=True)
class Reading:
    """One number that was used.

    Attributes:
        run: Which run.
        row: Which row of it.
        position: Of the token.
        purpose: For what.
        low: The number was at least that.
        high: And less than that.
        used: The number that belongs there.
        slack: By how much bounds may be wrong, as logits depend on how many tokens are read at once.
        rank: How likely the token is that it decided on, 0 for the likeliest; -1 where that does not matter.
    """

    run: int
    row: int
    position: int
    purpose: Purpose
    low: float
    high: float
    used: float
    slack: float
    rank: int = -1

    @property
    def inside(self) -> bool:
        """Whether the number lies there."""
        return self.low <= self.used < self.high

    @property
    def near(self) -> bool:
        """Whether it lies there but for rounding."""
        return self.low - self.slack <= self.used < self.high + self.slack


@dataclass(slots=True)
class Evidence:
    """All that was read off some runs.

    Attributes:
        readings: The numbers.
        outputs: For each token that came out a pair of bounds in [0, 1]: its place in the target's distribution, with
            the tokens first that the draft likes more than the target.
        broken: Lines that contradict themselves or those before, in words.
        unsure: Decisions so near an edge of truncation that nothing follows from them.
    """

    readings: list[Reading] = field(default_factory=list)
    outputs: list[tuple[float, float]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    unsure: int = 0

    def missed(self) -> list[Reading]:
        """Numbers that are not where the decisions say they were."""
        return [reading for reading in self.readings if not reading.near]

    def places(self, purpose: Purpose, rng: np.random.Generator) -> dict[tuple[int, int, int], float]:
        """A random place between the bounds by run, row and position."""
        return {
            (reading.run, reading.row, reading.position): reading.low + (reading.high - reading.low) * rng.random()
            for reading in self.readings
            if reading.purpose is purpose
        }


def gather(runs: Iterable[Run], subject: Subject, noise: float) -> Evidence:
    """Read the rows of sampled runs again and collect what they show.

    Args:
        runs: None of them greedy.
        subject: Its models.
        noise: By how much logits differ when tokens are read one by one or together.
    """
    evidence = Evidence()
    for number, run in enumerate(runs):
        assert not run.way.sampling.greedy, "greedy runs leave nothing to chance"
        for row, prompt in enumerate(run.prompts):
            ids = [*prompt, *run.tokens(row)]
            drawn = any(line.drawn for line in run.lines if line.row == row)
            models = _read(subject.truth, ids), _read(subject.draft_truth if drawn else None, ids)
            at = len(prompt)
            for line in (line for line in run.lines if line.row == row):
                wrong = contradiction(line, at)
                if wrong:
                    evidence.broken.append(f"round {line.round} of row {line.row}: {wrong}")
                else:
                    _Line(evidence, number, run, line, noise).read(ids, *models)
                at += len(line.tokens)
    return evidence


def contradiction(line: Line, position: int) -> str:
    """What is wrong with a line by itself, or with its place; nothing for sound ones."""
    taken = line.accepted
    if line.position != position:
        return f"it stands at {line.position}, and {position} tokens were there"
    if len(line.tokens) != taken + 1 or not 0 <= taken <= len(line.proposed):
        return f"{taken} of {len(line.proposed)} proposed tokens were taken and {len(line.tokens)} came out"
    if line.tokens[:taken] != line.proposed[:taken]:
        return "what came out is not what was taken"
    if not line.drawn and line.tokens[taken:] == line.proposed[taken : taken + 1]:
        return "a token was taken and not counted"
    return ""


def _read(decoder: Decoder | None, ids: Sequence[int]) -> NDArray[np.float32] | None:
    return None if decoder is None else reference.whole(decoder, ids[:-1])


@dataclass(frozen=True, slots=True)
class _Line:
    """The numbers of one line."""

    evidence: Evidence
    number: int
    run: Run
    line: Line
    noise: float

    def read(self, ids: Sequence[int], target: NDArray[np.float32] | None, draft: NDArray[np.float32] | None) -> None:
        line, sampling = self.line, self.run.way.sampling
        assert target is not None, "there is a target"
        for place, token in enumerate(line.tokens):
            at = line.position + place
            q = reference.wanted(target[at - 1], sampling, ids[:at])
            p = None
            if line.drawn and draft is not None:
                p = reference.wanted(_fit(draft[at - 1], q.chances.size), sampling, ids[:at])
            slack = self._slack()
            if min(q.edge, 1.0 if p is None else p.edge) < slack:
                self.evidence.unsure += 1
                continue
            self.evidence.outputs.append(output_bounds(token, q.chances, None if p is None else p.chances))
            self.evidence.readings.extend(self._readings(place, token, q, p))

    def _readings(self, place: int, token: int, q: Wanted, p: Wanted | None) -> Iterator[Reading]:
        line = self.line
        candidate = line.proposed[place] if place < len(line.proposed) else line.spare
        if p is None or candidate is None:
            yield self._reading(place, Purpose.TOKEN, bounds(token, q.chances))
            return
        yield self._reading(place, Purpose.DRAFT, bounds(candidate, p.chances))
        drafted, likely = p.chances[candidate], q.chances[candidate]
        limit = min(1.0, float(likely / drafted)) if drafted > 0 else 1.0
        taken = place < line.accepted or (place == len(line.proposed) and token == candidate)
        rank = int((p.chances > drafted).sum())
        yield self._reading(place, Purpose.ACCEPT, (0.0, limit) if taken else (limit, 1.0), rank=rank)
        if not taken:
            left = np.maximum(q.chances - p.chances, 0)
            mass = float(left.sum())
            if mass > 0:
                yield self._reading(place, Purpose.RESIDUAL, bounds(token, left), share=mass)

    def _reading(
        self, place: int, purpose: Purpose, between: tuple[float, float], *, share: float = 1.0, rank: int = -1
    ) -> Reading:
        run, line = self.run, self.line
        at = line.position + place
        used = uniform(run.way.sampling.seed, run.streams[line.row], at, purpose)
        return Reading(self.number, line.row, at, purpose, *between, used, self._slack() / share, rank)

    def _slack(self) -> float:
        return max(_LEAST, _SLACK * self.noise / self.run.way.sampling.temperature)


def bounds(token: int, chances: Chances) -> tuple[float, float]:
    """Between which numbers the inverse of the distribution, which may add up to anything, is ``token``."""
    total = float(chances.sum())
    low = float(chances[:token].sum())
    return low / total, (low + float(chances[token])) / total


def output_bounds(token: int, target: Chances, draft: Chances | None) -> tuple[float, float]:
    """The same where tokens stand in the order of target over draft, or of the target where there is none."""
    if draft is None:
        worth = target
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            worth = np.where(target > 0, target / draft, -1.0)
    low = float(target[worth < worth[token]].sum())
    return low, min(1.0, low + float(target[worth == worth[token]].sum()))


def _fit(scores: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """As many scores as the target has."""
    if scores.size >= size:
        return scores[:size]
    return np.pad(scores, (0, size - scores.size), constant_values=-np.inf)
