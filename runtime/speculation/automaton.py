"""A suffix automaton over token ids: where the longest suffix of a text was seen before, in constant time per token.

A. Blumer et al., *The smallest automaton recognizing the subwords of a text*, 1985; for speculation Y. Hu et al., *SAM
Decoding: Speculative Decoding via Suffix Automaton*, 2024. A state stands for all substrings that end at the same
positions. It knows the length of the longest of them, one of the positions, and the state of that string's longest
suffix that ends at more positions (its link).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import TypeAlias

State: TypeAlias = int
ROOT: State = 0
"""The empty string."""

_HEARD = 32  # states that learn of a new position, which bounds what texts of one repeated token cost


class Automaton:
    """All substrings of a text, which may grow. A token takes about 1.5 microseconds and half a kilobyte.

    Attributes:
        ids: The text.
        matched: Tokens of the longest suffix of the text that occurs further left too; the two may overlap.
        before: Where the last token of that occurrence is: of the latest one, but in texts where more than 32 suffixes
            recur at once, such as runs of one token, where it may be an earlier one. -1 where ``matched`` is 0.
    """

    __slots__ = ("_ends", "_last", "_lengths", "_links", "_nexts", "before", "ids", "matched")

    def __init__(self, ids: Iterable[int] = ()) -> None:
        """The automaton of ``ids``."""
        self.ids: list[int] = []
        self.matched, self.before = 0, -1
        self._nexts: list[dict[int, State]] = [{}]
        self._links: list[State] = [-1]
        self._lengths: list[int] = [0]
        self._ends: list[int] = [-1]
        self._last: State = ROOT
        for token in ids:
            self.extend(token)

    def extend(self, token: int) -> None:
        """Append a token, in constant time when averaged over the text."""
        nexts, links, ends = self._nexts, self._links, self._ends
        state, position, new = self._last, len(self.ids), len(links)
        self.ids.append(token)
        nexts.append({})
        links.append(ROOT)
        self._lengths.append(position + 1)
        ends.append(position)
        self._last = new
        while state >= 0 and token not in nexts[state]:
            nexts[state][token] = new
            state = links[state]
        if state < 0:
            self.matched, self.before = 0, -1
            return
        links[new] = suffix = self._ending(state, token)
        self.matched, self.before = self._lengths[suffix], ends[suffix]
        for _ in repeat(None, _HEARD):
            if suffix == ROOT:
                return
            ends[suffix] = position
            suffix = links[suffix]

    def step(self, state: State, length: int, token: int) -> tuple[State, int]:
        """Read a token of another text: from the longest suffix that occurs in this one to that with ``token`` behind.

        Args:
            state: Where it is; ``ROOT`` at first.
            length: Tokens of the suffix; 0 at first.
            token: What the other text goes on with.

        Returns:
            The same for one token more, in constant time when averaged over the other text.
        """
        nexts = self._nexts
        while (follower := nexts[state].get(token)) is None:
            if state == ROOT:
                return ROOT, 0
            state = self._links[state]
            length = self._lengths[state]
        return follower, length + 1

    def promising(self) -> list[int]:
        """For each state the end of the occurrence that goes on as most occurrences do, token after token.

        Where nothing follows it is the end of the text, where several follow equally often the token that came first
        does. Valid until the text grows. Behind the position ``p`` of a state that was matched, ``ids[p + 1 :]`` is
        what the text would copy.
        """
        lengths, links, nexts = self._lengths, self._links, self._nexts
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        counts = [0] * len(lengths)
        state = ROOT
        for token in self.ids:  # states that are not copies: those of the prefixes
            state = nexts[state][token]
            counts[state] = 1
        for state in order[:-1]:
            counts[links[state]] += counts[state]
        found = list(self._ends)
        for state in order:  # those that follow have longer strings, so they come first
            if followers := nexts[state].values():
                found[state] = found[max(followers, key=counts.__getitem__)] - 1
        return found

    def _ending(self, state: State, token: int) -> State:
        """The state whose longest string is that of ``state`` with ``token`` behind; it may have to be split off."""
        nexts, links, lengths = self._nexts, self._links, self._lengths
        found, length = nexts[state][token], lengths[state] + 1
        if lengths[found] == length:
            return found
        copy = len(links)
        nexts.append(dict(nexts[found]))
        links.append(links[found])
        lengths.append(length)
        self._ends.append(self._ends[found])
        links[found] = copy
        while state >= 0 and nexts[state].get(token) == found:
            nexts[state][token] = copy
            state = links[state]
        return copy
