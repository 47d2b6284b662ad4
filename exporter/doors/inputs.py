"""Inputs described in words, ``NAME:DTYPE[batch,3,32,32]``, and examples of them.

A whole number is a fixed size. A name stands for a dimension that stays free; the same name is the same dimension.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qexport.errors import DataInvalid, ResourceExhausted, UsageError
from qexport.exporter.steps import suggest

Feeds: TypeAlias = dict[str, NDArray[Any]]
Dim: TypeAlias = int | str

DTYPES: dict[str, np.dtype[Any]] = {
    kind.name: kind
    for kind in map(
        np.dtype,
        (
            *("float32", "float16", ml_dtypes.bfloat16, "float64"),
            *("int64", "int32", "int16", "int8", "uint8", "bool"),
        ),
    )
}
_FORM = "NAME:DTYPE[DIM,DIM,...], such as 'input:float32[batch,3,32,32]'"
_TEXT = re.compile(
    r"(?P<name>[^:\[\]]+):(?P<dtype>\w+)\[(?P<dims>[^\[\]]*)\](=(?P<low>-?\d{1,19})\.\.(?P<high>-?\d{1,19}))?"
)
_DIM = re.compile(r"[A-Za-z_]\w*")
_MOST_DIMS, _MOST_NUMBERS = 16, 1 << 30  # of an example
_DIGITS, _SHOWN = 18, 200  # characters
_SMALL = (0, 1)  # integers that any vocabulary, mask and index has room for
_ROWS = range(2, 64)  # sizes of the first axis; torch takes 0 and 1 for special
_SIZES = range(16, 4096, 8)  # sizes of the others: halves go into them a few times


@dataclass(frozen=True, slots=True)
class AskedInput:
    """One input of a model, as a person describes it.

    Attributes:
        name: Its name in the graph.
        dtype: Its element type.
        shape: Its shape; a name stands for a dimension that is free.
        values: The least and the greatest of generated values; ``None`` for zeros and ones of an integer input, and
            normally distributed numbers of a float one.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Dim, ...]
    values: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"{self.name}:{self.dtype.name}[{','.join(map(str, self.shape))}]"


def parse_input(text: str) -> AskedInput:
    """Read ``NAME:DTYPE[DIM,...]``, with ``=LOW..HIGH`` behind it for the range of generated values.

    Raises:
        UsageError: It is not of that form, the type is unknown, or a dimension is neither a size nor a name.
    """
    where = f"input {text!r}"[:_SHOWN]
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        raise UsageError("not a description of an input", where=where, hint=f"write {_FORM}")
    if match["dtype"] not in DTYPES:
        raise UsageError(f"unknown type {match['dtype']!r}", where=where, hint=suggest(match["dtype"], DTYPES))
    words = [word.strip() for word in match["dims"].split(",")] if match["dims"].strip() else []
    shape = tuple(_dim(word, where) for word in words)
    if len(shape) > _MOST_DIMS:
        raise UsageError(f"{len(shape)} dimensions, expected {_MOST_DIMS} or fewer", where=where)
    if math.prod(dim for dim in shape if isinstance(dim, int)) > _MOST_NUMBERS:
        raise ResourceExhausted(f"an example has more than {_MOST_NUMBERS} numbers", where=where)
    values = (int(match["low"]), int(match["high"])) if match["low"] else None
    if values and values[0] > values[1]:
        raise UsageError(f"no values from {values[0]} to {values[1]}", where=where, hint="write =LOW..HIGH")
    if values and not _holds(DTYPES[match["dtype"]], values):
        raise UsageError(f"{match['dtype']} has no values from {values[0]} to {values[1]}", where=where)
    return AskedInput(match["name"].strip(), DTYPES[match["dtype"]], shape, values)


def parse_inputs(texts: Iterable[str]) -> tuple[AskedInput, ...]:
    """Read several descriptions; raise ``UsageError`` where one is wrong or two share a name."""
    asked = tuple(map(parse_input, texts))
    seen: set[str] = set()
    for one in asked:
        if one.name in seen:
            raise UsageError(f"input {one.name!r} is described twice", hint="describe each input once")
        seen.add(one.name)
    return asked


def describe(feeds: Mapping[str, NDArray[Any]]) -> tuple[AskedInput, ...]:
    """Describe data: the first axis is the dimension ``batch`` where all have the same size there, the rest is fixed.

    Raises:
        UsageError: A type that models do not read, or an axis of size 0.
    """
    rows = {array.shape[0] for array in feeds.values() if array.ndim}
    found = []
    for name, array in feeds.items():
        if array.dtype.name not in DTYPES or not array.size:
            what = f"no example: {array.dtype.name}{list(array.shape)}"
            raise UsageError(what, where=f"input {name!r}", hint=f"give numbers of type {', '.join(DTYPES)}")
        shape: tuple[Dim, ...] = array.shape
        found.append(AskedInput(name, array.dtype, ("batch", *shape[1:]) if shape and len(rows) == 1 else shape))
    return tuple(found)


