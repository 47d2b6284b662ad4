"""What a decoder in the portable layout asks for, read off a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qexport.errors import ModelInvalid
from qexport.passes.portable import (
    IDS,
    KINDS,
    LOGITS,
    MAX_POSITIONS,
    PAST,
    POSITIONS,
    WRITE,
    parse_positions,
    past_name,
    present_name,
)
from qexport.runtime.session import Port, Session

CACHED = (np.dtype(np.float32), np.dtype(np.float16))


@dataclass(frozen=True, slots=True)
class Signature:
    """What a graph in the portable layout asks for.

    Attributes:
        caches: Heads and size of a head of every past input, in the order of the layers.
        dtype: Type of the caches.
        vocabulary: Size of the logits.
        positions: The longest sequence; ``None`` where the model does not say.
        columns: Of every cache, where the graph fixes them; ``None`` where they are free.
        context: Further inputs, which the caller gives once per sequence.
    """

    caches: Mapping[str, tuple[int, int]]
    dtype: np.dtype[Any]
    vocabulary: int
    positions: int | None
    columns: int | None
    context: Mapping[str, Port]

    @property
    def layers(self) -> int:
        """How many layers keep keys and values."""
        return len(self.caches) // len(KINDS)


def read_signature(session: Session) -> Signature:
    """Read the layout off a session.

    Raises:
        ModelInvalid: The graph is not in the portable layout.
    """
    ports = {port.name: port for port in session.ports}
    past = [name for name in ports if name.startswith(PAST)]
    names = [past_name(layer, kind) for layer in range(max(1, -(-len(past) // 2))) for kind in KINDS]
    _demand("inputs", [IDS, POSITIONS, WRITE, *names], ports)
    _demand("outputs", [LOGITS, *map(present_name, names)], session.outputs)
    known = {IDS, POSITIONS, WRITE, *past}
    return Signature(
        caches={name: _heads(ports[name]) for name in names},
        columns=_columns([ports[name] for name in names]),
        dtype=_one_type([ports[name] for name in names]),
        vocabulary=_vocabulary(next(port for port in session.results if port.name == LOGITS)),
        positions=_positions(session.metadata),
        context={name: port for name, port in ports.items() if name not in known},
    )


def _demand(what: str, wanted: Sequence[str], found: Mapping[str, Any] | Sequence[str]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        hint = "qexport export writes decoders in this layout"
        raise ModelInvalid(f"no decoder in the portable layout, {what} missing: {', '.join(missing)}", hint=hint)


def _heads(port: Port) -> tuple[int, int]:
    """Heads and size of a head of a cache ``[batch, heads, max_seq, size]``."""
    if len(port.shape) == 4:
        batch, heads, _, size = port.shape
        if isinstance(heads, int) and isinstance(size, int) and not isinstance(batch, int):
            return heads, size
    raise _other_shape(port)


def _columns(ports: Sequence[Port]) -> int | None:
    """The fixed number that all caches have, or ``None`` if it is free in all."""
    fixed = [port for port in ports if isinstance(port.shape[2], int)]
    if not fixed:
        return None
    columns = fixed[0].shape[2]
    if len(fixed) < len(ports) or any(port.shape[2] != columns for port in fixed):
        raise _other_shape(fixed[0])
    return int(columns) if isinstance(columns, int) else None


def _other_shape(port: Port) -> ModelInvalid:
    expected = "[batch, heads, max_seq, size], the first free, the third free or the same number in all caches"
    return ModelInvalid(f"{port.name!r} has the shape {list(port.shape)}, expected {expected}")


def _one_type(ports: Sequence[Port]) -> np.dtype[Any]:
    found = {port.dtype for port in ports}
    if len(found) != 1 or not found <= set(CACHED):
        told = ", ".join(sorted(map(str, {port.kind for port in ports})))
        raise ModelInvalid(f"the caches are {told}, expected one of {', '.join(map(str, CACHED))}")
    return np.dtype(found.pop())


def _vocabulary(port: Port) -> int:
    size = port.shape[-1] if len(port.shape) == 3 else None
    if not isinstance(size, int) or port.dtype != np.float32:
        what = f"{LOGITS!r} is {port.kind} {list(port.shape)}, expected float32 [batch, sequence, vocabulary]"
        raise ModelInvalid(what, hint="the size of the vocabulary must be known")
    return size


def _positions(metadata: Mapping[str, str]) -> int | None:
    told = metadata.get(MAX_POSITIONS)
    if told is None:
        return None
    found = parse_positions(told)
    if found is None:
        raise ModelInvalid(f"{MAX_POSITIONS} is {told!r}, expected a number above 0", where="metadata of the model")
    return found
