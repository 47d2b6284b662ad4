"""The edits of ``half``: chosen nodes compute in 16 bits, and casts stand where they meet the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.casting.rules import FILL, TYPE_ATTRIBUTES, Format, filling, is_float
from qexport.passes.match import Names, constant, sweep

_F32 = ir.DataType.FLOAT
_ANY_TYPE = ("Shape", "Size")  # they do not look at the numbers


class Caster:
    """Converts the chosen nodes of one graph and puts casts at the borders."""

    def __init__(self, graph: ir.Graph, chosen: set[ir.Node], form: Format) -> None:
        """Nothing is edited yet; ``run`` does that."""
        self.graph = graph
        self.form = form
        self.chosen = chosen
        self._names = Names(graph)
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._halves: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        """Edit the graph."""
        caches = dict(self._caches())
        made = {value for node in self.chosen for value in node.outputs if is_float(value)} | set(caches)
        for node in list(self.graph):
            self._convert_inputs(node, made)
        for node in self.chosen:
            convert_attributes(node, self.form)
        for value in made:
            value.type = ir.TensorType(self.form.dtype)  # a new object: clones share the old one
        for index, value in enumerate(list(self.graph.outputs)):
            if value in made and value not in caches.values():
                self._restore_output(index, value)
        sweep(list(self._halves))

    def _caches(self) -> Iterator[tuple[ir.Value, ir.Value]]:
        """Inputs that a chosen node writes new rows into, with the outputs that are handed in again at the next call.

        They become short themselves: a cast would copy all of a cache at every call, and engines want to write it in
        place.
        """
        for node in (node for node in self.chosen if node.op_type == "TensorScatter"):
            past, present = node.inputs[0], node.outputs[0]
            if past is not None and past.is_graph_input() and present.is_graph_output() and is_float(past):
                yield past, present

    def _convert_inputs(self, node: ir.Node, made: set[ir.Value]) -> None:
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            if node in self.chosen and is_float(value) and value not in made:
                node.replace_input_with(index, self._half(value))
            elif node not in self.chosen and value in made and node.op_type not in _ANY_TYPE:
                node.replace_input_with(index, self._cast(value, _F32))

    def _half(self, value: ir.Value) -> ir.Value:
        """The short form of a float32 value that no chosen node makes."""
        tensor = constant(value)
        if tensor is None:
            return self._cast(value, self.form.dtype)
        if value not in self._halves:
            name = self._names.fresh(f"{value.name}/half")
            half = to_half(tensor, self.form)
            copy = ir.Value(name=name, type=ir.TensorType(self.form.dtype), shape=ir.Shape(half.shape))
            copy.const_value = ir.tensor(half, name=name)
            self.graph.register_initializer(copy)
            self._halves[value] = copy
        return self._halves[value]

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        if (value, to) not in self._casts:
            name = self._names.fresh(f"{value.name}/Cast_{to.name.lower()}")
            node = ir.node("Cast", [value], {"to": to}, name=name)
            out = node.outputs[0]
            out.name, out.type = self._names.fresh(f"{value.name}/{to.name.lower()}"), ir.TensorType(to)
            out.shape = None if value.shape is None else value.shape.copy()
            producer = value.producer()
            if producer is not None:
                self.graph.insert_after(producer, node)
            else:
                self.graph.insert_before(self.graph[0], node)
            self._casts[value, to] = out
        return self._casts[value, to]

    def _restore_output(self, index: int, value: ir.Value) -> None:
        """Give the model's output its name and type back."""
        name = value.name
        value.name = self._names.fresh(f"{name}/half")
        producer = value.producer()
        cast = self._casts.get((value, _F32))
        if cast is None and producer is not None:
            node = ir.node("Cast", [value], {"to": _F32}, name=self._names.fresh(f"{name}/Cast_output"))
            self.graph.insert_after(producer, node)
            cast = node.outputs[0]
        if cast is None:
            raise ValueError(f"output {name!r} has no producer")
        cast.name, cast.type, cast.shape = name, ir.TensorType(_F32), value.shape
        self.graph.outputs[index] = cast


def to_half(tensor: ir.TensorProtocol, form: Format) -> NDArray[Any]:
    """Round to ``form``; what is finite stays finite."""
    numbers = tensor.numpy()
    clipped = np.where(np.isinf(numbers), numbers, np.clip(numbers, -form.largest, form.largest))
    return np.asarray(clipped.astype(form.dtype.numpy()))


def convert_attributes(node: ir.Node, form: Format) -> None:
    """Let the attributes that name a type, or hold numbers of it, say the short one."""
    kind = TYPE_ATTRIBUTES.get(node.op_type)
    if kind is not None and node.attributes.get_int(kind, 0) == _F32:
        node.attributes[kind] = ir.AttrInt64(kind, form.dtype)
    name = FILL.get(node.op_type)
    if name is not None:
        tensor = filling(node)
        half = np.zeros(1, form.dtype.numpy()) if tensor is None else to_half(tensor, form)
        node.attributes[name] = ir.AttrTensor(name, ir.tensor(half))
