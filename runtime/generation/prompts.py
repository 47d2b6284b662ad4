"""From prompts to rows: what cannot be answered is refused before anything runs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from qexport.errors import DataInvalid, UsageError
from qexport.runtime.generation.folders import Folder
from qexport.runtime.generation.models import Model
from qexport.runtime.generation.stops import Stop
from qexport.runtime.sampling.settings import Sampling
from qexport.runtime.speculation.proposal import Reference, Row
from qexport.runtime.tokenizing import Tokenizer

Text: TypeAlias = str | Sequence[int]

CHARACTERS = 64  # of text, for each position of a model: tokens stand for fewer, so no longer text can fit
MOST_REFERENCED = 1 << 20  # tokens of the references of a prompt


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
        ids = _checked(prompt.text, model.signature.vocabulary, where)
    if not ids:
        raise DataInvalid("there is nothing to continue: no tokens", where=where, hint=_offer(folder))
    if positions is not None and len(ids) >= positions:
        what = f"{len(ids)} tokens, and the model has {positions} positions: there is no room for another"
        raise DataInvalid(what, where=where, hint=f"give {positions - 1} tokens at most")
    references = tuple(_reference(one, place, folder.tokenizer, where) for place, one in enumerate(prompt.references))
    total = sum(len(one.ids) for one in references)
    if total > MOST_REFERENCED:
        what = f"the references have {total} tokens, expected {MOST_REFERENCED} or fewer"
        raise DataInvalid(what, where=where, hint="leave out what the output will not copy from")
    return Row(ids, len(ids), number, references)


def demand_tokens(sampling: Sampling, stop: Stop, vocabulary: int) -> None:
    """Raise :class:`UsageError` where settings name tokens that the model does not have."""
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


def _checked(given: Sequence[int], vocabulary: int, where: str) -> list[int]:
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


def _reference(given: str | Reference, place: int, tokenizer: Tokenizer, where: str) -> Reference:
    if isinstance(given, Reference):
        return given
    if not isinstance(given, str):
        raise UsageError(f"reference {place} is a {type(given).__name__}, expected text or a Reference", where=where)
    return Reference(str(place), tuple(tokenizer.encode(given, special=False)))
