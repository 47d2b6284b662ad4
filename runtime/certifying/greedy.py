"""Greedy output with and without looking ahead: the same tokens, or a tie that no computation in float32 decides.

A model gives slightly other logits when it reads several tokens at once than when it reads them one by one, since sums
are added in another order. Where the two best tokens are nearer than that, either is right, and rows go apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qexport.runtime.certifying import reference
from qexport.runtime.certifying.log import Run, record
from qexport.runtime.certifying.subject import PLAIN, Subject, Way, make_rows
from qexport.runtime.decoder import Decoder
from qexport.runtime.sampling.settings import Sampling

Logits = NDArray[np.float32]  # [tokens, vocabulary]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token of a row that is another one than plain decoding has.

    Attributes:
        ahead: Tokens that were proposed at most.
        proposer: By whom.
        row: Which prompt.
        position: Of the token.
        margin: Between the two best logits there.
        tie: Whether that is within the noise.
    """

    ahead: int
    proposer: str
    row: int
    position: int
    margin: float
    tie: bool


@dataclass(frozen=True, slots=True)
class Identity:
    """Speculative against plain decoding.

    Attributes:
        rows: Rows that were compared, of all ways together.
        tokens: Tokens of them.
        same: Rows that are equal to the end.
        differences: The other rows.
        margin: The least between the two best logits at any position of plain decoding.
        noise: By how much logits differ where tokens are read one by one, a few at a time, or all at once.
    """

    rows: int
    tokens: int
    same: int
    differences: tuple[Difference, ...]
    margin: float
    noise: float

    @property
    def passed(self) -> bool:
        """Whether nothing but ties tells the outputs apart."""
        return all(found.tie for found in self.differences)


def compare(subject: Subject, prompts: Sequence[Sequence[int]], length: int, ways: Sequence[Way]) -> Identity:
    """Decode every prompt plainly and in each way, greedily, and compare.

    Args:
        subject: Whose loop runs.
        prompts: One row each, all in one batch.
        length: Tokens of each.
        ways: Their samplings are left aside.
    """
    greedy = Sampling()
    plain = record(subject, Way(greedy, proposer=PLAIN), make_rows(prompts, len(prompts)), length)
    truths = [Truth(subject.truth, prompt, tokens) for prompt, tokens in zip(prompts, plain.outputs(), strict=True)]
    noise = max(truth.noise for truth in truths)
    differences: list[Difference] = []
    for way in ways:
        rows = make_rows(prompts, len(prompts))
        run = record(subject, Way(greedy, way.ahead, way.proposer), rows, length)
        differences += _differences(run, plain, truths, noise)
    count = len(ways) * len(prompts)
    margin = min(float(truth.margins.min()) for truth in truths)
    return Identity(count, count * length, count - len(differences), tuple(differences), margin, noise)


def _differences(run: Run, plain: Run, truths: Sequence[Truth], noise: float) -> list[Difference]:
    found = []
    for row, (mine, theirs) in enumerate(zip(run.outputs(), plain.outputs(), strict=True)):
        if mine != theirs:
            pairs = zip(mine, theirs, strict=False)
            place = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(mine), len(theirs)))
            margin = truths[row].gap(place, mine[place]) if place < len(mine) and place < len(theirs) else np.inf
            position = len(run.prompts[row]) + place
            found.append(Difference(run.way.ahead, run.way.proposer, row, position, margin, margin <= 2 * noise))
    return found


class Truth:
    """Logits of one row, read in several ways.

    Attributes:
        margins: Between the two best logits before each token of the output, ``[tokens]``.
        noise: The largest difference between two ways of reading.
    """

    def __init__(self, decoder: Decoder, prompt: Sequence[int], tokens: Sequence[int], widths: Sequence[int] = (1, 5)):
        """Read it whole, and behind the prompt in pieces of these widths."""
        ids, first = [*prompt, *tokens[:-1]], len(prompt) - 1
        self._logits = reference.whole(decoder, ids)[first:]
        others = [_in_pieces(decoder, ids, first + 1, width) for width in widths]
        self.noise = max((float(np.abs(other - self._logits[1:]).max(initial=0)) for other in others), default=0.0)
        best = np.partition(self._logits, -2, axis=1)
        self.margins = best[:, -1] - best[:, -2]

    def gap(self, place: int, token: int) -> float:
        """How far a token is from the best one."""
        return float(self._logits[place].max() - self._logits[place, token])


def _in_pieces(decoder: Decoder, ids: Sequence[int], prompt: int, width: int) -> Logits:
    """Logits after the tokens behind the prompt, read so many at a time."""
    row = np.array([ids], np.int64)
    decoder.reset(1)
    decoder.extend(row[:, :prompt])
    parts = [decoder.extend(row[:, at : at + width])[0].copy() for at in range(prompt, len(ids), width)]
    return np.concatenate(parts) if parts else np.zeros((0, decoder.signature.vocabulary), np.float32)


def noise_of(decoder: Decoder, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
    """By how much logits of some rows, prompt and output, differ between ways of reading them."""
    return max(Truth(decoder, prompt, tokens).noise for prompt, tokens in rows)
