"""The tokenizer that travels with a model: text to tokens and back; nothing in it changes after loading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from qexport.errors import DataInvalid, EnvironmentMismatch, QexportError
from qexport.safe_io import digest_bytes, read_bytes

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"
MOST_BYTES = 256 << 20
_PANIC = "PanicException"  # of the library's language, a BaseException that no module exports
_OWN = "use the tokenizer that the model was trained with"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text as tokens.

    Attributes:
        ids: Those that the model reads, with what the tokenizer puts around them.
        types: Number of the segment of each.
        cut: Whether the text had more.
    """

    ids: list[int]
    types: list[int]
    cut: bool


class Tokenizer:
    """A tokenizer of the ``tokenizers`` library; may be called from several threads.

    It never pads, and cuts only where a call says so, whatever the file says of both.

    Attributes:
        inner: The library's own.
        most: Tokens after which the file says a text is to be cut; ``None`` where it does not.
        pad: The token that the file says to fill up with; 0 where it does not.
    """

    def __init__(self, data: bytes, where: str = FILE) -> None:
        """Read the bytes of a ``tokenizer.json``; ``where`` is what messages call it.

        Raises:
            DataInvalid: It is none.
            EnvironmentMismatch: The package ``tokenizers`` is not installed.
        """
        try:
            import tokenizers
        except ImportError as error:
            what = "reading text needs the package tokenizers"
            raise EnvironmentMismatch(what, hint="pip install tokenizers") from error
        self._where = where
        try:
            self.inner: tokenizers.Tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except BaseException as error:
            _demand_failure(error)
            what = f"cannot be read as a tokenizer: {error}"
            raise DataInvalid(what, where=where, hint=f"expected a {FILE}") from error
        told = self.inner.truncation or {}
        self.most: int | None = told.get("max_length")
        self._side: str = told.get("direction", "right")
        self.pad: int = (self.inner.padding or {}).get("pad_id", 0)
        self.inner.no_truncation()
        self.inner.no_padding()

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read the ``tokenizer.json`` of a folder.

        Raises:
            DataInvalid: There is none, or it cannot be read.
            EnvironmentMismatch: The package ``tokenizers`` is not installed.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            hint = "export and build bring the tokenizer of the source; put the model's tokenizer.json there"
            raise DataInvalid("no tokenizer", where=str(path), hint=hint)
        try:
            data = read_bytes(path, limit=MOST_BYTES)
        except QexportError as error:
            raise DataInvalid(f"cannot be read: {error.what}", where=str(path), hint=error.hint) from error
        return cls(data, str(path))

    @property
    def size(self) -> int:
        """One more than the largest token: what a model must have in its vocabulary at least."""
        return self._largest + 1

    @cached_property
    def digest(self) -> str:
        """Of which token stands for which text; equal for tokenizers whose tokens mean the same."""
        vocabulary = self.inner.get_vocab(with_added_tokens=True)
        return digest_bytes(json.dumps(sorted(vocabulary.items()), ensure_ascii=True).encode())

    def token(self, text: str) -> int | None:
        """The token that is called ``text``, such as ``</s>``, if there is one."""
        try:
            found: int | None = self.inner.token_to_id(text)
        except UnicodeEncodeError:  # nothing is called like that
            return None
        return found

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text, by default with those that the tokenizer puts around it.

        Raises:
            DataInvalid: The text is not Unicode, or the tokenizer has no token for a part of it.
        """
        return self._encode([text], special=special)[0].ids

    def encode_batch(self, texts: Sequence[str], most: int | None = None, first: int = 0) -> list[Encoded]:
        """Tokens of many texts with those that the tokenizer puts around them, ``most`` at most for each.

        A text that is too long is cut, at the end that the file says, and what is put around it stays. Messages count
        texts from ``first`` on.

        Raises:
            DataInvalid: A text is not Unicode, has a part that there is no token for, or ``most`` leaves no room.
        """
        found = self._encode(texts, special=True, first=first)
        if most is None:
            return [Encoded(one.ids, one.type_ids, cut=False) for one in found]
        room = most - self.inner.num_special_tokens_to_add(False)
        if room < 1:
            raise DataInvalid(f"{most} tokens leave no room for text", where=self._where, hint="allow more tokens")
        return [
            self._cut(text, room) if len(one.ids) > most else Encoded(one.ids, one.type_ids, cut=False)
            for text, one in zip(texts, found, strict=True)
        ]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens, without special ones unless they are asked for."""
        try:
            text: str = self.inner.decode(list(ids), skip_special_tokens=not special)
        except BaseException as error:
            _demand_failure(error)
            raise DataInvalid(f"the tokenizer cannot read tokens: {error}", where=self._where, hint=_OWN) from error
        return text

    @cached_property
    def _largest(self) -> int:
        return max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1)

    def _cut(self, text: str, room: int) -> Encoded:
        """The same text again, cut before anything is put around it, as the library does when it is told to cut."""
        bare = self._encode([text], special=False)[0]
        bare.truncate(room, direction=self._side)
        whole = self.inner.post_process(bare)
        return Encoded(whole.ids, whole.type_ids, cut=True)

    def _encode(self, texts: Sequence[str], *, special: bool, first: int = 0) -> list[tokenizers.Encoding]:
        for index, text in enumerate(texts, first):
            if not isinstance(text, str):  # the library takes pairs as well
                raise DataInvalid(f"text {index} is {type(text).__name__}, expected str")
        try:
            found: list[tokenizers.Encoding] = self.inner.encode_batch_fast(list(texts), add_special_tokens=special)
        except BaseException as error:
            _demand_failure(error)
            for index, text in enumerate(texts, first):
                _demand_unicode(text, index)
            raise DataInvalid(f"the tokenizer cannot read the text: {error}", where=self._where, hint=_OWN) from error
        return found


def _demand_failure(error: BaseException) -> None:
    """Raise on what is no failure of the library, which has no class for its own and panics where it finds a bug."""
    if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
        raise error


def _demand_unicode(text: str, index: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"text {index} is not Unicode: {text[error.start]!r} at character {error.start}"
        raise DataInvalid(what, hint="decode it as UTF-8") from error
