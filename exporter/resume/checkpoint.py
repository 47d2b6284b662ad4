"""What a recipe made of a model, written down: an equal build goes on from there.

Each model is its graph without weights, every weight once however many models hold it, and the notes that passes left
on nodes and values. Only what is known to come back as it was is written: any other note, and there is no checkpoint.
Before it is kept a checkpoint is read back and written again, which must give the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.gptq import LayerError
from qexport.calibration.statistics.sketch import Sketch
from qexport.calibration.statistics.store import Store
from qexport.exporter.families.builder import COPY
from qexport.exporter.load import Source
from qexport.exporter.onnx_file import MAPS
from qexport.exporter.options import BuildOptions
from qexport.exporter.product import Product, Snapshot, run_recipe, steps_of
from qexport.exporter.recipe import Recipe
from qexport.exporter.resume import journal as journals
from qexport.exporter.resume.journal import Journal
from qexport.exporter.samples import Samples
from qexport.passes.base import Decision, Pass
from qexport.passes.folding.activation import Activation
from qexport.passes.numbers.groups import Codes, Grid
from qexport.passes.numbers.range import Range
from qexport.passes.numbers.weights import Chosen
from qexport.passes.pipeline import Step
from qexport.passes.smooth import Smooth

RECIPE = "recipe"
MOST = 2 << 30
"""Bytes of weights from which on there is no checkpoint: it would take as much memory again."""

_KINDS = {
    kind.__name__: kind for kind in (Activation, Chosen, Codes, Decision, Grid, LayerError, Range, Sketch, Smooth, Step)
}
_HELD = "checkpoint"  # where a graph says that its weights are
_BESIDE = {MAPS: None, COPY: True}
"""Notes that point at what does not come along, and what stays of them."""
_LENGTH = 8


Buffer: TypeAlias = bytes | memoryview


class Unknown(Exception):
    """Something that no checkpoint can hold."""


def recipe_once(journal: Journal, source: Source, recipe: Recipe, samples: Samples, asked: BuildOptions) -> Product:
    """Run the recipe, or take what an equal build has made with it.

    Raises:
        QexportError: What ``run_recipe`` raises, or the cache is not to be trusted.
    """
    place = journal.place(RECIPE, list)
    content = None if place is None else place.read()
    if place is not None and content is not None:
        try:
            known = decode(content)
        except (Unknown, ValueError, KeyError, IndexError, TypeError) as error:
            place.reject(f"it says something else: {type(error).__name__}")
        else:
            journal.note(RECIPE)
            return _with_steps(known, steps_of(recipe, samples, Store(journal.cache)))
    start = time.perf_counter()
    product = run_recipe(source, recipe, samples, asked, journal.cache)
    if place is not None and time.perf_counter() - start >= journals.WORTH:
        doubts = journal.cache.doubts
        written = checkpoint(replace(product, warnings=tuple(w for w in product.warnings if w not in doubts)))
        if written is not None:
            place.write(written)
    return product


def checkpoint(product: Product) -> bytes | None:
    """Write a product down; ``None`` where something of it would not come back as it is."""
    try:
        written = encode(product)
        again = _pieces(decode(written, shared=True))
        return written if _digest(again) == _digest([written]) else None
    except (Unknown, ValueError, KeyError, IndexError, TypeError):
        return None


def encode(product: Product) -> bytes:
    """Write a product down, but for the passes that are to be run over its snapshot.

    Raises:
        Unknown: Something of it cannot be written.
    """
    return b"".join(_pieces(product))


def _pieces(product: Product) -> list[Buffer]:
    """A product in pieces, of which those of weights are the weights themselves."""
    shelf, snapshot = _Writer(), product.snapshot
    told = {
        "model": shelf.model(product.model),
        "plain": shelf.model(product.plain),
        "snapshot": None if snapshot is None else [shelf.model(snapshot.model), snapshot.before],
        "steps": shelf.value(product.steps),
        "proofs": shelf.value(product.proofs),
        "warnings": shelf.value(product.warnings),
        "blobs": shelf.sizes,
    }
    head = json.dumps(told).encode()
    return [len(head).to_bytes(_LENGTH, "little"), head, *shelf.blobs]


def _digest(pieces: Iterable[Buffer]) -> bytes:
    state = hashlib.sha256()
    for piece in pieces:
        state.update(piece)
    return state.digest()


def decode(content: bytes, *, shared: bool = False) -> Product:
    """Read what ``encode`` wrote; the snapshot has no passes yet.

    ``shared`` leaves weights where they are in ``content``, for a look alone: runtimes want them aligned.
    """
    start = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    told = json.loads(content[_LENGTH:start])
    shelf = _Reader(content, start, told["blobs"], shared=shared)
    held = told["snapshot"]
    return Product(
        shelf.model(told["model"]),
        shelf.value(told["steps"]),
        shelf.value(told["proofs"]),
        shelf.model(told["plain"]),
        shelf.value(told["warnings"]),
        None if held is None else Snapshot(shelf.model(held[0]), (), held[1]),
    )


def _with_steps(product: Product, steps: Sequence[tuple[str, Pass]]) -> Product:
    """The product with the passes that are to be run over its snapshot, out of all."""
    snapshot = product.snapshot
    if snapshot is None:
        return product
    return replace(product, snapshot=replace(snapshot, steps=tuple(steps[snapshot.before :])))


@dataclass(slots=True)
class _Writer:
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
            for number, holder in enumerate(_holders(model))
            for key, note in _notes(holder).items()
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


class _Reader:
    """Takes things from the shelf again."""

    def __init__(self, content: bytes, start: int, sizes: list[int], *, shared: bool) -> None:
        ends = np.cumsum([start, *sizes]).tolist()
        if ends[-1] != len(content):
            raise ValueError("a checkpoint of another size than it says")
        self._blobs = [memoryview(content)[a:b] for a, b in itertools.pairwise(ends)]
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
        holders = list(_holders(model))
        for number, key, note in told["notes"]:
            holders[number].meta[key] = self.value(note)
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
        """Read what ``_Writer.value`` wrote."""
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
        return np.frombuffer(self._blobs[place], dtype).reshape(shape).copy()


def _bytes(array: NDArray[Any]) -> memoryview:
    """The bytes of an array, in its own memory where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _weights(model: ir.Model) -> Iterator[ir.Value]:
    """Every value that a graph holds the numbers of."""
    for graph in model.graphs():
        yield from graph.initializers.values()


def _holders(model: ir.Model) -> Iterator[Any]:
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


def _notes(holder: Any) -> dict[str, Any]:
    """The notes on something; what only points at what does not come along is left out or replaced."""
    found = {key: _BESIDE.get(key, note) for key, note in holder.meta.items()}
    return {key: note for key, note in found.items() if key not in _BESIDE or note is not None}
