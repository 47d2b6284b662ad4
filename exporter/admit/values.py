"""Numbers in weights: NaN and Inf are refused, masks and single sentinels excepted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from qexport.errors import ModelInvalid
from qexport.exporter.admit.external import pieces, reference
from qexport.exporter.admit.subject import Subject
from qexport.exporter.admit.tensors import all_tensors, needed_bytes

_PIECE = 1 << 20  # elements


@dataclass(frozen=True, slots=True)
class Pattern:
    """Bit patterns of a float type: not finite means ``bits & mask == value``.

    Attributes:
        unsigned: Unsigned type of the same width.
        mask: Bits to look at.
        value: What they are in NaN and Inf.
        negative: Bits of minus infinity, if the type has it.
    """

    unsigned: str
    mask: int
    value: int
    negative: int | None = None


_SINGLE = Pattern("<u4", 0x7F800000, 0x7F800000, 0xFF800000)
_DOUBLE = Pattern("<u8", 0x7FF << 52, 0x7FF << 52, 0xFFF << 52)

PATTERNS: dict[int, Pattern] = {
    TensorProto.FLOAT: _SINGLE,
    TensorProto.COMPLEX64: _SINGLE,
    TensorProto.DOUBLE: _DOUBLE,
    TensorProto.COMPLEX128: _DOUBLE,
    TensorProto.FLOAT16: Pattern("<u2", 0x7C00, 0x7C00, 0xFC00),
    TensorProto.BFLOAT16: Pattern("<u2", 0x7F80, 0x7F80, 0xFF80),
    TensorProto.FLOAT8E5M2: Pattern("u1", 0x7C, 0x7C, 0xFC),
    TensorProto.FLOAT8E4M3FN: Pattern("u1", 0x7F, 0x7F),
    TensorProto.FLOAT8E4M3FNUZ: Pattern("u1", 0xFF, 0x80),
    TensorProto.FLOAT8E5M2FNUZ: Pattern("u1", 0xFF, 0x80),
    TensorProto.FLOAT8E8M0: Pattern("u1", 0xFF, 0xFF),
}


def check_finite(subject: Subject) -> None:
    """Raise ``ModelInvalid`` naming the tensors that hold NaN or Inf.

    Two uses of infinity are everyday and let through: a single element (the bounds of Clip, the start of a maximum),
    and attention masks, tensors of nothing but zero and minus infinity.
    """
    if subject.limits.allow_nonfinite:
        return
    bad = nonfinite(subject)
    if bad:
        raise ModelInvalid(
            f"NaN or Inf in {name_some(bad)}",
            hint="train or export again; qexport build takes it with --allow-nonfinite",
        )


def nonfinite(subject: Subject) -> list[str]:
    """The tensors that hold NaN or Inf where nobody expects it; ranges of files that are shared are named once."""
    bad: list[str] = []
    seen: set[object] = set()
    for where, tensor in all_tensors(subject):
        if tensor.data_type not in PATTERNS:
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            key = (reference(tensor, where), tensor.data_type, needed_bytes(tensor))
            if key in seen:
                continue
            seen.add(key)
        if not _acceptable(tensor, subject.root):
            bad.append(where)
    return bad


def name_some(names: Sequence[str]) -> str:
    """The first five, and how many more there are."""
    return "; ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _acceptable(tensor: TensorProto, root: Path | None) -> bool:
    pattern = PATTERNS[tensor.data_type]
    sentinels = (pattern.negative, pattern.mask) if pattern.negative else ()
    alone = math.prod(tensor.dims) == 1
    finite, mask = True, bool(sentinels)
    for bits in _bits(tensor, pattern, root):
        finite = finite and not np.any((bits & bits.dtype.type(pattern.mask)) == pattern.value)
        mask = mask and bool(np.all((bits == 0) | (bits == pattern.negative)))
        if not finite and not mask:
            return alone and bool(np.all(np.isin(bits, sentinels)))
    return True


def _bits(tensor: TensorProto, pattern: Pattern, root: Path | None) -> Iterator[NDArray[np.unsignedinteger]]:
    """The elements as unsigned integers, piece by piece."""
    dtype = np.dtype(pattern.unsigned)
    if tensor.data_location == TensorProto.EXTERNAL:
        assert root is not None, "external data without a folder was refused before"
        for piece in pieces(root, reference(tensor, ""), needed_bytes(tensor)):
            yield np.frombuffer(piece, dtype)
        return
    bits = np.frombuffer(tensor.raw_data, dtype) if tensor.raw_data else _typed_bits(tensor, dtype)
    for start in range(0, bits.size, _PIECE):
        yield bits[start : start + _PIECE]


def _typed_bits(tensor: TensorProto, dtype: np.dtype[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    if tensor.float_data:
        return np.asarray(tensor.float_data, "<f4").view(dtype)
    if tensor.double_data:
        return np.asarray(tensor.double_data, "<f8").view(dtype)
    return np.asarray(tensor.int32_data, np.int64).astype(dtype)
