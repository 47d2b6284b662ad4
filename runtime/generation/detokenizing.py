"""Tokens to text, token by token, without ever showing what the next token may change.

What a token stands for depends on its neighbours: a character may be spread over several, a space may belong to a word
or to its beginning. So text is always decoded behind a token or two that came before, and what these give alone is
taken off in front.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

from qexport.runtime.tokenizing import Tokenizer

BROKEN = "\ufffd"  # what stands for bytes that are no text
MOST_HELD = 512  # tokens that are kept back together; no text has so many bytes in a row that are none
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LOCAL = {"ByteLevel", "ByteFallback", "Fuse", "Replace", "Strip"}
"""Decoders by which a token that is text by itself adds the same behind any text; of Strip that is so at the front."""


class Sort(Enum):
    """What a token does to text."""

    PLAIN = 0
    BYTES = 1
    """A byte of a run that becomes text as a whole or not at all."""
    SILENT = 2
    """Nothing, the decoder never sees it: a special token, or one that the tokenizer does not know."""


class Letter(NamedTuple):
    """A token of an alphabet."""

    sort: Sort
    alone: str
    """Its text without neighbours."""
    added: str | None
    """Its text behind any other text; ``None`` where that may depend on it, or on what follows."""


class Alphabet:
    """What single tokens of a tokenizer do to text; shared by all that read its tokens, from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Look at the decoder: one that falls back to bytes takes runs of them back if they turn out to be no text."""
        self.decode = tokenizer.decode
        self._name = tokenizer.inner.id_to_token
        decoder = tokenizer.inner.decoder
        steps = [] if decoder is None else _steps(json.loads(decoder.__getstate__()))
        self._falls_back = any(step["type"] == "ByteFallback" for step in steps)
        self._local = bool(steps) and all(step["type"] in _LOCAL and not step.get("stop") for step in steps)
        self._known: dict[int, Letter] = {}

    def __getitem__(self, token: int) -> Letter:
        """What is known of a token."""
        return self._known.get(token) or self._known.setdefault(token, self._look(token))

    def _look(self, token: int) -> Letter:
        name, alone = self._name(token), self.decode([token])
        if name is None or (not alone and self.decode([token], special=True)):
            return Letter(Sort.SILENT, alone, None)
        if self._falls_back and _BYTE.fullmatch(name):
            return Letter(Sort.BYTES, alone, None)
        certain = self._local and alone and BROKEN not in alone
        return Letter(Sort.PLAIN, alone, self.decode([token, token])[len(alone) :] if certain else None)


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """A decoder as the steps that it has."""
    return [step for one in decoder["decoders"] for step in _steps(one)] if "decoders" in decoder else [decoder]


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
        self._in_bytes = bool(self._window) and alphabet[self._window[-1]].sort is Sort.BYTES
        self._certain = 0 if self._may_change(self._told) else len(self._window)  # tokens of it

    def push(self, token: int) -> str:
        """Text that is certain now and was not before."""
        letter = self._alphabet[token]
        if letter.added is not None and self._told and self._certain == len(self._window):
            self._window, self._told, self._certain, self._in_bytes = [token], letter.alone, 1, False
            return letter.added
        self._window.append(token)
        text = self._alphabet.decode(self._window)
        fresh = text[_agree(text, self._told) :]
        if letter.sort is not Sort.SILENT:
            self._in_bytes = letter.sort is Sort.BYTES
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
        alone = self._alphabet[since[0]].alone if len(since) == 1 else self._alphabet.decode(since)
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
    heard = (token for token in reversed(prompt) if alphabet[token].sort is not Sort.SILENT)
    window: list[int] = []  # backwards
    for token in heard:
        known = len(window)
        if known and not known & (known - 1) and alphabet[token].sort is not Sort.BYTES:  # 1, 2, 4 ... tokens
            text = alphabet.decode(window[::-1])
            if text and text[0] != BROKEN:
                break
        window.append(token)
    return window[::-1]
