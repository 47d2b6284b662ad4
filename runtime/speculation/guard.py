"""Speculation that does not pay is stopped: an account for each proposer, in tokens, against plain decoding.

A round of a proposer gives so many tokens and takes so long; in that time plain decoding gives another number. The
difference goes to the proposer's account. It may spend what it has earned, up to a bound, and a small loan; then it has
to rest, twice as long each time up to a bound, unless it earns again. So what a run loses against plain decoding is
bounded by the loans, of which there are few at first and then one in so many tokens, whatever acceptance does
meanwhile; and what a proposer could have earned since it was stopped is bounded by as much as it rested before. (Trials
that become rarer the more often an arm has lost: P. Auer et al., *Finite-time analysis of the multiarmed bandit
problem*, 2002.)

Times are measured and handed in: nothing here looks at a clock. Machines change their pace by more than what is to be
told apart, so the caller says how slow each moment was, and what is left of that is found by comparing plain rounds
with the rounds behind them. Plain rounds behind others do not count: what ran before has left its data in the
processor's caches, where plain decoding alone would have its own. Tokens are those of a batch divided by its rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from statistics import median

RECENT = 16  # rounds of a proposer from which its speed is told
PLAIN = 5  # rounds of plain decoding that its time is the median of
PAIRS = 8  # neighbours, a plain round and one behind it, that tell how much longer wide calls take than was said
MEMORY = 1 - 1 / 512  # what a round counts when one more is seen, where a proposer is judged on the whole
OUTLIER = 2.0  # times the median round; what is longer was disturbed by something else


@dataclass(frozen=True, slots=True)
class Bounds:
    """What may be risked, in tokens per row.

    Attributes:
        loan: A proposer's first.
        trial: Its loan after every rest.
        savings: Most that it can have on its account.
        rest: Tokens until it is tried again, at first.
        forgiven: Longest rest that ends when other texts begin.
        longest: Longest rest of all.
        probe: Tokens after which plain decoding is measured again, in two rounds, if it does not happen by itself.
    """

    loan: float = 2.0
    trial: float = 1.0
    savings: float = 12.0
    rest: float = 64.0
    forgiven: float = 256.0
    longest: float = 512.0
    probe: float = 128.0


DEFAULT = Bounds()


class Guard:
    """Which proposers may propose, by what their rounds took."""

    def __init__(self, steady: str | None = None, bounds: Bounds = DEFAULT) -> None:
        """Know nothing: everyone may, as soon as plain decoding was measured.

        Args:
            steady: The proposer that always has something, such as a draft model. Others are held against its speed
                where it does better than plain decoding, as it is asked where they are not; rounds in which they took
                part are theirs.
            bounds: What may be risked.
        """
        self._steady, self._bounds = steady, bounds
        self._accounts: dict[str, _Account] = {}
        self._plain: deque[float] = deque(maxlen=PLAIN)
        self._tokens = 0.0
        self._due = 0.0  # when plain decoding is measured again
        self._wanted = 3  # rounds of it that are missing
        self._settled: float | None = None  # load of the round before, where it was a plain one that counted
        self._alone = True  # whether the round before was plain

    @property
    def probing(self) -> bool:
        """Whether the next round should be plain, since too little is known of it: at most 2 tokens in ``probe``."""
        return self._wanted > 0 or self._tokens >= self._due

    def renew(self) -> None:
        """Something has changed: measure plain decoding again."""
        self._wanted = max(self._wanted, 1)

    def forgive(self) -> None:
        """Other texts begin, on which a proposer may do better: who pays on the whole begins anew, short rests end."""
        for account in self._accounts.values():
            if account.pays:
                account.until, account.loan, account.rest = self._tokens, self._bounds.loan, self._bounds.rest
            elif account.rest <= self._bounds.forgiven:
                account.until = self._tokens

    def allows(self, name: str) -> bool:
        """Whether a proposer may propose in the next round."""
        account = self._accounts.get(name)
        return account is None or self._tokens >= account.until

    def speed(self, name: str) -> float | None:
        """Tokens that a proposer gives in the time of a plain one; ``None`` where that is unknown."""
        account = self._accounts.get(name)
        if account is None or not account.taken or not self._plain:
            return None
        return median(self._plain) / account.pace

    def observe(self, proposers: Collection[str], tokens: float, taken: float, load: float = 1.0) -> None:
        """Book a round.

        Args:
            proposers: Those with a token in it; none where it was plain.
            tokens: That came of it, per row.
            taken: Time that it would have taken on the machine at its usual pace, in any unit.
            load: How much longer it did take. Where that is not known: the time that was measured, and 1.
        """
        self._tokens += tokens
        names = tuple(sorted(name for name in proposers if name != self._steady) or proposers)
        for name in names:
            self._accounts.setdefault(name, _Account(self._bounds)).add(tokens, taken)
        if names:
            self._book(names, tokens, load)
        elif self._alone:
            self._plain.append(taken / tokens)
            self._wanted = max(0, self._wanted - 1)
            self._due = self._tokens + self._bounds.probe
        self._settled = load if self._alone and not names else None
        self._alone = not names

    def _book(self, names: tuple[str, ...], tokens: float, load: float) -> None:
        for name in names:
            account = self._accounts[name]
            if self._settled is not None:
                account.ratios.append(load / self._settled)
            if self._plain:
                account.book(tokens, self._otherwise(name), self._tokens)

    def _otherwise(self, name: str) -> float:
        """Time per token of what is done where a proposer is not asked."""
        plain = median(self._plain)
        steady = self._accounts.get(self._steady or "")
        if steady is None or name == self._steady or len(steady.taken) < RECENT or self._tokens < steady.until:
            return plain
        return min(plain, steady.pace)


@dataclass(slots=True)
class _Account:
    """Of one proposer: what it has, what it may owe, until when it rests; its last rounds, and what their times miss.

    Attributes:
        ratios: How much longer its rounds took than was said, beside plain rounds.
    """

    bounds: Bounds
    balance: float = 0.0
    loan: float = field(init=False)
    rest: float = field(init=False)
    until: float = 0.0
    earned: float = 0.0  # on the whole, in tokens; what is long ago counts little
    tokens: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    taken: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    ratios: deque[float] = field(default_factory=lambda: deque([1.0], maxlen=PAIRS))

    def __post_init__(self) -> None:
        self.loan, self.rest = self.bounds.loan, self.bounds.rest

    @property
    def pays(self) -> bool:
        """Whether it has done better than plain decoding on the whole."""
        return self.earned > 0

    @property
    def pace(self) -> float:
        """Time per token of the last rounds, disturbed ones as if they had not been."""
        typical = median(self.taken)
        return median(self.ratios) * sum(_usual(taken, typical) for taken in self.taken) / sum(self.tokens)

    def add(self, tokens: float, taken: float) -> None:
        self.tokens.append(tokens)
        self.taken.append(taken)

    def book(self, tokens: float, pace: float, now: float) -> None:
        """Add what the last round earned over something that takes ``pace`` per token."""
        lost = median(self.ratios) * _usual(self.taken[-1], median(self.taken)) / pace
        if len(self.taken) < 3:
            lost = min(lost, OUTLIER)  # too few rounds to tell which was disturbed
        self.earned = MEMORY * self.earned + tokens - lost
        self.balance = min(self.balance + tokens - lost, self.bounds.savings)
        if self.balance >= self.bounds.savings / 2:
            self.loan, self.rest = self.bounds.loan, self.bounds.rest
        if self.balance < -self.loan:
            self.until = now + self.rest
            self.balance, self.loan = 0.0, self.bounds.trial
            self.rest = min(2 * self.rest, self.bounds.longest)


def _usual(taken: float, typical: float) -> float:
    """What a round took, or what rounds take where something else got in between: a session opened, a process."""
    return taken if taken <= OUTLIER * typical else typical
