"""Tensors wherever they hide: types, dimensions, and as many bytes as the dimensions ask for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from qexport.errors import ModelInvalid
from qexport.exporter.admit.subject import Body, Subject, place, quoted

STORES = ("raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_MOST_BYTES = 2**63 - 1

MOST_DIMS = 64
"""Of an array of numpy."""

Lengths = dict[str, int]  # fields of a tensor that hold data, and how many entries


@dataclass(frozen=True, slots=True)
class Format:
    """How a data type is stored: bits per element, the typed field, and entries of it per element as a fraction."""

    bits: int
    store: str
    entries: int = 1
    elements: int = 1

    def nbytes(self, count: int) -> int:
        """Bytes of ``count`` elements, the last byte filled up."""
        return -(-count * self.bits // 8)

    def length(self, count: int) -> int:
        """Entries of the typed field for ``count`` elements."""
        return -(-count * self.entries // self.elements)


_BYTE = Format(8, "int32_data")
_HALF = Format(16, "int32_data")
_NIBBLE = Format(4, "int32_data", 1, 2)
_CRUMB = Format(2, "int32_data", 1, 4)
_SIX = Format(6, "int32_data")

FORMATS: dict[int, Format] = {
    TensorProto.FLOAT: Format(32, "float_data"),
    TensorProto.DOUBLE: Format(64, "double_data"),
    TensorProto.COMPLEX64: Format(64, "float_data", 2),
    TensorProto.COMPLEX128: Format(128, "double_data", 2),
    TensorProto.INT32: Format(32, "int32_data"),
    TensorProto.INT64: Format(64, "int64_data"),
    TensorProto.UINT32: Format(32, "uint64_data"),
    TensorProto.UINT64: Format(64, "uint64_data"),
    TensorProto.STRING: Format(0, "string_data"),
    **dict.fromkeys((TensorProto.INT8, TensorProto.UINT8, TensorProto.BOOL), _BYTE),
    **dict.fromkeys((TensorProto.INT16, TensorProto.UINT16, TensorProto.FLOAT16, TensorProto.BFLOAT16), _HALF),
    **dict.fromkeys((TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2), _BYTE),
    **dict.fromkeys((TensorProto.FLOAT8E5M2FNUZ, TensorProto.FLOAT8E8M0), _BYTE),
    **dict.fromkeys((TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1), _NIBBLE),
    **dict.fromkeys((TensorProto.INT2, TensorProto.UINT2), _CRUMB),
    **dict.fromkeys((TensorProto.FLOAT6E2M3, TensorProto.FLOAT6E3M2), _SIX),
}


def all_tensors(subject: Subject) -> Iterator[tuple[str, TensorProto]]:
    """Every tensor of the model with its place, training graphs included."""
    for body in subject.bodies:
        yield from _own_tensors(body)


def _own_tensors(body: Body) -> Iterator[tuple[str, TensorProto]]:
    inside = "" if body.parent is None and body.where == "graph" else f"{body.where}, "
    if isinstance(body.proto, onnx.GraphProto):
        for tensor in body.proto.initializer:
            yield f"{inside}initializer {quoted(tensor.name)}", tensor
        for sparse in body.proto.sparse_initializer:
            yield from _sparse(f"{inside}sparse initializer {quoted(sparse.values.name)}", sparse)
    else:
        for attribute in body.proto.attribute_proto:
            yield from _of_attribute(f"{inside}attribute {quoted(attribute.name)}", attribute)
    for node in body.proto.node:
        for attribute in node.attribute:
            yield from _of_attribute(f"{inside}{place(node)}, {attribute.name}", attribute)


def _of_attribute(where: str, attribute: onnx.AttributeProto) -> Iterator[tuple[str, TensorProto]]:
    """Tensors of an attribute, whatever type it claims to have."""
    if attribute.HasField("t"):
        yield where, attribute.t
    for tensor in attribute.tensors:
        yield where, tensor
    if attribute.HasField("sparse_tensor"):
        yield from _sparse(where, attribute.sparse_tensor)
    for sparse in attribute.sparse_tensors:
        yield from _sparse(where, sparse)


def _sparse(where: str, sparse: onnx.SparseTensorProto) -> Iterator[tuple[str, TensorProto]]:
    yield f"{where}, values", sparse.values
    yield f"{where}, indices", sparse.indices


def type_name(data_type: int) -> str:
    """``FLOAT16`` and so on, for messages."""
    return TensorProto.DataType.Name(data_type) if data_type in FORMATS else str(data_type)


def needed_bytes(tensor: TensorProto) -> int:
    """Bytes that type and dimensions ask for; both have been checked."""
    return FORMATS[tensor.data_type].nbytes(math.prod(tensor.dims))


# ---------------------------------------------------------------- rules over one tensor: a complaint or None


def _unknown_type(tensor: TensorProto, _: Lengths) -> str | None:
    return None if tensor.data_type in FORMATS else f"unknown data type {tensor.data_type}"


def _bad_dims(tensor: TensorProto, _: Lengths) -> str | None:
    if len(tensor.dims) > MOST_DIMS:
        return f"{len(tensor.dims)} dimensions, {MOST_DIMS} are the most"
    if any(dim < 0 for dim in tensor.dims):
        return f"negative dimension in {list(tensor.dims)}"
    if needed_bytes(tensor) > _MOST_BYTES:
        return f"the dimensions {list(tensor.dims)} overflow"
    return None


def _several_stores(tensor: TensorProto, filled: Lengths) -> str | None:
    external = tensor.data_location == TensorProto.EXTERNAL
    if tensor.HasField("segment"):
        return "segmented tensors are not supported"
    if external and filled:
        return f"data both inside ({next(iter(filled))}) and in an external file"
    if tensor.external_data and not external:
        return "names an external file but says that the data is inside"
    if len(filled) > 1:
        return f"data in two fields, {' and '.join(filled)}"
    if filled and tensor.HasField("raw_data") and "raw_data" not in filled:
        return f"raw_data that is there and empty, beside {next(iter(filled))}"  # which others read
    return None


def _wrong_store(tensor: TensorProto, filled: Lengths) -> str | None:
    store, strings = FORMATS[tensor.data_type].store, tensor.data_type == TensorProto.STRING
    if filled.keys() - {store, "raw_data" if not strings else store}:
        return f"data of type {type_name(tensor.data_type)} in {next(iter(filled))}, its field is {store}"
    if strings and tensor.data_location == TensorProto.EXTERNAL:
        return "strings cannot be in an external file"
    return None


def _wrong_length(tensor: TensorProto, filled: Lengths) -> str | None:
    """Inline data only; external data is measured with its file."""
    if tensor.data_location == TensorProto.EXTERNAL:
        return None
    form, count = FORMATS[tensor.data_type], math.prod(tensor.dims)
    if form.store in filled or not form.bits:
        have, need, unit = filled.get(form.store, 0), form.length(count), f"entries in {form.store}"
    else:
        have, need, unit = filled.get("raw_data", 0), form.nbytes(count), "bytes"
    about = f"{list(tensor.dims)} of {type_name(tensor.data_type)}"
    return None if have == need else f"holds {have} {unit}, dimensions {about} need {need}"


TENSOR_RULES = (_unknown_type, _bad_dims, _several_stores, _wrong_store, _wrong_length)


def check(subject: Subject) -> None:
    """Apply every rule to every tensor; raise ``ModelInvalid``."""
    for where, tensor in all_tensors(subject):
        filled = {store: length for store in STORES if (length := len(getattr(tensor, store)))}
        for rule in TENSOR_RULES:
            complaint = rule(tensor, filled)
            if complaint:
                raise ModelInvalid(complaint, where=where)
