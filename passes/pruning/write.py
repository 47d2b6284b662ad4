"""Put smaller constants and other sizes into a graph, without touching what other nodes read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.match import Names, add_constant, array, dims, maker, sweep
from qexport.passes.pruning.sizes import Number

Edits = dict[int, int]  # position to number


@dataclass
class Writer:
    """Collects what inputs are to become, and gives new constants the names of the old ones where those go."""

    _constants: dict[tuple[ir.Value, bytes], list[tuple[ir.Node, int]]] = field(default_factory=dict)
    _arrays: dict[tuple[ir.Value, bytes], NDArray[np.generic]] = field(default_factory=dict)

    def constant(self, node: ir.Node, index: int, numbers: NDArray[np.generic], key: bytes) -> None:
        """Let one input be a constant of these numbers; inputs of the same constant and key share one."""
        old = node.inputs[index]
        assert old is not None
        self._constants.setdefault((old, key), []).append((node, index))
        self._arrays[old, key] = numbers

    def numbers(self, told: Iterable[tuple[Number, int]]) -> None:
        """Let inputs and attributes have other numbers at some positions."""
        edits: dict[tuple[ir.Node, int], Edits] = {}
        for number, size in told:
            if isinstance(number.where, int):
                assert number.position is not None
                edits.setdefault((number.node, number.where), {})[number.position] = size
            else:
                _attribute(number.node, number.where, number.position, size)
        for (node, index), changes in edits.items():
            self._shape(node, index, changes)

    def close(self) -> None:
        """Write all constants."""
        for key, readers in self._constants.items():
            old, numbers, anchor = key[0], self._arrays[key], readers[0][0]
            for node, index in readers:
                node.replace_input_with(index, None)
            sweep([old])
            new = add_constant(anchor, str(old.name), numbers)
            for node, index in readers:
                node.replace_input_with(index, new)

    def _shape(self, node: ir.Node, index: int, changes: Edits) -> None:
        """Change entries of a shape that is stored, or joined of pieces of which some are."""
        value = node.inputs[index]
        assert value is not None
        stored = array(value)
        if stored is not None:
            new = stored.copy()
            for position, size in changes.items():
                new.reshape(-1)[position] = size
            if not np.array_equal(new, stored):
                self.constant(node, index, new, new.tobytes())
            return
        concat = maker(value)
        if len(value.uses()) > 1 or value.is_graph_output():
            concat = _copied(concat)
            node.replace_input_with(index, concat.outputs[0])
        start = 0
        for i, piece in enumerate(concat.inputs):
            length = _length(piece)
            inside = {p - start: size for p, size in changes.items() if start <= p < start + length}
            if inside:
                self._shape(concat, i, inside)
            start += length


def _length(value: ir.Value | None) -> int:
    stored, shape = array(value), dims(value)
    if stored is not None:
        return int(stored.size)
    return shape[0] if shape and isinstance(shape[0], int) else 1


def _copied(concat: ir.Node) -> ir.Node:
    body = concat.graph
    assert body is not None
    names, old = Names(body), concat.outputs[0]
    copy = ir.node(concat.op_type, list(concat.inputs), dict(concat.attributes), name=names.fresh(f"{concat.name}/cut"))
    copy.outputs[0].name = names.fresh(f"{old.name}/cut")
    copy.outputs[0].type, copy.outputs[0].shape = old.type, old.shape
    body.insert_after(concat, copy)
    return copy


def _attribute(node: ir.Node, name: str, position: int | None, size: int) -> None:
    if position is None:
        node.attributes[name] = ir.AttrInt64(name, size)
        return
    numbers = list(node.attributes.get_ints(name, ()))
    numbers[position] = size
    node.attributes[name] = ir.AttrInt64s(name, numbers)
