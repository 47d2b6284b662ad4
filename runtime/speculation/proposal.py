"""What is passed between those who propose tokens and those who verify them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Chances: TypeAlias = NDArray[np.float64]  # [tokens, vocabulary], rows add up to 1
Logits: TypeAlias = NDArray[np.float32]  # [tokens, vocabulary]


@dataclass(frozen=True, slots=True)
class Reference:
    """A text that output may copy from, beside the prompt (LLMA, Yang et al. 2023).

    Attributes:
        name: What spans that were copied from it say.
        ids: Its tokens.
    """

    name: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Where proposed tokens were found.

    Attributes:
        source: Name of the reference; empty for prompt and output.
        start: First token there.
    """

    source: str
    start: int


@dataclass(slots=True)
class Row:
    """One sequence of a batch while it grows.

    Attributes:
        ids: The prompt and all that was decided; whoever keeps state compares with it what it knows.
        prompt: Tokens of the prompt.
        stream: Distinguishes the randomness of this sequence from that of others with the same seed.
        references: What it may copy from.
    """

    ids: list[int]
    prompt: int
    stream: int = 0
    references: tuple[Reference, ...] = ()


class Proposal(NamedTuple):
    """Tokens that may come next in one row.

    Attributes:
        ids: The tokens in order; empty where there is nothing to propose.
        chances: The distribution that each was drawn from, one row per token and one more for ``spare``; ``None``
            where they were not drawn but are certain, as copied and greedy ones are.
        spare: Drawn with them for the position behind the last, where the target chooses anyway: it makes what is
            chosen there independent of how many tokens were proposed.
        proposer: Whose it is, for accounts.
        span: Where copied tokens come from.
    """

    ids: tuple[int, ...] = ()
    chances: Chances | None = None
    spare: int | None = None
    proposer: str = ""
    span: Span | None = None

    def alone(self) -> Proposal:
        """Of several tokens the first one, as a spare one; nothing where it is certain."""
        if self.chances is None:
            return NOTHING
        return self._replace(ids=(), chances=self.chances[:1], spare=self.ids[0])


NOTHING = Proposal()


class Effort(NamedTuple):
    """What a proposer's own models did since it was made.

    Attributes:
        native: Seconds inside of their backends.
        calls: Calls of them; of an unrolled one, its steps, as each reads all weights.
        width: Tokens of a row that they read, all calls together.
        valid: Tokens in their caches before each call, of all rows and all calls together.
    """

    native: float = 0.0
    calls: int = 0
    width: int = 0
    valid: int = 0

    def plus(self, native: float, calls: int, width: int, valid: int) -> Effort:
        """With more."""
        return Effort(self.native + native, self.calls + calls, self.width + width, self.valid + valid)

    def since(self, before: Effort) -> Effort:
        """What was done after ``before``."""
        return self.plus(-before.native, -before.calls, -before.width, -before.valid)


NO_EFFORT = Effort()


class Proposer(Protocol):
    """Looks ahead. It follows the rows by itself: what it knows of a row is valid as far as ``row.ids`` agrees."""

    @property
    def effort(self) -> Effort:
        """What its models did since it was made; nothing for those that have none."""
        ...

    @property
    def name(self) -> str:
        """Short, for accounts."""
        ...

    def begin(self, rows: Sequence[Row]) -> None:
        """Forget everything; a batch starts with these rows, which have their prompts."""
        ...

    def propose(self, rows: Sequence[Row], most: Sequence[int]) -> list[Proposal]:
        """Tokens that may follow each row, up to ``most`` of it; none where nothing is known.

        Where that is zero, the one token that has room is the target's, and a ``spare`` is all that can be of use.
        """
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on, in this order; the others are done."""
        ...
