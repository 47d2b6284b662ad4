"""ONNX files in and out: admitted before they are read, streamed when they are written."""

from __future__ import annotations

import mmap
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]  # protobuf ships no types
from numpy.typing import NDArray
from onnx_ir.serde import SerdeError

from qexport.errors import BuildFailed, ModelInvalid, QexportError, ResourceExhausted
from qexport.exporter.admit import Limits, admit_file
from qexport.exporter.admit.external import Reference
from qexport.exporter.admit.subject import examine
from qexport.exporter.admit.values import name_some, nonfinite
from qexport.safe_io import Stage, open_companion

THRESHOLD = 1_500_000_000
"""Bytes of weights from which they go into a file of their own; protobuf ends at 2 GB."""

MAPS = "qexport.maps"
"""Meta of a model: the mapped files that its weights lie in."""

NOTES = "qexport.notes"
"""Meta of a model: what was done about its file when it was read, as lines for a report."""

_INLINE = 1024  # smaller tensors stay in the model, where shape inference can see them
_PAGE = 4096


# ---------------------------------------------------------------- loading


def load_onnx(path: str | os.PathLike[str], limits: Limits | None = None) -> ir.Model:
    """Admit a model file and read it.

    External weights are mapped, not read, from descriptors that no link can redirect. Nodes are sorted if they were
    not, every node has a name of its own, and initializers that are inputs too are constants; the model's meta under
    ``NOTES`` says which of that was done. The file is not changed, and may be replaced (not rewritten) meanwhile.

    Raises:
        QexportError: As ``admit_file``; ``BuildFailed`` for sparse tensors.
    """
    return read_onnx(path, limits)[0]


def read_onnx(path: str | os.PathLike[str], limits: Limits | None = None) -> tuple[ir.Model, dict[str, mmap.mmap]]:
    """As ``load_onnx``, with the external files that were mapped, by their names, whatever tensor needed them."""
    root = Path(path).parent
    proto = admit_file(path, limits)
    if proto.graph.sparse_initializer:
        hint = "save the model with dense weights"
        raise BuildFailed("sparse initializers are not supported", where=os.fspath(path), hint=hint)
    notes = [*_let_through(proto, root, limits), *_close_initializers(proto)]
    _free_negative_dims(proto)
    _believe_inputs(proto)
    try:
        model = ir.from_proto(proto)
    except SerdeError as error:
        raise BuildFailed(f"admitted, but not readable: {_cause(error)}", where=os.fspath(path)) from error
    mapped = _Mapped(root)
    for body in _bodies(model):
        for value in body.initializers.values() if isinstance(body, ir.Graph) else ():
            if value.const_value is not None:
                value.const_value = mapped.own(value.const_value)
        for holder in (*body, *((body,) if isinstance(body, ir.Function) else ())):
            _own_attributes(holder, mapped)
    model.meta[MAPS] = tuple(mapped.files.values())
    model.meta[NOTES] = (*notes, *_sort(model))
    _name_nodes(model)
    return model, mapped.files


