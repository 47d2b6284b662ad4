"""What a model asks for and how raw data becomes that: input specifications and the ``[data]`` section of a recipe."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from qexport.errors import ModelInvalid, UsageError
from qexport.passes.portable import IDS, LABELS, LOGITS, PAST, POSITIONS, WRITE

Sample: TypeAlias = dict[str, NDArray[Any]]  # one sample: input name to array, no batch axis, padding trimmed

MAX_SAMPLE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: Its name.
        dtype: Its element type.
        shape: Its shape with the batch axis first; ``None`` stands for an axis that is free.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return describe(self.name, self.dtype, self.shape)


class ImageSpec(BaseModel):
    """How pixels become an input: ``(pixel * scale - mean) / std``, per channel.

    Attributes:
        size: Height and width, or one number for both; ``None`` takes them from the model.
        mean: One value, or one per channel.
        std: One value, or one per channel; none is zero.
        scale: Factor before the mean is taken off.
        layout: Order of the axes the model reads.
        input: Name of the model input; ``None`` where the model has only one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int | tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1 / 255
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    input: str | None = None

    @field_validator("mean", "std")
    @classmethod
    def _finite(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or not all(map(math.isfinite, values)):
            raise ValueError("needs one finite number, or one per channel")
        return values

    @field_validator("std")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if min(values) <= 0:
            raise ValueError("must be greater than zero")
        return values


class DataSpec(BaseModel):
    """How samples are read: the ``[data]`` section of a recipe.

    Attributes:
        tokenizer: Path of a ``tokenizer.json``, or of the folder that holds one.
        max_length: Longest text in tokens; the rest is cut off.
        text: Column of a CSV or key of a JSONL that holds the text.
        windows: Whether a plain text is tokenized as a whole and cut into windows of ``max_length`` tokens instead of
            being read line by line; when not given, a build does so for models that score the next token.
        image: How pixels are prepared.
        max_samples: Take so many distinct calibration samples, from the front; evaluation always takes all.
        report_samples: Whether the report of a build shows the samples that the result does worst on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokenizer: str | None = None
    max_length: int = Field(default=128, ge=1)
    text: str | None = None
    windows: bool | None = None
    image: ImageSpec | None = None
    max_samples: int | None = Field(default=None, ge=1)
    report_samples: bool = True


class Source(Protocol):
    """Yields raw samples, of files or of a caller, the same ones in the same order on every pass."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files a pass reads."""

    def __iter__(self) -> Iterator[Sample]: ...


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """Return what ``model`` asks of a sample: its inputs without initializers, and without the cache of a decoder.

    Raises:
        ModelInvalid: An input has no shape, or is not a tensor of numbers.
        UsageError: An axis of an input has the size 0.
    """
    return tuple(_input_spec(value) for value in asked_inputs(model))


def asked_inputs(model: ir.Model) -> tuple[ir.Value, ...]:
    """The inputs that a sample has to fill."""
    graph, cached = model.graph, keeps_cache(model)
    asked = (value for value in graph.inputs if value.name not in graph.initializers)
    return tuple(value for value in asked if not (cached and is_state(value.name)))


def unfed_input(model: ir.Model) -> str | None:
    """The first input that no sample can fill, as it holds strings, sequences or the like."""
    values = (value for value in asked_inputs(model) if not _holds_numbers(value))
    return next((value.name or "" for value in values), None)


def _holds_numbers(value: ir.Value) -> bool:
    return isinstance(value.type, ir.TensorType) and value.dtype != ir.DataType.STRING


def keeps_cache(model: ir.Model) -> bool:
    """Whether ``model`` is a decoder in the portable layout: it writes keys and values where ``write_indices`` say."""
    names = {value.name for value in model.graph.inputs}
    return {IDS, WRITE, POSITIONS} <= names and any((name or "").startswith(PAST) for name in names)


def is_state(name: str | None) -> bool:
    """Whether an input of such a decoder follows from the calls before, and not from a sample."""
    return name in (WRITE, POSITIONS) or (name or "").startswith(PAST)


def _input_spec(value: ir.Value) -> InputSpec:
    where = f"model input {value.name!r}"
    if value.dtype is None or not _holds_numbers(value):
        hint = "recipes that need no data, such as float32, take the model; give them none"
        raise ModelInvalid(f"has the type {value.type}, only tensors of numbers can be fed", where=where, hint=hint)
    if value.shape is None:
        raise ModelInvalid("has no shape", where=where, hint="export the model with the rank of its inputs")
    shape = tuple(axis if isinstance(axis, int) else None for axis in value.shape)
    if 0 in shape:
        hint = "export the model with a size that samples have, or with a free axis"
        raise UsageError(f"has the shape {list(shape)}: an axis of size 0 holds nothing", where=where, hint=hint)
    return InputSpec(value.name or "", value.dtype.numpy(), shape)


def scores_tokens(model: ir.Model) -> bool:
    """Whether ``model`` reads ``input_ids`` and has ``logits`` [batch, sequence, vocabulary], as decoders do.

    Scores of classes, which the metadata names, are none of tokens.
    """
    if LABELS in model.metadata_props:
        return False
    logits = next((value for value in model.graph.outputs if value.name == LOGITS), None)
    scored = logits is not None and logits.shape is not None and len(logits.shape) == 3
    return scored and any(value.name == IDS for value in model.graph.inputs)


def static_batch(inputs: Iterable[InputSpec]) -> int | None:
    """The batch size that a model is made for; ``None`` where any will do.

    Raises:
        ModelInvalid: Inputs disagree.
    """
    sizes = {spec.shape[0] for spec in inputs if spec.shape and spec.shape[0] is not None}
    if len(sizes) > 1:
        raise ModelInvalid(f"inputs have different static batch sizes: {sorted(map(int, sizes))}")
    return next(iter(sizes), None)


def describe(name: str, dtype: np.dtype[Any], shape: Iterable[int | None]) -> str:
    """Write one input the way every message does: ``name float32[?, 3, 32, 32]``."""
    return f"{name!r} {dtype}[{', '.join('?' if axis is None else str(axis) for axis in shape)}]"


def describe_all(inputs: Iterable[InputSpec]) -> str:
    """Write all inputs of a model, for ``expected ..., found ...`` messages."""
    return "; ".join(map(str, inputs)) or "no inputs"


def sample_digest(sample: Mapping[str, NDArray[Any]]) -> bytes:
    """SHA-256 over names, types, shapes and values; the order of the inputs does not count."""
    state = hashlib.sha256()
    for name in sorted(sample):
        array = sample[name]
        state.update(repr((name, array.dtype.name, array.shape)).encode())
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.digest()
