"""The door for .onnx files of other exporters: decoders get the portable layout, everything else stays as it came."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.reading.spec import keeps_cache
from qexport.calibration.running.execute import open_model
from qexport.errors import BuildFailed, UsageError
from qexport.exporter.doors.origin import Origin, Reference, type_of
from qexport.exporter.families.folder import Folder
from qexport.exporter.families.form import FLOATS
from qexport.exporter.families.vocabulary import check_vocabulary, count_words
from qexport.exporter.load import ONNX_FILE, load_source
from qexport.exporter.options import ExportOptions
from qexport.passes.portable import IDS, LOGITS, MASK, PAST, POSITIONS

_LENGTHS = (128, 96, 64, 48, 32, 16, 8)  # tokens


def open_onnx(source: str, asked: ExportOptions, _scratch: Path) -> Origin:
    """Read the model; its own answers are the truth.

    Raises:
        QexportError: As ``load_source``; ``ModelInvalid`` for a decoder whose caches cannot be rewritten;
            ``DataInvalid`` for a tokenizer that does not fit.
        UsageError: Another type, head or layout was asked for than the file has.
    """
    found = load_source(source)
    model, dtype = found.model, type_of(found.model)
    if asked.dtype is not None and FLOATS[asked.dtype] != dtype:
        hint = f"qexport build --recipe {asked.dtype} changes it"
        raise UsageError(
            f"the model is in {dtype.name.lower()}, and .onnx files keep their type", where=source, hint=hint
        )
    if asked.task is not None:
        raise UsageError("an .onnx file has the head that it has", where=source, hint="leave --task out")
    appends = not keeps_cache(model) and any((value.name or "").startswith(PAST) for value in model.graph.inputs)
    if appends and asked.layout != "cached":
        raise UsageError("the decoder has caches", where=source, hint="leave --layout out")
    vocabulary = count_words(model) or (_scored(model) if appends or keeps_cache(model) else None)
    if vocabulary is not None:
        check_vocabulary(Folder(found.path.parent), vocabulary)
    reference = _appending(model) if appends else _plain(model)
    return Origin(
        door="onnx",
        info=found.info,
        parts={ONNX_FILE: _portable(model) if appends else model},
        reference=reference,
        told="the model that was given, in onnxruntime",
        dtype=dtype,
        vocabulary=vocabulary,
        positions=_longest(reference) if appends else None,
        companions=found.companions,
        notes=found.notes,
    )


def _portable(model: ir.Model) -> ir.Model:
    from qexport.passes.kv_cache import to_portable

    work = model.clone()
    to_portable(work)
    return work


def _plain(model: ir.Model) -> Reference:
    session = open_model(model)
    return lambda feeds: session.run(feeds)


def _appending(model: ir.Model) -> Reference:
    """The logits of whole rows, read at once by a decoder whose caches are empty.

    One row after the other: not every exporter's graph takes several, or padding.
    """
    session = open_model(model)
    inputs = {value.name or "": value for value in model.graph.inputs}

    def run(feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        ids = feeds[IDS]
        lengths = feeds.get(MASK, np.ones_like(ids)).sum(1)
        rows = [alone(row[None, :length]) for row, length in zip(ids, lengths, strict=True)]
        logits = np.zeros((*ids.shape, rows[0].shape[-1]), rows[0].dtype)
        for place, row in enumerate(rows):
            logits[place, : len(row)] = row
        return {LOGITS: logits}

    def alone(ids: NDArray[np.int64]) -> NDArray[Any]:
        given = {IDS: ids, MASK: np.ones_like(ids), POSITIONS: np.arange(ids.shape[1])[None]}
        given |= {name: _empty(value) for name, value in inputs.items() if name.startswith(PAST)}
        found: NDArray[Any] = session.run({name: given[name] for name in inputs if name in given}, [LOGITS])[LOGITS][0]
        return found

    return run


def _longest(reference: Reference) -> int | None:
    """The longest row that a decoder can read, as far as it matters here; nothing in the file tells."""
    for length in _LENGTHS:
        with suppress(BuildFailed):
            reference({IDS: np.zeros((1, length), np.int64)})
            return length
    return None


def _empty(value: ir.Value) -> NDArray[Any]:
    assert value.shape is not None, "the pass has measured the caches"
    assert value.dtype is not None, "the pass has measured the caches"
    heads, size = (int(str(value.shape[axis])) for axis in (1, 3))
    return np.zeros((1, heads, 0, size), value.dtype.numpy())


def _scored(model: ir.Model) -> int | None:
    """How many words a decoder scores."""
    logits = next((value for value in model.graph.outputs if value.name == LOGITS), None)
    size = None if logits is None or logits.shape is None or len(logits.shape) != 3 else logits.shape[2]
    return size if isinstance(size, int) else None
