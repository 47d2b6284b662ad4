"""Tokens to text, token by token, without ever showing what the next token may change.

What a token stands for depends on its neighbours: a character may be spread over several, a space may belong to a word
or to its beginning. So text is always decoded behind a token or two that came before, and what these give alone is
taken off in front.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qexport.runtime.tokenizing import Tokenizer

BROKEN = "\ufffd"  # what stands for bytes that are no text
MOST_HELD = 512  # tokens that are kept back together; no text has so many bytes in a row that are none
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PLAIN, _BYTES, _SILENT = range(3)


class Alphabet:
    """What single tokens of a tokenizer do to text; shared by all that read its tokens, from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Look at the decoder: one that falls back to bytes takes runs of them back if they turn out to be no text."""
        self.decode = tokenizer.decode
        self._name = tokenizer.inner.id_to_token
        decoder = tokenizer.inner.decoder
        self._falls_back = decoder is not None and b'"ByteFallback"' in decoder.__getstate__()
        self._known: dict[int, tuple[str, int]] = {}

    def alone(self, token: int) -> str:
        """Its text without neighbours."""
        return self._look_up(token)[0]

    def is_bytes(self, token: int) -> bool:
        """Whether it is a byte of a run that becomes text as a whole or not at all."""
        return self._look_up(token)[1] == _BYTES

    def is_silent(self, token: int) -> bool:
        """Whether the decoder never sees it: a special token, or one that the tokenizer does not know."""
        return self._look_up(token)[1] == _SILENT

    def _look_up(self, token: int) -> tuple[str, int]:
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self.decode([token]), self._kind(token)
        return found

    def _kind(self, token: int) -> int:
        name = self._name(token)
        if name is None or (not self.decode([token]) and self.decode([token], special=True)):
            return _SILENT
        return _BYTES if self._falls_back and _BYTE.fullmatch(name) else _PLAIN


class Detokenizer:
    """The text of an output, as far as it is certain: all pieces and the tail at the end are what decoding it gives.

    Text begins where that of the prompt ends, so that a space between them is there.

    Attributes:
        tail: Behind what was told; the next token may change it.
    """

    def __init__(self, alphabet: Alphabet, prompt: Sequence[int] = ()) -> None:
        """Begin behind the tokens of ``prompt``."""
        self.tail = ""
        self._alphabet = alphabet
        self._window = _end_of(alphabet, prompt)
        self._told = alphabet.decode(self._window)  # text of the window that is no news
        self._in_bytes = any(map(alphabet.is_bytes, self._window[-1:]))
        self._certain = 0 if self._may_change(self._told) else len(self._window)  # tokens of it

    def push(self, token: int) -> str:
        """Text that is certain now and was not before."""
        self._window.append(token)
        text = self._alphabet.decode(self._window)
        fresh = text[_agree(text, self._told) :]
        if not self._alphabet.is_silent(token):
            self._in_bytes = self._alphabet.is_bytes(token)
        if self._may_change(text) and len(self._window) - self._certain <= MOST_HELD:
            self.tail = fresh
            return ""
        self.tail = ""
        self._advance(text)
        return fresh

    def _may_change(self, text: str) -> bool:
        return self._in_bytes or text.endswith(BROKEN)

    def _advance(self, text: str) -> None:
        """Let the next window begin where this one was last certain, if there is text since."""
        since = self._window[self._certain :][-MOST_HELD:]
        alone = self._alphabet.alone(since[0]) if len(since) == 1 else self._alphabet.decode(since)
        if alone:
            self._window, text = since, alone
        self._told, self._certain = text, len(self._window)


def _agree(text: str, told: str) -> int:
    """Characters that both begin with."""
    if text.startswith(told):
        return len(told)
    return next((place for place, (one, other) in enumerate(zip(text, told, strict=False)) if one != other), len(text))


def _end_of(alphabet: Alphabet, prompt: Sequence[int]) -> list[int]:
    """The last few tokens that decode to some text and do not begin inside a character; special ones left out."""
    heard = (token for token in reversed(prompt) if not alphabet.is_silent(token))
    window: list[int] = []  # backwards
    for token in heard:
        known = len(window)
        if known and not known & (known - 1) and not alphabet.is_bytes(token):  # 1, 2, 4 ... tokens
            text = alphabet.decode(window[::-1])
            if text and text[0] != BROKEN:
                break
        window.append(token)
    return window[::-1]
