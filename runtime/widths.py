"""How many tokens of a row a backend reads at once, by the profiles that an engine was built for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qexport.errors import DataInvalid
from qexport.passes.portable import IDS
from qexport.runtime.session import Profile


@dataclass(frozen=True, slots=True)
class Widths:
    """Ranges of tokens, each of one profile; none where any number goes."""

    spans: tuple[tuple[int, int], ...] = ()

    @property
    def widest(self) -> int | None:
        """The most at once; ``None`` for any number."""
        return max((high for _, high in self.spans), default=None)

    def first(self, wanted: int) -> int:
        """How many of ``wanted`` tokens go first."""
        return max((min(wanted, high) for low, high in self.spans if low <= wanted), default=wanted)


def find_widths(profiles: Iterable[Profile], batch: int) -> Widths:
    """What profiles leave of a batch.

    Raises:
        DataInvalid: No profile is for that many rows, or none for single tokens.
    """
    known = [(profile[IDS][0], profile[IDS][2]) for profile in profiles]
    if not known:
        return Widths()
    spans = tuple((low[1], high[1]) for low, high in known if low[0] <= batch <= high[0])
    if not any(low == 1 for low, _ in spans):
        told = ", ".join(f"[{low[0]}..{high[0]}, {low[1]}..{high[1]}]" for low, high in known)
        what = f"the engine has no profile for steps of one token of {batch} rows, only for [rows, tokens] of {told}"
        raise DataInvalid(what, hint="build it with a larger max_batch, or with profiles that begin at one token")
    return Widths(spans)
