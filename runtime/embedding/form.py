"""What an encoder reads and makes: its inputs, the output with the vectors, how long a text may be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qexport.errors import ModelInvalid, QexportError, UsageError
from qexport.passes.portable import IDS, LOGITS, MASK, MAX_POSITIONS, PAST, TYPES, parse_positions
from qexport.runtime.embedding.options import EmbedOptions
from qexport.runtime.embedding.pooling import POOLINGS
from qexport.runtime.session import Port, Session
from qexport.runtime.tokenizing import Encoded, Tokenizer
from qexport.safe_io import read_text

SENTENCES, TOKENS, HIDDEN = "sentence_embedding", "token_embeddings", "last_hidden_state"
PREFERRED = (SENTENCES, TOKENS, HIDDEN)
POOLING_FILE, MODULES_FILE, SETTINGS_FILE = "1_Pooling/config.json", "modules.json", "tokenizer_config.json"
MOST_SETTINGS = 16 << 20  # bytes
ENDLESS = 1 << 20  # tokens; settings of tokenizers say 10^30 where they do not know

FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class Sizes(NamedTuple):
    """Sizes that an axis can have: from ``least`` to ``most``, where there is an end."""

    least: int = 1
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Form:
    """How to run an encoder.

    Attributes:
        inputs: What it reads, each of ``[rows, tokens]``.
        output: The output to read.
        pooling: How its hidden states become one vector; ``None`` where it has one vector a text.
        many: Whether a text has a vector for every token.
        width: Numbers of a vector, where the model says so.
        longest: Tokens of a text at most; ``None`` where nothing says so.
        rows: How many rows a run can have.
        columns: How many tokens each of them, padding counted.
        pad: Token that stands behind a row.
    """

    inputs: tuple[Port, ...]
    output: str
    pooling: str | None
    many: bool
    width: int | None
    longest: int | None
    rows: Sizes
    columns: Sizes
    pad: int

    def feeds(self, batch: Sequence[Encoded]) -> dict[str, NDArray[Any]]:
        """Arrays of a batch, padded behind each row, and with rows of padding where the model wants more of them."""
        width = max(self.columns.least, *(len(row.ids) for row in batch))
        shape = (max(self.rows.least, len(batch)), width)
        lengths = np.zeros(shape[0], np.int64)
        lengths[: len(batch)] = [len(row.ids) for row in batch]
        lengths[len(batch) :] = 1  # a row without any token would be a mean of nothing
        real = np.arange(width) < lengths[:, None]
        made = {IDS: np.full(shape, self.pad), MASK: real, TYPES: np.zeros(shape, np.int64)}
        for index, row in enumerate(batch):
            made[IDS][index, : len(row.ids)] = row.ids
            if any(row.types):
                made[TYPES][index, : len(row.ids)] = row.types
        return {port.name: made[port.name].astype(port.dtype) for port in self.inputs}

    def read(self, found: NDArray[np.float32], batch: Sequence[Encoded]) -> list[NDArray[np.float32]]:
        """Vectors of the rows of a batch in what the model made of it.

        Raises:
            ModelInvalid: That has another shape than the vectors of such a batch.
        """
        lengths = np.array([len(row.ids) for row in batch])
        axes = 2 if self.pooling is None and not self.many else 3
        if found.ndim != axes or len(found) != len(batch) or (axes == 3 and found.shape[1] < lengths.max()):
            what = f"{self.output!r} has the shape {list(found.shape)} for {len(batch)} rows of {lengths.max()} tokens"
            raise ModelInvalid(what, hint="choose another output")
        if self.many:
            return [row[:length] for row, length in zip(found, lengths, strict=True)]
        if self.pooling is None:
            return list(found)
        return list(POOLINGS[self.pooling](found, (np.arange(found.shape[1]) < lengths[:, None]).astype(np.float32)))


def read_form(session: Session, tokenizer: Tokenizer, folder: Path, options: EmbedOptions) -> Form:
    """Find out how to run an encoder.

    Raises:
        ModelInvalid: The model is no encoder of text.
        UsageError: It has no such output, or fewer positions than texts shall have tokens.
    """
    _demand_encoder(session.ports)
    port = _output(session.results, options.output)
    many = port.name == TOKENS and options.pooling is None
    pools = len(port.shape) == 3 and not many
    rows, columns = (_sizes(session, axis) for axis in (0, 1))
    width = port.shape[-1]
    return Form(
        inputs=tuple(session.ports),
        output=port.name,
        pooling=(options.pooling or find_pooling(folder) or "mean") if pools else None,
        many=many,
        width=width if isinstance(width, int) else None,
        longest=_longest(_positions(session, columns.most), _told(tokenizer, folder), options.max_tokens),
        rows=rows,
        columns=columns,
        pad=tokenizer.pad,
    )


# ---------------------------------------------------------------- inputs and outputs


def _demand_encoder(ports: Sequence[Port]) -> None:
    if any(port.name.startswith(PAST) for port in ports):
        raise ModelInvalid("a decoder with a cache, not an encoder", hint="qexport generate runs decoders")
    unknown = [port.name for port in ports if port.name not in (IDS, MASK, TYPES) or len(port.shape) != 2]
    if unknown or IDS not in {port.name for port in ports}:
        told = ", ".join(f"{port.name!r} {list(port.shape)}" for port in ports)
        what = f"no encoder of text: it reads {told}, expected {IDS}, {MASK} and {TYPES} of two axes"
        raise ModelInvalid(what, hint="qexport export --task embedding writes one")


def _output(results: Sequence[Port], wanted: str | None) -> Port:
    """The output that was asked for, else the preferred one, else the only one that can hold vectors."""
    fit = {port.name: port for port in results if len(port.shape) in (2, 3) and str(port.dtype).startswith("float")}
    if wanted is not None:
        if wanted not in fit:
            raise UsageError(f"no output {wanted!r} with vectors", hint=f"there are: {', '.join(fit) or 'none'}")
        return fit[wanted]
    names = [name for name in PREFERRED if name in fit] or [name for name in fit if name != LOGITS]
    if not names or (len(names) > 1 and names[0] not in PREFERRED):
        told = ", ".join(repr(port.name) for port in results)
        what = f"no encoder: of its outputs {told} none is {', '.join(PREFERRED)}"
        raise ModelInvalid(what, hint="qexport export --task embedding writes one, or name an output")
    return fit[names[0]]


def _sizes(session: Session, axis: int) -> Sizes:
    """What an axis of the tokens can have: its one size, or those of the profile that goes farthest."""
    size = next(port for port in session.ports if port.name == IDS).shape[axis]
    if isinstance(size, int):
        return Sizes(size, size)
    if not session.profiles:
        return Sizes()
    least, _, most = max((profile[IDS] for profile in session.profiles), key=lambda shapes: shapes[2][::-1])
    return Sizes(least[axis], most[axis])


# ---------------------------------------------------------------- lengths


def _positions(session: Session, columns: int | None) -> int | None:
    """Tokens that the model can read."""
    told = parse_positions(session.metadata.get(MAX_POSITIONS, ""))
    return min((size for size in (told, columns) if size is not None), default=None)


def _told(tokenizer: Tokenizer, folder: Path) -> int | None:
    """Tokens that the tokenizer's settings allow."""
    if tokenizer.most is not None:
        return tokenizer.most
    settings = _settings(folder / SETTINGS_FILE)
    told = settings.get("model_max_length") if isinstance(settings, dict) else None
    return int(told) if isinstance(told, int | float) and 0 < told <= ENDLESS else None