def release_pages(model: ir.Model) -> None:
    """Let the system have back the memory behind mapped weights; what is looked at again is read again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for area in model.meta.get(MAPS, ()):
            area.madvise(mmap.MADV_DONTNEED)


def _cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _bodies(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    yield from model.graphs()
    for function in model.functions.values():
        yield function
        yield from function.subgraphs()


def _free_negative_dims(proto: onnx.ModelProto) -> None:
    """Old exporters write -1 for a dimension that is not fixed."""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value < 0:
                dim.Clear()


def _believe_inputs(proto: onnx.ModelProto) -> None:
    """What is said again of an input, as an output or an inner value, is what the input says."""
    types = {value.name: value.type for value in proto.graph.input}
    for value in (*proto.graph.output, *proto.graph.value_info):
        if value.name in types:
            value.type.CopyFrom(types[value.name])


def _let_through(proto: onnx.ModelProto, root: Path, limits: Limits | None) -> Iterator[str]:
    """Say which weights hold NaN or Inf where that was allowed."""
    if limits is not None and limits.allow_nonfinite:
        names = nonfinite(examine(proto, root, limits))
        if names:
            yield f"NaN or Inf in {name_some(names)}, which was allowed"


def _close_initializers(proto: onnx.ModelProto) -> Iterator[str]:
    """Take initializers out of the inputs: IR 3 lists all of them, later versions those that a caller may override."""
    held = {tensor.name for tensor in proto.graph.initializer}
    free = [value for value in proto.graph.input if value.name not in held]
    count = len(proto.graph.input) - len(free)
    if count:
        yield f"{count} inputs have a value in the model and are constants now"
        proto.graph.ClearField("input")
        proto.graph.input.extend(free)
        proto.ir_version = max(proto.ir_version, 4)  # the first without the rule that lists them


class _Mapped:
    """Turns tensors that lean on a protobuf or a path into tensors that own, or map, their data."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.files: dict[str, mmap.mmap] = {}  # by location, as the model spells it

    def own(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """A tensor of the same name, type, shape and numbers."""
        if isinstance(tensor, ir.StringTensor):
            return ir.StringTensor(list(tensor.string_data()), shape=tensor.shape, name=tensor.name)
        if isinstance(tensor, ir.ExternalTensor):
            wanted = Reference(str(tensor.location), tensor.offset or 0, tensor.length)
            return _tensor(self._bytes(wanted, tensor.nbytes), tensor)
        return _tensor(np.frombuffer(tensor.tobytes(), np.uint8), tensor)

    def _bytes(self, wanted: Reference, count: int) -> NDArray[np.uint8]:
        if not count:
            return np.empty(0, np.uint8)
        if wanted.location not in self.files:
            with open_companion(self._root, wanted.location) as file:
                self.files[wanted.location] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        area = self.files[wanted.location]
        if wanted.offset + count > len(area):
            raise ModelInvalid("became shorter while it was read", where=str(self._root / wanted.location))
        return np.frombuffer(area, np.uint8, count, wanted.offset)


def _tensor(data: NDArray[np.uint8], like: ir.TensorProtocol) -> ir.TensorProtocol:
    """Wrap bytes as ONNX stores them (little endian, small types packed) without a copy."""
    notes = {"name": like.name, "doc_string": like.doc_string, "metadata_props": dict(like.metadata_props)}
    if like.dtype.bitwidth < 8:
        return ir.PackedTensor(data, like.dtype, shape=like.shape, **notes)  # type: ignore[arg-type]  # values differ by key
    array = data.view(like.dtype.numpy().newbyteorder("<")).reshape(like.shape.numpy())
    return ir.Tensor(array, dtype=like.dtype, shape=like.shape, **notes)  # type: ignore[arg-type]  # the same


def _own_attributes(holder: ir.Node | ir.Function, mapped: _Mapped) -> None:
    for name, attribute in list(holder.attributes.items()):
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            holder.attributes[name] = ir.AttrTensor(name, mapped.own(attribute.as_tensor()))
        elif attribute.type == ir.AttributeType.TENSORS:
            holder.attributes[name] = ir.AttrTensors(name, [mapped.own(tensor) for tensor in attribute.as_tensors()])


def _sort(model: ir.Model) -> Sequence[str]:
    """Put nodes after what they read; admission proved that there is an order."""
    bodies: tuple[ir.Graph | ir.Function, ...] = (model.graph, *model.functions.values())
    unsorted = [body for body in bodies if not _is_sorted(body)]
    for body in unsorted:
        body.sort()
    return ("the nodes were not in order and have been sorted",) if unsorted else ()


def _is_sorted(body: ir.Graph | ir.Function) -> bool:
    """Whether every node, those in subgraphs included, comes after what it reads."""
    seen: set[ir.Node | None] = {None}
    for node in body.all_nodes():
        if any(value is not None and value.producer() not in seen for value in node.inputs):
            return False
        seen.add(node)
    return True


def _name_nodes(model: ir.Model) -> None:
    """Give a name of its own to every node that has none or shares one; decisions are reported by name."""
    nodes = [node for body in _bodies(model) for node in body]
    taken = {node.name for node in nodes if node.name}
    seen: set[str] = set()
    counts: Counter[str] = Counter()
    for node in nodes:
        if node.name and node.name not in seen:
            seen.add(node.name)
            continue
        stem = node.name or node.op_type
        name = f"{stem}_{counts[stem]}"
        while name in taken:
            counts[stem] += 1
            name = f"{stem}_{counts[stem]}"
        counts[stem] += 1
        taken.add(name)
        seen.add(name)
        node.name = name


# ---------------------------------------------------------------- saving


def save_onnx(model: ir.Model, stage: Stage, name: str = "model.onnx", *, threshold: int = THRESHOLD) -> None:
    """Write a model into a staged folder; with more weights than ``threshold`` bytes, they go into ``NAME.data``.

    Weights are streamed one at a time, each at the start of a page. The model is left as it was.

    Raises:
        ResourceExhausted: No space, or what must stay in the model file is over 2 GB.
    """
    weights = [
        value
        for body in _bodies(model)
        if isinstance(body, ir.Graph)
        for value in body.initializers.values()
        if value.const_value is not None and value.const_value.dtype != ir.DataType.STRING
    ]
    if sum(value.const_value.nbytes for value in weights if value.const_value is not None) <= threshold:
        stage.write_bytes(name, _serialized(model, name))
        return
    with _moved_out(weights, stage, f"{name}.data"):
        data = _serialized(model, name)
    stage.write_bytes(name, data)


def _serialized(model: ir.Model, name: str) -> bytes:
    try:
        return bytes(ir.to_proto(model).SerializeToString())
    except SerdeError as error:
        cause = _cause(error)  # what a weight said that is read only now
        raise cause if isinstance(cause, QexportError | MemoryError) else error from None
    except (EncodeError, ValueError) as error:
        raise ResourceExhausted("what must stay in the model file is over 2 GB", where=name) from error


@contextmanager
def _moved_out(weights: list[ir.Value], stage: Stage, name: str) -> Iterator[None]:
    """Write the weights to a file; inside the block they refer to it, afterwards they are themselves again."""
    kept = [(value, value.const_value) for value in weights]
    try:
        with stage.create(name) as file:
            for value, tensor in kept:
                if tensor is None or tensor.nbytes < _INLINE:
                    continue
                file.write(bytes(-file.tell() % _PAGE))
                start = file.tell()
                file.write(_contents(tensor))
                value.const_value = ir.ExternalTensor(
                    name,
                    start,
                    tensor.nbytes,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=tensor.name or "",
                )
        yield
    finally:
        for value, tensor in kept:
            value.const_value = tensor


def _contents(tensor: ir.TensorProtocol) -> bytes | memoryview:
    """The bytes that ONNX stores, without a copy where they are in memory like that."""
    if tensor.dtype.bitwidth < 8 or sys.byteorder != "little":
        return tensor.tobytes()
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data
