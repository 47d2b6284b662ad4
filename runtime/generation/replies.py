"""What one row of a request has said so far: from tokens that were decided to tokens with text, and where they end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from qexport.errors import DataInvalid
from qexport.runtime.generation.detokenizing import Detokenizer
from qexport.runtime.generation.stops import Cutter
from qexport.runtime.speculation.proposal import Row, Span
from qexport.runtime.speculation.rounds import Outcome

Reason: TypeAlias = Literal["stop", "length", "failed"]


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an output.

    Attributes:
        id: Which.
        text: What can be shown now that it is there; it may belong to tokens before, or be empty.
        index: Its place in the output.
        proposer: Who foresaw it; empty where the target chose it by itself.
        span: Where it was copied from, where it was.
    """

    id: int
    text: str
    index: int
    proposer: str = ""
    span: Span | None = None

    @property
    def accepted(self) -> bool:
        """Whether it was foreseen."""
        return bool(self.proposer)


@dataclass(frozen=True, slots=True)
class Copied:
    """Tokens of an output that were copied in one piece.

    Attributes:
        index: The first of them in the output.
        count: How many.
        span: Where the first was copied from.
    """

    index: int
    count: int
    span: Span


@dataclass(frozen=True, slots=True)
class Tally:
    """What an output took.

    Attributes:
        calls: Rounds that it took part in, each a call of the target; the prompt is not among them.
        proposed: Tokens that were proposed to it.
        accepted: How many of them were taken.
    """

    calls: int = 0
    proposed: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """An output.

    Attributes:
        tokens: All that came; one that stops is the last of them.
        text: Of them, without the token or the string that it stops at.
        reason: ``stop``; ``length`` at as many tokens as were asked for or as the model has positions for;
            ``failed`` where the model gave no numbers.
        copied: What was copied, in order.
        tally: What it took.
        error: Why it failed.
    """

    tokens: tuple[int, ...]
    text: str
    reason: Reason
    copied: tuple[Copied, ...] = ()
    tally: Tally = Tally()
    error: DataInvalid | None = None


@dataclass(slots=True)
class Reply:
    """One row while it grows.

    Attributes:
        number: Of the prompt in the request.
        row: What the loop extends.
        room: Most tokens that may come.
        ends: Tokens that end it.
        text: From tokens to text.
        cutter: From text to what may be shown.
        reason: Why it ended; ``None`` while it goes on.
        error: What went wrong.
    """

    number: int
    row: Row
    room: int
    ends: Collection[int]
    text: Detokenizer
    cutter: Cutter
    reason: Reason | None = None
    error: DataInvalid | None = None
    tokens: list[Token] = field(default_factory=list)
    calls: int = 0
    proposed: int = 0
    accepted: int = 0

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.room - len(self.tokens)

    def take(self, outcome: Outcome, *, prompt: bool = False) -> list[Token]:
        """Take what a round brought, up to where the output ends."""
        proposal = outcome.proposal
        self.calls += not prompt
        self.proposed += len(proposal.ids)
        self.accepted += outcome.accepted
        if outcome.failure is not None:
            self.reason, self.error = "failed", outcome.failure.with_traceback(None)  # whose frames hold caches
        found = []
        for place, token in enumerate(outcome.tokens):
            proposer, span = (proposal.proposer, proposal.span) if place < outcome.accepted else ("", None)
            if span is not None and place:
                span = Span(span.source, span.start + place)
            found.append(Token(token, self._read(token), len(self.tokens), proposer, span))
            self.tokens.append(found[-1])
            if self.reason is not None:
                break
        return found

    def completion(self) -> Completion:
        """The output, once it has ended."""
        assert self.reason is not None
        return Completion(
            tokens=tuple(token.id for token in self.tokens),
            text="".join(token.text for token in self.tokens),
            reason=self.reason,
            copied=tuple(_pieces(self.tokens)),
            tally=Tally(self.calls, self.proposed, self.accepted),
            error=self.error,
        )

    def _read(self, token: int) -> str:
        """What can be shown now."""
        if token in self.ends:
            self.reason = "stop"
            return self._rest()
        shown, ended = self.cutter.push(self.text.push(token), self.text.tail)
        if ended:
            self.reason = "stop"
        elif self.left == 1:
            self.reason = "length"
            shown += self._rest()
        return shown

    def _rest(self) -> str:
        return self.cutter.finish() + self.text.tail


def _pieces(tokens: Sequence[Token]) -> list[Copied]:
    """Neighbours that were copied from neighbours are one piece."""
    found: list[Copied] = []
    for token in tokens:
        if token.span is None:
            continue
        last = found[-1] if found else None
        if last and token.index == last.index + last.count and token.span == _behind(last):
            found[-1] = Copied(last.index, last.count + 1, last.span)
        else:
            found.append(Copied(token.index, 1, token.span))
    return found


def _behind(piece: Copied) -> Span:
    return Span(piece.span.source, piece.span.start + piece.count)
