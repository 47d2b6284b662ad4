"""Samples to batches: alike lengths together, padded only where an attention mask hides the padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qexport.calibration.reading.spec import Sample, sample_digest
from qexport.errors import UsageError
from qexport.passes.portable import MASK

Batch: TypeAlias = tuple[list[int], dict[str, NDArray[Any]]]  # positions of the samples, input name to [batch, ...]
Signature: TypeAlias = tuple[tuple[str, str, tuple[int, ...]], ...]  # per input: name, type, shape; -1 may be padded

WINDOW_BYTES = 64 << 20


def batches(samples: Iterable[Sample], batch_size: int, *, window: int = WINDOW_BYTES) -> Iterator[Batch]:
    """Group samples by shape and length, at most ``batch_size`` together, every sample in exactly one batch.

    Inputs with an axis as long as the last one of ``attention_mask`` are padded with zeros to the longest sample of
    the batch, the mask included; without a mask only samples of equal shapes meet. Samples are held in memory until
    ``window`` bytes are together and sorted among themselves; as long as one window takes all, the batches are the
    same whatever the order of the samples. The longest come first, so that memory is found wanting at once.

    Raises:
        UsageError: ``batch_size`` is less than 1.
    """
    if batch_size < 1:
        raise UsageError(f"the batch size is {batch_size}, expected 1 or more")
    for items in _windows(samples, batch_size, window):
        items.sort(key=lambda item: item.order)
        for _, group in groupby(items, key=lambda item: item.signature):
            alike = list(group)
            for start in range(0, len(alike), batch_size):
                chosen = alike[start : start + batch_size]
                yield [item.index for item in chosen], _stack([item.sample for item in chosen])


@dataclass(frozen=True, slots=True)
class _Item:
    index: int
    sample: Sample
    signature: Signature
    order: tuple[Signature, int, bytes]


def _windows(samples: Iterable[Sample], batch_size: int, window: int) -> Iterator[list[_Item]]:
    items: list[_Item] = []
    held = 0
    for index, sample in enumerate(samples):
        items.append(_item(index, sample))
        held += sum(array.nbytes for array in sample.values())
        if held >= window and len(items) % batch_size == 0:
            yield items
            items, held = [], 0
    if items:
        yield items


def _item(index: int, sample: Sample) -> _Item:
    mask = sample.get(MASK)
    length = mask.shape[-1] if mask is not None and mask.ndim else -1
    signature = tuple(
        (name, array.dtype.name, tuple(-1 if size == length else size for size in array.shape))
        for name, array in sorted(sample.items())
    )
    return _Item(index, sample, signature, (signature, -length, sample_digest(sample)))


def _stack(samples: list[Sample]) -> dict[str, NDArray[Any]]:
    """Add the batch axis; zeros fill every sample up to the largest size of each axis."""
    batch: dict[str, NDArray[Any]] = {}
    for name, first in samples[0].items():
        shapes = [sample[name].shape for sample in samples]
        batch[name] = np.zeros((len(samples), *map(max, zip(*shapes, strict=True))), first.dtype)
        for row, (sample, shape) in enumerate(zip(samples, shapes, strict=True)):
            batch[name][row, ...][tuple(map(slice, shape))] = sample[name]
    return batch
