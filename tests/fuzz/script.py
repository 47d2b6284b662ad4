"""Bytes read as a script that edits a protobuf message: so a fuzzer changes fields, and not only bytes of a file."""

from __future__ import annotations

import struct

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

INTEGERS = (0, 1, -1, 2, 3, 7, 16, 99, 255, 4096, 2**31 - 1, -(2**31), 2**31, 2**40, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e38, 1e300, float("inf"), float("-inf"), float("nan"))
WORDS = (
    *(
        "",
        "x",
        "y",
        "w",
        "s",
        "z",
        "value",
        "axis",
        "to",
        "then_branch",
        "body",
        "location",
        "offset",
        "length",
        "checksum",
    ),
    *("w.bin", "./w.bin", "../w.bin", "/etc/hostname", "a/../../x", "C:x", "a\\b", "*/_ORT_MEM_ADDR_/*", "__class__"),
    *("-1", "4096", "18446744073709551616", "0x10", "١", "ai.onnx", "com.microsoft", "f", "F", "Relu", "If", "Loop"),
    *(
        "Constant",
        "ConstantOfShape",
        "Expand",
        "Tile",
        "Reshape",
        "QuantizeLinear",
        "DequantizeLinear",
        "Concat",
        "Add",
    ),
    *("\0", "\x1b[31m", "\u202e", "x" * 300),
)
KINDS = {
    **dict.fromkeys((FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64), "integer"),
    **dict.fromkeys((FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64), "natural"),
    **dict.fromkeys((FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE), "float"),
    FieldDescriptor.CPPTYPE_ENUM: "enum",
    FieldDescriptor.CPPTYPE_STRING: "text",
    FieldDescriptor.CPPTYPE_BOOL: "integer",
}
DEEPEST = 12


class Tape:
    """Bytes that are read from front to back; zeros follow."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def __bool__(self) -> bool:
        return self._place < len(self._data)

    def take(self, count: int) -> bytes:
        """The next bytes."""
        found = self._data[self._place : self._place + count]
        self._place += count
        return found.ljust(count, b"\0")

    def below(self, count: int) -> int:
        """A number from 0 to ``count - 1``."""
        return int.from_bytes(self.take(1 if count <= 256 else 2)) % max(count, 1)

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(max(0, len(self._data) - self._place))


def edit(message: Message, tape: Tape, steps: int = 24) -> None:
    """Change fields of ``message`` and of what is in it, as the tape says."""
    while tape and steps:
        _edit_once(message, tape)
        steps -= 1


def _edit_once(message: Message, tape: Tape) -> None:
    for _ in range(DEEPEST):
        fields = message.DESCRIPTOR.fields
        field = fields[tape.below(len(fields))]
        if field.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE:
            _set(message, field, tape)
            return
        if not field.is_repeated:
            message = getattr(message, field.name)
            message.SetInParent()
            continue
        items = getattr(message, field.name)
        what = tape.below(8)
        if what == 0 and items:
            del items[tape.below(len(items))]
            return
        if what == 1 and items and len(items) < 64:
            items.add().CopyFrom(items[tape.below(len(items))])
        elif what == 2 or not items:
            items.add()
        message = items[tape.below(len(items))]


def _set(message: Message, field: FieldDescriptor, tape: Tape) -> None:
    if not field.is_repeated:
        if tape.below(8) == 0:
            message.ClearField(field.name)
        else:
            setattr(message, field.name, _value(field, tape))
        return
    items = getattr(message, field.name)
    what = tape.below(4)
    if what == 0 and items:
        del items[tape.below(len(items))]
    elif what == 1 and items:
        items[tape.below(len(items))] = _value(field, tape)
    else:
        items.append(_value(field, tape))


def _value(field: FieldDescriptor, tape: Tape) -> object:
    kind = KINDS[field.cpp_type]
    if kind == "text":
        return _text(tape) if field.type == FieldDescriptor.TYPE_STRING else tape.take(tape.below(64))
    if kind == "float":
        return FLOATS[tape.below(len(FLOATS))]
    if kind == "enum":
        numbers = [value.number for value in field.enum_type.values]
        return numbers[tape.below(len(numbers))]
    bits = 32 if field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32) else 64
    number = INTEGERS[tape.below(len(INTEGERS))] if tape.below(4) else struct.unpack("<q", tape.take(8))[0]
    if kind == "natural":
        return number % (1 << bits)
    return (number + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))


def _text(tape: Tape) -> str:
    if tape.below(4):
        return WORDS[tape.below(len(WORDS))]
    return tape.take(tape.below(24)).decode("latin-1")
