"""Models, tensors, notes and records as pieces of bytes, and back again.

Each model is its graph without weights, every weight once however many models hold it, and the notes that passes left
on nodes and values. Only what is known to come back as it was is taken; anything else is ``Unknown``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.gptq import LayerError
from qexport.calibration.statistics.sketch import Sketch
from qexport.exporter.families.builder import COPY
from qexport.exporter.onnx_file import MAPS
from qexport.passes.base import Decision
from qexport.passes.folding.activation import Activation
from qexport.passes.numbers.groups import Codes, Grid
from qexport.passes.numbers.range import Range
from qexport.passes.numbers.weights import Chosen
from qexport.passes.pipeline import Step
from qexport.passes.smooth import Smooth

MOST = 2 << 30
"""Bytes of weights from which on there is no checkpoint: an equal build would need as much memory again to read it."""

_KINDS = {
    kind.__name__: kind for kind in (Activation, Chosen, Codes, Decision, Grid, LayerError, Range, Sketch, Smooth, Step)
}
_HELD = "checkpoint"  # where a graph says that its weights are
_BESIDE = {MAPS: None, COPY: True}
"""Notes that point at what does not come along, and what stays of them."""

Buffer: TypeAlias = bytes | memoryview


class Unknown(Exception):
    """Something that no checkpoint can hold."""


@dataclass(slots=True)
class Writer:
    """Puts bytes on a shelf, each tensor once."""

    blobs: list[Buffer] = field(default_factory=list)
    tensors: dict[int, tuple[int, ir.TensorProtocol]] = field(default_factory=dict)  # by identity, which is held
    total: int = 0

    @property
    def sizes(self) -> list[int]:
        """Bytes of each."""
        return [memoryview(blob).nbytes for blob in self.blobs]

    def model(self, model: ir.Model) -> dict[str, Any]:
        """Write a model."""
        work = model.clone()
        for value in _weights(work):
            tensor = value.const_value
            if tensor is None or tensor.dtype == ir.DataType.STRING:
                continue
            place = self.tensor(tensor)
            value.const_value = ir.ExternalTensor(
                _HELD, place, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.numpy().shape), name=value.name or ""
            )
        proto = ir.to_proto(work).SerializeToString(deterministic=True)
        notes = [
            [number, key, self.value(note)]
            for number, holder in enumerate(holders(model))
            for key, note in notes_of(holder).items()
        ]
        return {"graph": self.blob(proto), "notes": notes}

    def blob(self, data: Buffer) -> int:
        """Put bytes there; where they are."""
        self.total += memoryview(data).nbytes
        if self.total > MOST:
            raise Unknown("too large")
        self.blobs.append(data)
        return len(self.blobs) - 1

    def tensor(self, tensor: ir.TensorProtocol) -> int:
        """Put a tensor there, if it is not there yet: what it is, and behind it its numbers."""
        known = self.tensors.get(id(tensor))
        if known is not None:
            return known[0]
        if tensor.dtype == ir.DataType.STRING or tensor.doc_string or tensor.metadata_props:
            raise Unknown("a tensor with text")
        numbers = np.asarray(tensor.numpy())
        place = self.blob(json.dumps([int(tensor.dtype), list(numbers.shape), tensor.name]).encode())
        self.blob(_bytes(numbers))
        self.tensors[id(tensor)] = place, tensor
        return place

    def value(self, value: object) -> object:
        """Write a note, or a record; plain values are themselves, all else is a list that begins with its kind."""
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, tuple):
            return ["tuple", *map(self.value, value)]
        if isinstance(value, dict):
            return ["dict", *([self.value(key), self.value(inner)] for key, inner in value.items())]
        if type(value) is np.ndarray and value.dtype.kind in "fiub":
            return ["array", value.dtype.str, list(value.shape), self.blob(_bytes(value))]
        if isinstance(value, ir.TensorProtocol):
            return ["tensor", self.tensor(value)]
        return self._record(value)

    def _record(self, value: object) -> object:
        name = type(value).__name__
        if _KINDS.get(name) is not type(value) or not dataclasses.is_dataclass(value):
            raise Unknown(name)
        return [name, *(self.value(getattr(value, entry.name)) for entry in dataclasses.fields(value))]


class Reader:
    """Takes things from the shelf again."""

    def __init__(self, blobs: Sequence[Buffer], *, shared: bool) -> None:
        self._blobs = blobs
        self._shared = shared
        self._tensors: dict[int, ir.TensorProtocol] = {}

    def model(self, told: dict[str, Any]) -> ir.Model:
        """Read a model."""
        proto = onnx.ModelProto()
        proto.ParseFromString(bytes(self._blobs[told["graph"]]))
        model = ir.from_proto(proto)
        for value in _weights(model):
            held = value.const_value
            if isinstance(held, ir.ExternalTensor) and held.location == _HELD:
                value.const_value = self.tensor(held.offset or 0)
        places = list(holders(model))
        for number, key, note in told["notes"]:
            places[number].meta[key] = self.value(note)
        return model

    def tensor(self, place: int) -> ir.TensorProtocol:
        """The one tensor of a place."""
        if place not in self._tensors:
            kind, shape, name = json.loads(bytes(self._blobs[place]))
            dtype = ir.DataType(kind)
            numbers = np.frombuffer(self._blobs[place + 1], dtype.numpy()).reshape(shape)
            numbers = numbers if self._shared else numbers.copy()
            self._tensors[place] = ir.Tensor(numbers, dtype=dtype, shape=ir.Shape(shape), name=name)
        return self._tensors[place]

    def value(self, told: Any) -> Any:
        """Read what ``Writer.value`` wrote."""
        if not isinstance(told, list):
            return told
        kind, *parts = told
        if kind == "tuple":
            return tuple(map(self.value, parts))
        if kind == "dict":
            return {self.value(key): self.value(inner) for key, inner in parts}
        if kind == "array":
            return self._array(*parts)
        if kind == "tensor":
            return self.tensor(*parts)
        return _KINDS[kind](*map(self.value, parts))

    def _array(self, dtype: str, shape: list[int], place: int) -> NDArray[Any]:
        numbers = np.frombuffer(self._blobs[place], dtype).reshape(shape)
        return numbers if self._shared else numbers.copy()


def _bytes(array: NDArray[Any]) -> memoryview:
    """The bytes of an array, in its own memory where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _weights(model: ir.Model) -> Iterator[ir.Value]:
    """Every value that a graph holds the numbers of."""
    for graph in model.graphs():
        yield from graph.initializers.values()


def holders(model: ir.Model) -> Iterator[Any]:
    """All that notes may be on, in an order that the file keeps: models, graphs, functions, nodes, values."""
    yield model
    bodies: list[Any] = [*model.graphs(), *model.functions.values()]
    for body in bodies:
        yield body
        yield from body.inputs
        yield from getattr(body, "initializers", {}).values()
        for node in body:
            yield node
            yield from node.outputs


def notes_of(holder: Any) -> dict[str, Any]:
    """The notes on something; what only points at what does not come along is left out or replaced."""
    found = {key: _BESIDE.get(key, note) for key, note in holder.meta.items()}
    return {key: note for key, note in found.items() if key not in _BESIDE or note is not None}
