"""What a row may copy from: its own prompt and output, and references; and how likely each is to go on as it did.

Behind ``m`` tokens that match, the next one is right with some chance c(m). It is known beforehand from what models
say, and learned from every token that is decided, proposed or not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TypeAlias

from qexport.runtime.speculation.automaton import ROOT, Automaton
from qexport.runtime.speculation.proposal import Reference

Chances: TypeAlias = list[float]  # in the order of tokens, or c(m) for m = 0, 1, ..., the last for all beyond

BEFOREHAND = (0.0, 0.15, 0.35, 0.45, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.8, 0.85, 0.87, 0.9, 0.92, 0.94, 0.95)
"""c(m) at first: between what was counted in greedy text of small decoders (.3 behind one token, .6 behind 2, .7 behind
4, .85 behind 8, .95 behind 12), in edits of code (.2, .5, .7, .9, .99), and in text drawn at temperature 1 (.1, .25,
.3, then hardly any)."""
DEEP = len(BEFOREHAND) - 1
STEP = 1 / 16  # from what is known towards what is seen
HARDLY = 0.01
READ_BACK = 64  # tokens of a prompt that references are compared with: longer matches tell no more
KEPT = 1 << 18  # tokens of references that stay indexed


class History:
    """The prompt and the output of one row.

    Attributes:
        matched: Tokens of the row's end that were there before.
        start: The token behind them there.
        room: Tokens that can be copied: no end, as a copy that reaches the row's end goes on with itself, and so
            repeats what repeats.
        chances: c(m).
    """

    name, proposer = "", "lookup"
    room = 1 << 30
    __slots__ = ("_text", "chances", "matched", "start")

    def __init__(self, prompt: Sequence[int]) -> None:
        """The row as it begins."""
        self._text = text = Automaton(prompt)
        self.chances: Chances = list(BEFOREHAND)
        self.matched, self.start = text.matched, text.before + 1

    def follow(self, token: int) -> None:
        """The row goes on."""
        text = self._text
        if self.matched:
            learn(self.chances, self.matched, text.ids[self.start] == token)
        text.extend(token)
        self.matched, self.start = text.matched, text.before + 1

    def copy(self, count: int) -> tuple[int, ...]:
        """What followed."""
        found = tuple(self._text.ids[self.start : self.start + count])
        return found if len(found) == count else tuple(islice(cycle(found), count))


class Reading:
    """One reference beside one row. Attributes are those of :class:`History`; copies end with the reference."""

    proposer = "reference"
    __slots__ = ("_ends", "_state", "_text", "chances", "matched", "name", "start")

    def __init__(self, name: str, index: Index, prompt: Sequence[int]) -> None:
        """Compare with the end of the prompt."""
        self.name, self._text, self._ends = name, index.text, index.ends
        self._state, self.matched, self.start = ROOT, 0, 0
        self.chances: Chances = list(BEFOREHAND)
        for token in prompt[-READ_BACK:]:
            self._state, self.matched = self._text.step(self._state, self.matched, token)
        self.start = self._ends[self._state] + 1

    @property
    def room(self) -> int:
        """Tokens up to the end of the reference."""
        return len(self._text.ids) - self.start

    def follow(self, token: int) -> None:
        """The row goes on."""
        if self.matched:
            learn(self.chances, self.matched, self._text.ids[self.start : self.start + 1] == [token])
        self._state, self.matched = self._text.step(self._state, self.matched, token)
        self.start = self._ends[self._state] + 1

    def copy(self, count: int) -> tuple[int, ...]:
        """What follows there."""
        return tuple(self._text.ids[self.start : self.start + count])


Source: TypeAlias = History | Reading


def learn(chances: Chances, matched: int, right: bool) -> None:
    """Move c(matched) towards what was seen."""
    place = matched if matched < DEEP else DEEP
    chances[place] += (right - chances[place]) * STEP


def foresee(source: Source, most: int) -> Chances:
    """The chance of each copied token in order, c(m), c(m) c(m+1), ..., up to the first that is hardly ever right."""
    known, chance, found = source.chances, 1.0, []
    for place in range(source.matched, source.matched + min(most, source.room)):
        chance *= known[place if place < DEEP else DEEP]
        if chance < HARDLY:
            break
        found.append(chance)
    return found


@dataclass(frozen=True, slots=True)
class Index:
    """A reference that was read.

    Attributes:
        text: Its automaton.
        ends: For each state of it the end of the most promising occurrence.
    """

    text: Automaton
    ends: Sequence[int]


class IndexCache:
    """References by their tokens, the latest of them up to ``KEPT`` tokens together."""

    def __init__(self) -> None:
        self._indices: OrderedDict[tuple[int, ...], Index] = OrderedDict()
        self._tokens = 0

    def find(self, reference: Reference) -> Index:
        """Read it, if that was not done yet: some 4 microseconds and half a kilobyte per token."""
        ids = reference.ids
        index = self._indices.get(ids)
        if index is None:
            text = Automaton(ids)
            index = self._indices[ids] = Index(text, text.promising())
            self._tokens += len(ids)
        self._indices.move_to_end(ids)
        while self._tokens > KEPT and len(self._indices) > 1:
            self._tokens -= len(self._indices.popitem(last=False)[0])
        return index
