"""Hold written models against their source, each in the way that it is used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.reading.batching import batches
from qexport.calibration.reading.spec import Sample, input_specs, keeps_cache, static_batch
from qexport.exporter.doors.inputs import Feeds
from qexport.exporter.doors.origin import Origin
from qexport.exporter.load import ENCODER_FILE, ONNX_FILE
from qexport.exporter.outcome.export_result import CheckInfo, Verification
from qexport.exporter.proof.closeness import UNROUNDED, Allowed, Run, compare, tolerances
from qexport.exporter.proof.decoding import Call, compare_calls, decode, plan
from qexport.exporter.proof.layout import fill
from qexport.exporter.proof.source import DECODED, ENCODED, Found, Material, find_samples, find_texts, padded, reaching
from qexport.exporter.proof.streamed import run_streamed
from qexport.passes.portable import IDS, LOGITS, MASK, SOURCE_MASK, WANTED

Outputs: TypeAlias = dict[str, NDArray[Any]]
Checks: TypeAlias = tuple[CheckInfo, ...]
Judge: TypeAlias = Callable[[list[Outputs], Allowed], Checks]
Answer = TypeVar("Answer")  # what an export says to all that it is asked


def verify(written: Mapping[str, ir.Model], origin: Origin, known: Material) -> tuple[Verification, tuple[str, ...]]:
    """Compare; returns the record and warnings.

    Raises:
        GateFailed: They differ by more than the type allows.
        DataInvalid: Inputs that were given do not fit.
    """
    model = written[ONNX_FILE]
    if keeps_cache(model):
        found = find_texts(known, reaching(DECODED, origin.reach))
        checks = _decoder(written, origin, known, found)
    else:
        own = Found("inputs of the source at several sizes", batches=origin.trials)
        found = own if origin.trials else find_samples(known, model, origin.reach)
        checks = _plain(model, origin, found)
    record = Verification(reference=origin.told, data=found.name, made_up=found.made_up, checks=checks)
    return record, (*found.warnings, *found.unseen(origin.reach, known.positions))


def _held(
    origin: Origin,
    answer: Callable[[bool], Answer],
    judge: Callable[[Answer, Allowed], Checks],
    pairs: Callable[[Answer, Answer], Iterable[Run]],
) -> Checks:
    """Hold an export against its source, and one in 16 bits first with results that are not rounded.

    Args:
        origin: The source.
        answer: Runs the export; results of 16 bits are rounded if it is told so.
        judge: Compares what it says.
        pairs: What it says without rounding and with it.
    """
    given = answer(True)
    if origin.dtype == ir.DataType.FLOAT:
        return judge(given, tolerances(origin.dtype))
    exact = answer(False)
    proven: Checks = ()
    if origin.unrounded:
        checks = judge(exact, defaultdict(lambda: UNROUNDED[origin.dtype]))
        proven = tuple(check.model_copy(update={"what": f"{check.what}, no result rounded"}) for check in checks)
    return (*proven, *judge(given, tolerances(origin.dtype, pairs(exact, given))))


def _plain(model: ir.Model, origin: Origin, found: Found) -> Checks:
    """Samples as a padded batch and some of them alone, or batches as they are."""
    feeds, judge = _batches(origin, found.batches) if found.batches else _samples(model, origin, found)

    def answer(rounded: bool) -> list[Outputs]:
        return [_visible(one, fed) for one, fed in zip(run_streamed(model, feeds, rounded=rounded), feeds, strict=True)]

    return _held(origin, answer, judge, lambda one, other: zip(map(_sizes, feeds), one, other, strict=True))


def _batches(origin: Origin, feeds: Sequence[Feeds]) -> tuple[Sequence[Feeds], Judge]:
    """The batches and what compares the answers."""
    truths = [_visible(origin.reference(each), each) for each in feeds]
    what = f"{len(feeds)} batches" if len(feeds) > 1 else "a batch"

    def judge(given: list[Outputs], allowed: Allowed) -> Checks:
        return compare(what, zip(map(_sizes, feeds), truths, given, strict=True), allowed)

    return feeds, judge


def _samples(model: ir.Model, origin: Origin, found: Found) -> tuple[Sequence[Feeds], Judge]:
    """All samples as a batch, then each second one alone; and what compares the answers."""
    rows = static_batch(input_specs(model))
    order, batch = next(iter(_together(found, rows)))
    lines = range(0, len(order), 2)
    truth = _visible(origin.reference(batch), batch)
    what = f"a batch of {len(order)}, padded" if MASK in batch else f"a batch of {len(order)}"

    def judge(given: list[Outputs], allowed: Allowed) -> Checks:
        together, *alone = given
        checks = compare(what, [(_sizes(batch), truth, together)], allowed)
        each: list[Run] = []
        for line, one in zip(lines, alone, strict=True):
            own = {name: array[line : line + 1] for name, array in truth.items()}
            cut = {name: array[tuple(slice(size) for size in one[name].shape)] for name, array in own.items()}
            each.append((f"sample {order[line]}", cut, {name: array[:1] for name, array in one.items()}))
        return (*checks, *compare(f"{len(lines)} samples, each alone", each, allowed))

    return [batch, *(_alone(found.rows[order[line]], rows) for line in lines)], judge


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


def _decoder(written: Mapping[str, ir.Model], origin: Origin, known: Material, found: Found) -> Checks:
    """The calls of ``proof.decoding``; behind an encoder on what it made of other texts."""
    texts = [row[IDS] for row in found.rows]
    whole, sent = padded(texts), {}
    if ENCODER_FILE in written:
        sent = padded([row[IDS] for row in find_texts(known, reaching(ENCODED, origin.reach)).rows])
        whole = {**sent, WANTED: whole[IDS]}
    calls, truth = plan(texts), origin.reference(whole)[LOGITS]

    def pairs(one: list[NDArray[np.float32]], other: list[NDArray[np.float32]]) -> Iterator[Run]:
        for call, a, b in zip(calls, one, other, strict=True):
            yield call.what, {LOGITS: a[call.judged]}, {LOGITS: b[call.judged]}

    return _held(
        origin,
        lambda rounded: _decoded(written, calls, sent, rounded=rounded),
        lambda given, allowed: compare_calls(truth, calls, given, allowed),
        pairs,
    )


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
