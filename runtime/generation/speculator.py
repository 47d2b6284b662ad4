"""Who looks ahead for a request, how far, and what becomes of it if that fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

from qexport.runtime.generation.models import Model
from qexport.runtime.sampling.sampler import Sampler
from qexport.runtime.speculation.cascade import Cascade
from qexport.runtime.speculation.draft import Draft
from qexport.runtime.speculation.lookup import Lookup
from qexport.runtime.speculation.policy import Auto
from qexport.runtime.speculation.proposal import NOTHING, Effort, Proposal, Proposer, Row
from qexport.runtime.speculation.rounds import Fixed, Policy
from qexport.runtime.speculation.terms import Terms
from qexport.runtime.speculation.unrolled import Unrolled, unrolls

Answer = TypeVar("Answer")


class Speculator:
    """What looks ahead for a target: copies first, which cost nothing, then a draft.

    It learns how far that pays, and keeps references that it has read. It serves one request at a time.

    Attributes:
        policy: How far to look.
    """

    def __init__(self, target: Model, draft: Model | None, *, ahead: int | None, lookup: bool) -> None:
        """Know nothing yet.

        Args:
            target: Who decides.
            draft: A model that looks ahead, if there is one.
            ahead: How many tokens; ``None`` for what pays.
            lookup: Whether to copy.
        """
        self._target, self._draft, self._terms = target, draft, Terms()
        self._copies = Lookup(self._terms) if lookup else None
        self.policy: Policy
        if ahead is None:
            drafting = None if draft is None else draft.drafting
            self.policy = Auto(target.verifying, drafting, self._terms, copies=lookup)
        else:
            self.policy = Fixed(ahead)

    def proposer(self, stack: ExitStack, sampler: Sampler) -> Proposer | None:
        """Who proposes for a group of rows, with caches that the stack closes; ``None`` where nobody does."""
        asked: list[Proposer] = [] if self._copies is None else [self._copies]
        if self._draft is not None:
            asked.append(self._drafting(self._draft, stack, sampler))
        return Cascade(asked, self._terms) if len(asked) > 1 else asked[0] if asked else None

    def rest(self) -> None:
        """Forget the rows of the last request."""
        if self._copies is not None:
            self._copies.begin(())

    def _drafting(self, draft: Model, stack: ExitStack, sampler: Sampler) -> Proposer:
        """The draft, all tokens in one call where that is possible."""
        vocabulary = self._target.signature.vocabulary
        chains = draft.chains() if unrolls(sampler.settings) else None
        inner = Draft(draft.take(), sampler, vocabulary) if chains is None else Unrolled(chains, sampler, vocabulary)
        found = FailSafe(inner)

        def give_back(kind: type[BaseException] | None, *_: object) -> None:
            sound = found.failure is None and kind is None
            if isinstance(inner, Draft):
                draft.give_back(inner.decoder, sound=sound)
            elif sound:
                inner.give_back()
            draft.note(found.rounds, failed=chains is not None and found.failure is not None)

        stack.push(give_back)
        return found


class FailSafe:
    """A proposer that is left alone once it fails: what it was to speed up goes on without it.

    Attributes:
        failure: What happened to it.
        rounds: How often it was asked.
    """

    def __init__(self, inner: Proposer) -> None:
        """Ask ``inner`` for as long as it answers."""
        self.failure: Exception | None = None
        self.rounds = 0
        self._inner = inner

    @property
    def name(self) -> str:
        """That of the proposer."""
        return self._inner.name

    @property
    def effort(self) -> Effort:
        """That of the proposer."""
        return self._inner.effort

    def begin(self, rows: Sequence[Row]) -> None:
        """Begin with these rows."""
        self._ask(lambda: self._inner.begin(rows))

    def propose(self, rows: Sequence[Row], most: Sequence[int]) -> list[Proposal]:
        """What it proposes, or nothing."""
        self.rounds += 1
        return self._ask(lambda: self._inner.propose(rows, most)) or [NOTHING] * len(rows)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows."""
        self._ask(lambda: self._inner.keep(rows))

    def _ask(self, question: Callable[[], Answer]) -> Answer | None:
        """The answer; ``None`` from the first failure on."""
        if self.failure is not None:
            return None
        try:
            return question()
        except Exception as error:  # noqa: BLE001 - whatever it is, too little memory for one, it ends no output
            self.failure = error.with_traceback(None)  # whose frames hold caches
            return None
