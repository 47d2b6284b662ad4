"""Hold written models against their source, each in the way that it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.reading.batching import batches
from qexport.calibration.reading.spec import Sample, input_specs, keeps_cache, static_batch
from qexport.exporter.doors.inputs import Feeds
from qexport.exporter.doors.origin import Origin
from qexport.exporter.load import ENCODER_FILE, ONNX_FILE
from qexport.exporter.outcome.export_result import CheckInfo, Verification
from qexport.exporter.proof.closeness import Allowed, Run, compare, tolerances
from qexport.exporter.proof.decoding import Call, compare_calls, decode, plan
from qexport.exporter.proof.layout import fill
from qexport.exporter.proof.source import Found, Material, find_samples, find_texts
from qexport.exporter.proof.streamed import run_streamed
from qexport.passes.portable import IDS, LOGITS, MASK, SOURCE_MASK, WANTED

Outputs: TypeAlias = dict[str, NDArray[Any]]
ENCODED = (17, 29, 8)  # tokens that an encoder reads for the rows of its decoder


def verify(written: Mapping[str, ir.Model], origin: Origin, known: Material) -> tuple[Verification, tuple[str, ...]]:
    """Compare; returns the record and warnings.

    Raises:
        GateFailed: They differ by more than the type allows.
        DataInvalid: Inputs that were given do not fit.
    """
    model = written[ONNX_FILE]
    if keeps_cache(model):
        found = find_texts(known)
        checks = _decoder(written, origin, known, found)
    else:
        own = Found("inputs of the source at several sizes", batches=origin.trials)
        found = own if origin.trials else find_samples(known, model)
        checks = _plain(model, origin, found)
    record = Verification(reference=origin.told, data=found.name, made_up=found.made_up, checks=checks)
    return record, found.warnings


def _plain(model: ir.Model, origin: Origin, found: Found) -> tuple[CheckInfo, ...]:
    """Samples as a padded batch and some of them alone, or batches as they are."""
    if found.batches:
        given, allowed = _answers(model, origin.dtype, found.batches)
        truths = (_visible(origin.reference(feeds), feeds) for feeds in found.batches)
        runs = zip(map(_sizes, found.batches), truths, given, strict=True)
        return compare(f"{len(given)} batches" if len(given) > 1 else "a batch", runs, allowed)
    rows = static_batch(input_specs(model))
    order, batch = next(iter(_together(found, rows)))
    lines = range(0, len(order), 2)
    singles = [_alone(found.rows[order[line]], rows) for line in lines]
    (together, *alone), allowed = _answers(model, origin.dtype, [batch, *singles])
    truth = _visible(origin.reference(batch), batch)
    what = f"a batch of {len(order)}, padded" if MASK in batch else f"a batch of {len(order)}"
    checks = compare(what, [(_sizes(batch), truth, together)], allowed)
    each: list[Run] = []
    for line, one in zip(lines, alone, strict=True):
        own = {name: array[line : line + 1] for name, array in truth.items()}
        cut = {name: array[tuple(slice(size) for size in one[name].shape)] for name, array in own.items()}
        each.append((f"sample {order[line]}", cut, {name: array[:1] for name, array in one.items()}))
    return (*checks, *compare(f"{len(lines)} samples, each alone", each, allowed))


def _answers(model: ir.Model, dtype: ir.DataType, feeds: Sequence[Feeds]) -> tuple[list[Outputs], Allowed]:
    """What the export says, and how far that may be off."""
    shown = [_visible(one, each) for one, each in zip(run_streamed(model, feeds), feeds, strict=True)]
    if dtype == ir.DataType.FLOAT:
        return shown, tolerances(dtype)
    exact = (_visible(one, each) for one, each in zip(run_streamed(model, feeds, rounded=False), feeds, strict=True))
    return shown, tolerances(dtype, zip(map(_sizes, feeds), exact, shown, strict=True))


def _together(found: Found, rows: int | None) -> Iterator[tuple[list[int], Feeds]]:
    """All samples that fit into one batch, padded where a mask hides that."""
    for order, feeds in batches(found.rows, rows or len(found.rows)):
        yield order, fill(feeds, rows)


def _alone(sample: Sample, rows: int | None) -> Feeds:
    return fill({name: array[None] for name, array in sample.items()}, rows)


def _visible(outputs: Mapping[str, NDArray[Any]], feeds: Feeds) -> dict[str, NDArray[Any]]:
    """Outputs with zeros where the mask hides a position: nobody reads them."""
    mask = feeds.get(MASK)
    if mask is None or mask.ndim != 2 or WANTED in feeds:
        return dict(outputs)
    shown = mask != 0
    return {
        name: np.where(shown.reshape(*shown.shape, *[1] * (array.ndim - 2)), array, np.zeros_like(array))
        if array.shape[:2] == shown.shape
        else array
        for name, array in outputs.items()
    }


def _sizes(feeds: Feeds) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())


def _decoder(written: Mapping[str, ir.Model], origin: Origin, known: Material, found: Found) -> tuple[CheckInfo, ...]:
    """The calls of ``proof.decoding``; behind an encoder on what it made of other texts."""
    texts = [row[IDS] for row in found.rows]
    whole, sent = _padded(texts), {}
    if ENCODER_FILE in written:
        sent = _padded([row[IDS] for row in find_texts(known, ENCODED).rows])
        whole = {**sent, WANTED: whole[IDS]}
    calls = plan(texts)
    logits = _decoded(written, calls, sent)
    allowed = tolerances(origin.dtype)
    if origin.dtype != ir.DataType.FLOAT:
        exact = _decoded(written, calls, sent, rounded=False)
        pairs = zip(calls, exact, logits, strict=True)
        judged = ((call.what, {LOGITS: a[call.judged]}, {LOGITS: b[call.judged]}) for call, a, b in pairs)
        allowed = tolerances(origin.dtype, judged)
    return compare_calls(origin.reference(whole)[LOGITS], calls, logits, allowed)


def _decoded(
    written: Mapping[str, ir.Model], calls: Sequence[Call], sent: Feeds, *, rounded: bool = True
) -> list[NDArray[np.float32]]:
    context: Feeds = {}
    if sent:
        (encoded,) = run_streamed(written[ENCODER_FILE], [sent], rounded=rounded)
        read = {value.name for value in written[ONNX_FILE].graph.inputs}
        context = {name: array for name, array in encoded.items() if name in read}
        context[SOURCE_MASK] = sent[MASK]
    return decode(written[ONNX_FILE], calls, context, rounded=rounded)


def _padded(rows: list[NDArray[Any]]) -> Feeds:
    """Rows filled up with zeros to the longest, and the mask that tells so."""
    length = max(map(len, rows))
    mask = np.stack([np.arange(length) < len(row) for row in rows]).astype(np.int64)
    return {IDS: np.stack([np.pad(row, (0, length - len(row))) for row in rows]), MASK: mask}