def _holds(dtype: np.dtype[Any], values: tuple[int, int]) -> bool:
    """Whether a type has whole numbers as far as that."""
    if dtype.kind == "b":
        return values[0] >= 0 and values[1] <= 1
    if dtype.kind in "iu":
        known = np.iinfo(dtype)
        return known.min <= values[0] and values[1] <= known.max
    return max(map(abs, values)) <= (1 << 15 if dtype.itemsize == 2 else 1 << 62)


def _dim(word: str, where: str) -> Dim:
    if word.isascii() and word.isdigit() and len(word) <= _DIGITS and int(word) > 0:
        return int(word)
    if _DIM.fullmatch(word):
        return word
    what = f"dimension {word[:40]!r} is neither a size above 0 nor a name"
    raise UsageError(what, where=where, hint=f"write {_FORM}")


# ---------------------------------------------------------------- examples


def free_dims(asked: Iterable[AskedInput]) -> tuple[str, ...]:
    """Names of the free dimensions, in the order they are first met."""
    return tuple(dict.fromkeys(dim for one in asked for dim in one.shape if isinstance(dim, str)))


def sizes_for(asked: tuple[AskedInput, ...], known: Mapping[str, int] | None = None) -> dict[str, int]:
    """Sizes to export with: all different, from each other and from every fixed one, and none of them 0 or 1.

    Args:
        asked: The inputs.
        known: Sizes to keep where that is possible, such as those of real data.
    """
    taken = {dim for one in asked for dim in one.shape if isinstance(dim, int)}
    first = {one.shape[0] for one in asked if one.shape}
    found: dict[str, int] = {}
    for name in free_dims(asked):
        wanted = (known or {}).get(name, 0)
        choices = chain([wanted] if wanted > 1 else [], _ROWS if name in first else _SIZES)
        found[name] = next(size for size in choices if size not in taken)
        taken.add(found[name])
    return found


def sizes_of(asked: Iterable[AskedInput], feeds: Mapping[str, NDArray[Any]], where: str) -> dict[str, int]:
    """The size of every free dimension in data.

    Raises:
        DataInvalid: An input is missing, is not one of these, has another type or shape, or two sizes have one name.
    """
    named = {one.name: one for one in asked}
    for name in feeds:
        if name not in named:
            raise DataInvalid(f"there is no input {name!r}", where=where, hint=suggest(name, named))
    found: dict[str, int] = {}
    for name, one in named.items():
        if name not in feeds:
            raise DataInvalid(f"nothing for input {name!r}", where=where, hint=f"the model takes {one}")
        array = feeds[name]
        got = f"{array.dtype.name}{list(array.shape)}"
        if array.dtype != one.dtype or array.ndim != len(one.shape):
            raise DataInvalid(f"input {name!r} is {got}", where=where, hint=f"the model takes {one}")
        for dim, size in zip(one.shape, array.shape, strict=True):
            if size != (dim if isinstance(dim, int) else found.setdefault(dim, size)):
                other = f"{dim} is {found[dim]} elsewhere" if isinstance(dim, str) else f"{dim} is asked for"
                raise DataInvalid(f"input {name!r} is {got}: {other}", where=where, hint=f"the model takes {one}")
    return found


def generate(asked: Iterable[AskedInput], sizes: Mapping[str, int]) -> Feeds:
    """Values of every input at these sizes, the same each time."""
    rng = np.random.default_rng(0)
    return {
        one.name: _values(one, [sizes[dim] if isinstance(dim, str) else dim for dim in one.shape], rng) for one in asked
    }


def _values(one: AskedInput, shape: list[int], rng: np.random.Generator) -> NDArray[Any]:
    if one.dtype.kind in "iub":
        low, high = one.values or _SMALL
        return rng.integers(low, high, shape, endpoint=True).astype(one.dtype)
    made = rng.uniform(*one.values, shape) if one.values else rng.standard_normal(shape)
    return made.astype(one.dtype)


def resize(asked: Iterable[AskedInput], feeds: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]) -> Feeds:
    """The same data at other sizes of the free dimensions: cut, or begun again from the start."""
    made: Feeds = {}
    for one in asked:
        array = feeds[one.name]
        for axis, dim in enumerate(one.shape):
            if isinstance(dim, str):
                array = np.take(array, np.arange(sizes[dim]) % array.shape[axis], axis)
        made[one.name] = array
    return made
