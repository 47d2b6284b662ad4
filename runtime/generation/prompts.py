"""From prompts to rows: what cannot be answered is refused before anything runs."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TypeAlias

from qexport.errors import DataInvalid, UsageError
from qexport.runtime.generation.folders import Folder
from qexport.runtime.generation.models import Model
from qexport.runtime.generation.stops import Stop
from qexport.runtime.sampling.settings import Sampling
from qexport.runtime.speculation.proposal import Reference, Row

Text: TypeAlias = str | Sequence[int]

CHARACTERS = 64  # of text, for each position of a model: tokens stand for fewer, so no longer text can fit
MOST_REFERENCED = 1 << 20  # tokens of the references of a prompt
MOST_CHARACTERS = 16 * MOST_REFERENCED  # of their text, which takes seconds to read as tokens
_LESS = "leave out what the output will not copy from"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an output follows.

    Attributes:
        text: Or its tokens, with all that is to be around them.
        references: What the output may copy from, as texts or as tokens with a name; texts are called by their number.
    """

    text: Text
    references: Sequence[str | Reference] = ()


def read_row(prompt: Prompt, number: int, model: Model) -> Row:
    """Tokens of a prompt and of its references.

    Args:
        prompt: Text or tokens.
        number: Of the prompt in its request, which its randomness goes by.
        model: Whose tokens.

    Raises:
        DataInvalid: No token, one that does not exist, or so many that there is no room for another.
    """
    where, folder, positions = f"prompt {number}", model.folder, model.positions
    if isinstance(prompt.text, str):
        _demand_short(prompt.text, positions, where)
        ids = folder.tokenizer.encode(prompt.text)
    else:
        ids = list(_checked(prompt.text, model.signature.vocabulary, where))
    if not ids:
        raise DataInvalid("there is nothing to continue: no tokens", where=where, hint=_offer(folder))
    if positions is not None and len(ids) >= positions:
        what = f"{len(ids)} tokens, and the model has {positions} positions: there is no room for another"
        raise DataInvalid(what, where=where, hint=f"give {positions - 1} tokens at most")
    references = tuple(_references(prompt.references, model, where))
    total = sum(len(one.ids) for one in references)
    if total > MOST_REFERENCED:
        what = f"the references have {total} tokens, expected {MOST_REFERENCED} or fewer"
        raise DataInvalid(what, where=where, hint=_LESS)
    return Row(ids, len(ids), number, references)


def demand_settings(sampling: Sampling, stop: Stop, vocabulary: int) -> None:
    """Raise :class:`UsageError` where settings are of another kind, or name tokens that the model does not have."""
    for given, kind in ((sampling, Sampling), (stop, Stop)):
        if not isinstance(given, kind):
            raise UsageError(f"{given!r} is given for a {kind.__name__}", hint=f"write {kind.__name__}(...)")
    for name, ids in (("logit_bias", sampling.logit_bias), ("a stop id", stop.ids)):
        for token in ids:
            if not 0 <= token < vocabulary:
                raise UsageError(f"{name} names token {token}, the model has a vocabulary of {vocabulary}")


def _demand_short(text: str, positions: int | None, where: str) -> None:
    """Spare tokenizing what has no chance."""
    most = None if positions is None else max(1 << 20, CHARACTERS * positions)
    if most is not None and len(text) > most:
        what = f"{len(text)} characters are more than {positions} positions hold"
        raise DataInvalid(what, where=where, hint="give less text")


def _checked(given: Sequence[int], vocabulary: int, where: str) -> Sequence[int]:
    """Tokens as integers of Python; bytes, sets and dictionaries are no tokens, though they could be read as such."""
    if not isinstance(given, Iterable) or isinstance(given, bytes | bytearray | memoryview | Mapping | Set):
        raise DataInvalid(f"it is a {type(given).__name__}, expected text or tokens", where=where)
    if isinstance(given, tuple) and set(map(type, given)) == {int} and min(given) >= 0 and max(given) < vocabulary:
        return given  # as references are that come again and again
    ids = []
    for place, token in enumerate(given):
        try:
            ids.append(operator.index(token))
        except TypeError as error:
            raise DataInvalid(f"token {place} is {token!r}, expected an integer", where=where) from error
        if not 0 <= ids[-1] < vocabulary:
            what = f"token {place} is {token}, the model has a vocabulary of {vocabulary}"
            raise DataInvalid(what, where=where, hint="is the tokenizer that of the model?")
    return ids


def _offer(folder: Folder) -> str:
    if folder.begin is None or folder.tokenizer.token(folder.begin) is None:
        return "give some text"
    return f"give some text, or {folder.begin!r}, which texts of this model begin with"


def _references(given: object, model: Model, where: str) -> Iterator[Reference]:
    """Texts and tokens that may be copied, none of which the model does not have."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise UsageError(f"references are a {type(given).__name__}, expected a list of texts", where=where)
    characters = sum(len(one) for one in given if isinstance(one, str))
    if characters > MOST_CHARACTERS:
        what = f"the references have {characters} characters, expected {MOST_CHARACTERS} or fewer"
        raise DataInvalid(what, where=where, hint=_LESS)
    vocabulary = model.signature.vocabulary
    for place, one in enumerate(given):
        if isinstance(one, str):
            yield Reference(str(place), tuple(model.folder.tokenizer.encode(one, special=False)))
        elif isinstance(one, Reference):
            yield Reference(one.name, tuple(_checked(one.ids, vocabulary, f"{where}, reference {place}")))
        else:
            what = f"reference {place} is a {type(one).__name__}, expected text or a Reference"
            raise UsageError(what, where=where)
