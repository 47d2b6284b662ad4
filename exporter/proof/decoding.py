"""The calls that prove a decoder in the portable layout: what an engine will ever ask of it, against whole rows.

The source scores whole rows at once; the export reads the same rows in pieces, goes back and writes again, and reads
rows of different lengths together. Wherever a token was read, its scores must be those of the whole row. Caches begin
with noise in them, which nobody may see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.exporter.outcome.export_result import CheckInfo
from qexport.exporter.proof.closeness import Allowed, Run, compare
from qexport.exporter.proof.streamed import BUDGET, run_streamed
from qexport.passes.portable import IDS, LOGITS, PAST, POSITIONS, WRITE, present_name

ROWS = 3
LEAST = 6  # tokens of the longest row, below which there are no pieces to speak of
_PREFILL, _STEPS, _WIDE = 20, 8, 5
_NOISE = 3.0  # standard deviation of what caches hold at first
_ROOM = 64  # columns of caches are a multiple of it

Ids = NDArray[np.int64]  # [tokens] of a row


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a decoder.

    Attributes:
        what: What it is part of; calls in a row with the same words are one line of the report.
        rows: Which of the texts its batch is of.
        ids: Tokens [batch, sequence].
        positions: Their places in the texts; behind the end of a row, of its last token.
        write_indices: Columns that the first of them go to, [batch].
        judged: Whose scores must be those of the whole row, [batch, sequence].
        fresh: Whether the caches are new.
    """

    what: str
    rows: tuple[int, ...]
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    write_indices: NDArray[np.int64]
    judged: NDArray[np.bool_]
    fresh: bool = False


def plan(texts: Sequence[Ids]) -> tuple[Call, ...]:
    """A text alone, step by step and back; then all of them together, none as far as the other."""
    return (*_alone(texts), *_ragged(texts))


def _alone(texts: Sequence[Ids]) -> Iterator[Call]:
    length = len(texts[0])
    first, steps = max(1, min(_PREFILL, length // 3)), max(1, min(_STEPS, length // 6))
    at, wide = first + steps, min(_WIDE, length - first - steps)
    wrong = [np.roll(texts[0], 7)]
    yield _call(f"prompt of {first}", texts, [0], [(0, first)])
    for place in range(first, at):
        yield _call(f"{steps} single steps", texts, [0], [(place, 1)])
    yield _call("draft that was wrong", wrong, [0], [(at, wide)], judged=False)
    yield _call(f"wide step of {wide}, after going back", texts, [0], [(at, wide)])
    if at + wide < length:
        rest = length - at - wide
        yield _call(f"step of {rest}, up to {length} tokens", texts, [0], [(at + wide, rest)])


def _ragged(texts: Sequence[Ids]) -> Iterator[Call]:
    rows = list(range(len(texts)))
    done = [0] * len(texts)
    counts = [max(1, min(_PREFILL - 6 * row, len(texts[row]) // 2)) for row in rows]  # none ends where another does
    for more in (counts, [1] * len(rows), [(_WIDE, 2, 4)[row % 3] for row in rows], [1] * len(rows)):
        spans = [(at, min(count, len(text) - at)) for at, count, text in zip(done, more, texts, strict=True)]
        yield _call(f"batch of {len(rows)} rows of different lengths", texts, rows, spans)
        done = [at + count for at, count in spans]


def _call(
    what: str, texts: Sequence[Ids], rows: Sequence[int], spans: Sequence[tuple[int, int]], *, judged: bool = True
) -> Call:
    """Read ``count`` tokens from ``at`` on of each row; shorter rows are filled up with what nobody may see."""
    width = max(count for _, count in spans)
    starts, counts = (np.array(each, np.int64) for each in zip(*spans, strict=True))
    columns = np.arange(width)
    real = columns < counts[:, None]
    positions = np.where(real, starts[:, None] + columns, np.maximum(starts + counts - 1, 0)[:, None])
    ids = np.stack([texts[row][places] for row, places in zip(rows, positions, strict=True)]).astype(np.int64)
    return Call(what, tuple(rows), ids, positions, starts, real & judged, fresh=not starts.any())


def decode(
    model: ir.Model,
    calls: Sequence[Call],
    context: Mapping[str, NDArray[Any]] | None = None,
    *,
    budget: int = BUDGET,
    rounded: bool = True,
) -> list[NDArray[np.float32]]:
    """Logits [batch, sequence, vocabulary] of every call.

    Args:
        model: In the portable layout.
        calls: As ``plan`` makes them.
        context: Inputs that stay the same for a whole text, such as what an encoder found, one row for each text.
        budget: See ``run_streamed``.
        rounded: The same.
    """
    ends = max(int(call.write_indices.max()) + call.ids.shape[1] for call in calls)
    columns, rng = _ROOM * -(-(ends + 1) // _ROOM), np.random.default_rng(0)
    caches = [value for value in model.graph.inputs if (value.name or "").startswith(PAST)]
    feeds = []
    for call in calls:
        feed = {IDS: call.ids, POSITIONS: call.positions, WRITE: call.write_indices}
        for name, array in (context or {}).items():
            feed[name] = array[list(call.rows)]
        if call.fresh:
            feed |= {cache.name or "": _noise(cache, len(call.rows), columns, rng) for cache in caches}
        feeds.append(feed)
    carried = {cache.name or "": present_name(cache.name or "") for cache in caches}
    return [found[LOGITS] for found in run_streamed(model, feeds, carried, budget=budget, rounded=rounded)]


def _noise(cache: ir.Value, rows: int, columns: int, rng: np.random.Generator) -> NDArray[Any]:
    assert cache.shape is not None, "the portable layout names every axis"
    assert cache.dtype is not None, "the portable layout names every type"
    _, heads, _, size = cache.shape
    return (_NOISE * rng.standard_normal((rows, int(str(heads)), columns, int(str(size))))).astype(cache.dtype.numpy())


def compare_calls(
    truth: NDArray[Any], calls: Sequence[Call], found: Sequence[NDArray[Any]], allowed: Allowed
) -> tuple[CheckInfo, ...]:
    """Hold the logits of calls against those of whole texts [texts, tokens, vocabulary].

    Raises:
        GateFailed: They differ by more than ``allowed``.
    """
    checks: list[CheckInfo] = []
    for what, group in groupby(zip(calls, found, strict=True), key=lambda pair: pair[0].what):
        checks += compare(what, (run for call, logits in group for run in _rows(truth, call, logits)), allowed)
    return tuple(checks)


def _rows(truth: NDArray[Any], call: Call, logits: NDArray[Any]) -> Iterator[Run]:
    for line, row in enumerate(call.rows):
        judged = call.judged[line]
        places = call.positions[line][judged]
        if len(places):
            where = f"text {row}, positions {places[0]} to {places[-1]}"
            yield where, {LOGITS: truth[row, places]}, {LOGITS: logits[line][judged]}
