"""The samples that the result does worst on: what they say, or how they look."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qexport.calibration.reading.spec import Sample as Inputs
from qexport.errors import QexportError
from qexport.exporter.outcome.result import SampleQuality
from qexport.exporter.report.values import Sample
from qexport.passes.portable import IDS
from qexport.runtime.tokenizing import Tokenizer
from qexport.safe_io import read_bytes

LETTERS = 200
SIDE = 64  # of a picture
MOST = 1 << 32  # tokens are numbered below that


def worst_samples(worst: Iterable[SampleQuality], data: Iterable[Inputs], tokenizer: Path | None) -> tuple[Sample, ...]:
    """Return the samples of ``data`` that ``worst`` names, worst first.

    Text is what the tokenizer makes of the tokens, where there is one; the first input that looks like a picture is
    one.
    """
    wanted = {entry.index: entry.cosine for entry in worst}
    found = dict(_take(data, wanted))
    decoder = _open(tokenizer) if any(IDS in inputs for inputs in found.values()) else None
    return tuple(_sample(index, wanted[index], found[index], decoder) for index in wanted if index in found)


def _take(data: Iterable[Inputs], wanted: Mapping[int, float]) -> Iterator[tuple[int, Inputs]]:
    last = max(wanted, default=-1)
    if last < 0:
        return
    for index, inputs in enumerate(data):
        if index in wanted:
            yield index, inputs
        if index >= last:
            return


def _open(path: Path | None) -> Tokenizer | None:
    """The tokenizer; without it there is no text, and that is no reason to lose a report."""
    try:
        return None if path is None else Tokenizer(read_bytes(path), str(path))
    except QexportError:
        return None


def _sample(index: int, cosine: float, inputs: Inputs, tokenizer: Tokenizer | None) -> Sample:
    shapes = ", ".join(f"{name} [{', '.join(map(str, array.shape))}]" for name, array in inputs.items())
    pictures = (picture(array) for array in inputs.values())
    text = ""
    if tokenizer is not None and IDS in inputs:
        ids = [i for i in map(int, inputs[IDS].reshape(-1)) if 0 <= i < MOST]  # data may hold anything
        text = tokenizer.inner.decode(ids, skip_special_tokens=True)[:LETTERS]
    return Sample(index, cosine, text, shapes, next((found for found in pictures if found), ""))


def picture(array: NDArray[np.generic]) -> str:
    """A float array ``[C, H, W]`` or ``[H, W, C]`` of one or three channels as a PNG in base64; else empty.

    The least number is black, the largest white; of larger pictures every second, third, ... pixel is shown.
    """
    if array.ndim != 3 or array.dtype.kind != "f" or not array.size or not np.isfinite(array).all():
        return ""
    pixels = np.asarray(array, np.float32)
    if pixels.shape[0] in (1, 3):
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.shape[2] not in (1, 3) or min(pixels.shape[:2]) < 2:
        return ""
    step = -(-max(pixels.shape[:2]) // SIDE)
    pixels = pixels[::step, ::step]
    low, high = float(pixels.min()), float(pixels.max())
    grey = np.rint((pixels - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
    return base64.b64encode(_png(grey)).decode("ascii")


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """``[H, W, 1 or 3]`` in the format of RFC 2083, without filters."""
    height, width, channels = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    head = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
