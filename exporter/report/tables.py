"""Dataclasses as Parquet: one table for each kind of row, nested rows as lists of structs."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    import pyarrow as pa

_PLAIN = {str: "string", float: "float64", int: "int64", bool: "bool_"}


def to_table(rows: Sequence[Any], cls: type, schema: str) -> pa.Table:
    """Return a table of dataclasses of one type; ``schema`` goes into its metadata.

    Column types follow from the annotations, so that tables of any build have the same ones.

    Raises:
        ImportError: pyarrow is not installed.
    """
    import pyarrow as pa

    columns = pa.schema(_fields(cls), metadata={"qexport.schema": schema})
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=columns)


def parquet_bytes(table: pa.Table) -> bytes:
    """The bytes of a Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def _fields(cls: type) -> list[pa.Field]:
    import pyarrow as pa

    hints = get_type_hints(cls)
    return [
        pa.field(field.name, _type(hints[field.name]), nullable=_optional(hints[field.name])) for field in fields(cls)
    ]


def _optional(hint: Any) -> bool:
    return get_origin(hint) in (types.UnionType, typing.Union) and type(None) in get_args(hint)


def _type(hint: Any) -> pa.DataType:
    """The column type of an annotation."""
    import pyarrow as pa

    if _optional(hint):
        return _type(next(part for part in get_args(hint) if part is not type(None)))
    if get_origin(hint) is typing.Literal:
        return _type(type(get_args(hint)[0]))
    if get_origin(hint) is tuple:  # both of many and of two: a list
        return pa.list_(_type(get_args(hint)[0]))
    if is_dataclass(hint) and isinstance(hint, type):
        return pa.struct(_fields(hint))
    return getattr(pa, _PLAIN[hint])()