def _longest(positions: int | None, told: int | None, asked: int | None) -> int | None:
    if asked is None:
        return min((size for size in (positions, told) if size is not None), default=None)
    if positions is not None and asked > positions:
        raise UsageError(f"max_tokens is {asked}, the model has {positions} positions")
    return asked


# ---------------------------------------------------------------- pooling


def find_pooling(folder: Path) -> str | None:
    """What the settings of sentence-transformers in a folder say, if there are any.

    Raises:
        ModelInvalid: Several poolings at once, an unknown one, or layers behind the pooling, which the graph has not.
    """
    modules = _settings(folder / MODULES_FILE)
    listed = modules if isinstance(modules, list) else []
    kinds = [str(module.get("type", "")) for module in listed if isinstance(module, dict)]
    if any(kind.endswith(".Dense") for kind in kinds):
        hint = "export the folder with --task embedding, or choose a pooling that leaves them out"
        raise ModelInvalid(
            "layers behind the pooling are not in the graph", where=str(folder / MODULES_FILE), hint=hint
        )
    config = _settings(folder / POOLING_FILE)
    if not isinstance(config, dict):
        return None
    named = config.get("pooling_mode") or [mode for flag, mode in FLAGS.items() if config.get(flag)]
    modes = named if isinstance(named, list) else [named]
    if len(modes) != 1 or modes[0] not in tuple(POOLINGS):
        what = f"pooling {' + '.join(map(repr, modes))} is not supported"
        hint = f"supported: {', '.join(POOLINGS)}"
        raise ModelInvalid(what, where=str(folder / POOLING_FILE), hint=hint)
    return str(modes[0])


def _settings(path: Path) -> Any:
    """What a file of settings says; ``None`` without one."""
    if not path.is_file():
        return None
    try:
        return json.loads(read_text(path, limit=MOST_SETTINGS))
    except (ValueError, RecursionError, QexportError) as error:
        raise ModelInvalid(f"cannot be read: {error}", where=str(path), hint="expected JSON") from error
