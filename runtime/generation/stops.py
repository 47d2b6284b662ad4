"""Where an output ends: after so many tokens, at a token, or before a text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from qexport.errors import UsageError
from qexport.runtime.demands import demand_integer, is_integer
from qexport.runtime.generation.detokenizing import BROKEN

TOKENS = 128
MOST_STRINGS, MOST_CHARACTERS, MOST_IDS = 64, 1024, 1024


@dataclass(frozen=True, slots=True)
class Stop:
    """When to stop.

    Attributes:
        tokens: Most that come out; fewer where the model has no positions for them.
        strings: Texts that end the output where the first of them begins. They are looked for in the text of the
            output, wherever tokens begin and end; a special token is found by its name.
        ids: Tokens that end the output, themselves the last.
        eos: Whether tokens that the model's own settings name do so too.
    """

    tokens: int = TOKENS
    strings: Sequence[str] = ()
    ids: Sequence[int] = ()
    eos: bool = True

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` on what never ends an output, or takes too long to look for."""
        if not (is_integer(self.tokens) and self.tokens >= 1):
            raise UsageError(f"at most {self.tokens!r} tokens are asked for, expected 1 or more")
        if isinstance(self.strings, str):
            raise UsageError("stop strings are one string, expected several", hint=f"give ({self.strings!r},)")
        for name, given, most in (("strings", self.strings, MOST_STRINGS), ("ids", self.ids, MOST_IDS)):
            if not isinstance(given, Collection):
                raise UsageError(f"stop {name} are a {type(given).__name__}, expected a list of them")
            if len(given) > most:
                raise UsageError(f"{len(given)} stop {name} are given, expected {most} or fewer")
        for text in self.strings:
            _demand_findable(text)
        for token in self.ids:
            demand_integer("a stop id", token, 0)


def _demand_findable(text: object) -> None:
    """Raise :class:`UsageError` on what is never in a text, or takes too long to look for."""
    if not isinstance(text, str):
        raise UsageError(f"a stop string is {text!r}, expected text")
    if not text or len(text) > MOST_CHARACTERS:
        raise UsageError(f"a stop string has {len(text)} characters, expected 1 to {MOST_CHARACTERS}")
    if BROKEN in text:
        raise UsageError(f"the stop string {text!r} has U+FFFD in it, which stands for what is no text")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UsageError(f"the stop string {text!r} is not Unicode", hint="decode it as UTF-8")


class Cutter:
    """Ends a text where one of several strings begins, and keeps back what may become one."""

    def __init__(self, strings: Sequence[str]) -> None:
        """Look for these."""
        self._strings = tuple(strings)
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""

    def push(self, text: str, tail: str = "") -> tuple[str, bool]:
        """More text.

        Args:
            text: Certain from now on.
            tail: Behind it, and another with the next call; it counts if this is where the text ends.

        Returns:
            What may be shown now, and whether the end is reached.
        """
        if not self._strings:
            return text, False
        self._held += text
        seen = self._held + tail
        cut = min((place for one in self._strings if (place := seen.find(one)) >= 0), default=-1)
        if cut >= 0:
            self._held = ""
            return seen[:cut], True
        ready = self._ready()
        shown, self._held = self._held[:ready], self._held[ready:]
        return shown, False

    def finish(self) -> str:
        """What was kept back, if nothing comes any more."""
        held, self._held = self._held, ""
        return held

    def _ready(self) -> int:
        """Characters in front of the first place from which on a string may have begun."""
        held = self._held
        for place in range(max(0, len(held) - self._longest + 1), len(held)):
            rest = held[place:]
            if any(one.startswith(rest) for one in self._strings):
                return place
        return len(held)
