"""The exact joint distribution of the next few tokens, by the target alone: whole rows, nothing drawn, no cache kept.

After every prefix that has a chance, the likeliest tokens are classes of their own and the prefix goes on with each of
them; the other tokens are one class, or two where there is a draft: those it likes less than the target does, and those
it likes more, since what goes wrong in speculation moves chances towards the draft or away from it. So a request that
truncates to no more tokens is enumerated whole, and so is a small vocabulary; of a large one the rest is pooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.runtime.certifying import reference
from qexport.runtime.certifying.reference import FAR, Chances
from qexport.runtime.decoder import Decoder
from qexport.runtime.sampling.settings import Sampling

Tokens: TypeAlias = tuple[int, ...]
LESS, MORE = -1, -2  # the classes of other tokens, which are no token's own


@dataclass(frozen=True, slots=True)
class Grain:
    """How finely outcomes are told apart.

    Attributes:
        depth: Tokens that are looked at together.
        most: Tokens after each prefix that are classes of their own.
    """

    depth: int = 3
    most: int = 4


@dataclass(slots=True)
class Tree:
    """All outcomes of a few tokens after a prompt.

    Attributes:
        prompt: What they follow.
        sampling: As what they are drawn.
        depth: How many tokens they are.
        chances: Of the cells, ``[cells]``, adding up to 1.
        edge: How near truncation comes to another choice (``reference.Wanted``), where that would be an outcome that
            has no chance here.
    """

    prompt: Tokens
    sampling: Sampling
    depth: int
    chances: Chances = field(default_factory=lambda: np.zeros(0))
    edge: float = FAR
    _kinds: dict[Tokens, NDArray[np.int64]] = field(default_factory=dict)  # prefix -> class of every token
    _cells: dict[Tokens, int] = field(default_factory=dict)  # classes on the way -> cell

    def cell(self, tokens: Sequence[int]) -> int:
        """The cell of an outcome, by its first ``depth`` tokens."""
        path: Tokens = ()
        for token in tokens[: self.depth]:
            kind = int(self._kinds[path][token])
            if kind < 0:
                return self._cells[(*path, kind)]
            path = (*path, kind)
        return self._cells[path]

    def count(self, outcomes: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """How often each cell came, ``[cells]``."""
        return np.bincount([self.cell(tokens) for tokens in outcomes], minlength=self.chances.size)


def enumerate_tokens(
    target: Decoder, prompt: Sequence[int], sampling: Sampling, grain: Grain, draft: Decoder | None = None
) -> Tree:
    """Work the tree out: one call of the target for all prefixes of a length, or a few where they are many.

    Args:
        target: Nobody else's at the time.
        prompt: At least one token.
        sampling: Not greedy.
        grain: How fine.
        draft: Splits the tokens that have no class of their own.
    """
    tree = Tree(tuple(prompt), sampling, grain.depth)
    chances: list[float] = []
    level: dict[Tokens, float] = {(): 1.0}
    for place in range(grain.depth):
        following: dict[Tokens, float] = {}
        rows = [[*prompt, *prefix] for prefix in level]
        likely = reference.last(target, rows)
        rival = None if draft is None else reference.last(draft, rows)
        for index, (prefix, chance) in enumerate(level.items()):
            found = reference.wanted(likely[index], sampling, rows[index])
            other = None if rival is None else _other(rival[index], sampling, rows[index], found.chances.size)
            kinds = tree._kinds[prefix] = classes(found.chances, grain.most, other)
            if not found.chances[kinds < 0].any():
                tree.edge = min(tree.edge, found.edge)
            for kind in sorted(set(kinds.tolist())):
                share = chance * float(found.chances[kinds == kind].sum())
                if kind >= 0 and place + 1 < grain.depth:
                    following[(*prefix, kind)] = share
                else:
                    tree._cells[(*prefix, kind)] = len(chances)
                    chances.append(share)
        level = following
    tree.chances = np.array(chances)
    return tree


def classes(chances: Chances, most: int, draft: Chances | None) -> NDArray[np.int64]:
    """The class of every token ``[vocabulary]``: itself for the likeliest, else ``LESS`` or ``MORE``."""
    kinds = np.full(chances.size, LESS, np.int64)
    if draft is not None:
        kinds[draft > chances] = MORE
    own = np.argsort(-chances, kind="stable")[:most]
    own = own[chances[own] > 0]
    kinds[own] = own
    return kinds


def _other(logits: NDArray[np.float32], sampling: Sampling, row: Sequence[int], vocabulary: int) -> Chances:
    """The draft's distribution over as many tokens as the target has."""
    scores = np.full(vocabulary, -np.inf, np.float32)
    known = min(vocabulary, logits.size)
    scores[:known] = logits[:known]
    return reference.wanted(scores, sampling, row).chances
