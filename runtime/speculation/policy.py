"""How far to look ahead and whom to ask, from what rounds took and what became of proposals."""

from __future__ import annotations

from collections.abc import Sequence

from qexport.errors import UsageError
from qexport.runtime.accounting.records import RoundRecord
from qexport.runtime.speculation.guard import Guard
from qexport.runtime.speculation.pace import Curve, Outlook, Times, best
from qexport.runtime.speculation.proposal import Row
from qexport.runtime.speculation.terms import Terms

COPIES = ("lookup", "reference")
DRAFT = "draft"
AT_ONCE = 4  # rounds that are learned from together, as little code that runs at a time costs more than it says
CATCHING_UP = 2  # times the tokens that a draft reads in a round are many
EVERY, SELDOM = 4, 16  # rounds after which K and what copies cost are weighed again


class Auto:
    """K from the curves and the acceptance, copies by what verifying costs, and a guard that stops what does not pay.

    One K holds for all rows of a batch. A call of ``rows`` rows with S tokens each is taken to cost what one row with
    ``rows`` S tokens does, until rounds tell the level. What was learned stays from batch to batch: one object serves
    all requests to a target, one at a time.

    What is proposed then depends on how long things take. Under the rule of equality the tokens do not; where a draft's
    tokens are drawn, their distribution does not, but tokens may differ from run to run with the same seed.
    """

    def __init__(
        self,
        verify: Curve,
        draft: Curve | None = None,
        terms: Terms | None = None,
        *,
        copies: bool = True,
        most: int = 15,
        guard: Guard | None = None,
    ) -> None:
        """Take what was measured.

        Args:
            verify: t(S), milliseconds of a call of the target by its tokens.
            draft: u(K), milliseconds of a proposal of the draft by its tokens; none where there is no draft.
            terms: What the proposers read, if there are several or they copy: the same object.
            copies: Whether there is a proposer that copies.
            most: Tokens to look ahead, at most.
            guard: Of this target; a new one if not given.
        """
        if most < 1:
            raise UsageError(f"{most} tokens ahead, expected at least 1", hint="decode without proposer to switch off")
        self.terms = terms or Terms()
        self._verify, self._draft, self._most = verify, draft, most
        self._copies = COPIES if copies else ()
        self._guard = guard or Guard(None if draft is None else DRAFT)
        self._outlook = Outlook()
        self._times: dict[int, Times] = {}
        self._batch = self._rounds = self._ahead = 0
        self._news: list[RoundRecord] = []
        self._probed = False

    def plan(self, rows: Sequence[Row]) -> int:
        """Most tokens that anyone may propose in the next round, 0 for a plain one; ``terms`` say who how many."""
        begins = len(rows[0].ids) == rows[0].prompt + 1
        if self._probed or begins or len(self._news) >= AT_ONCE:
            self._learn()
        if begins or len(rows) != self._batch:
            self._turn(len(rows), begins=begins)
        self._weigh()
        guard, limits = self._guard, self.terms.limits
        self._probed = guard.probing
        if self._probed:
            return 0
        for name in self._copies:
            limits[name] = self._most if guard.allows(name) else 0
        if self._draft is not None:
            limits[DRAFT] = self._ahead if guard.allows(DRAFT) else 0
            self.terms.rival = max(1.0, guard.speed(DRAFT) or 1.0) if limits[DRAFT] else 1.0
        return max(limits.values(), default=0)

    def observe(self, record: RoundRecord) -> None:
        """Learn from a round, soon."""
        self._news.append(record)

    def _learn(self) -> None:
        news, self._news = self._news, []
        for record in news:
            self._learn_from(record)

    def _learn_from(self, record: RoundRecord) -> None:
        tokens, times = sum(record.emitted) / len(record.rows), self._times.get(len(record.rows))
        if not tokens or times is None:
            return  # all rows have failed, or nobody asked how far to look
        given = {name for name in record.proposers if name}
        ahead, called = record.width - 1, record.native or record.verify
        load = times.load(ahead, called)
        for name, proposed, accepted in zip(record.proposers, record.proposed, record.accepted, strict=True):
            if name == DRAFT:
                self._outlook.observe(proposed, accepted)
        if record.draft_width > CATCHING_UP * record.width:
            return  # the draft reads a prompt, or all that was said while it rested: not what its rounds take
        self._guard.observe(given, tokens, record.seconds / load, load)
        times.observe_rest((record.seconds - called - record.propose) / load)
        if given == {DRAFT}:
            times.observe_draft(ahead, record.propose / load)

    def _turn(self, batch: int, *, begins: bool) -> None:
        """Begin with other rows, of which other things are true, or with half as many, which take other times."""
        if begins:
            self._guard.forgive()
        if self._batch and self._batch.bit_length() != batch.bit_length():
            self._guard.renew()
        self._batch, self._rounds = batch, 0
        if batch not in self._times:
            self._times[batch] = Times(lambda width: self._verify(batch * width), self._draft, most=self._most)

    def _weigh(self) -> None:
        times = self._times[self._batch]
        if self._rounds % SELDOM == 0:
            self.terms.costs = times.verifying()
        if self._rounds % EVERY == 0 and self._draft is not None:
            self._ahead = best(self._outlook.conditional(self._most), times.round, self._most, self._ahead)
        self._rounds += 1
