"""Write the portable layout into a decoder graph whose layers were found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qexport.passes import match
from qexport.passes.caching.parts import Cache, Ends
from qexport.passes.caching.positions import Stand, replacement
from qexport.passes.portable import (
    COLUMNS,
    IDS,
    KINDS,
    LOGITS,
    MASKED,
    POSITIONS,
    WRITE,
    past_name,
    present_name,
)

APPENDED = "_appended"
"""What the names of caches and values of the old layout end in while both are there."""
_ROW = ("batch", "sequence")


@dataclass(frozen=True, eq=False)
class Layer:
    """One attention, the scale of its scores, and how many positions back it sees (``None``: all)."""

    ends: Ends
    scale: float
    window: int | None


class Writer:
    """Edits one graph; afterwards what nobody reads is gone, and shapes are inferred anew."""

    def __init__(self, graph: ir.Graph, layers: Sequence[Layer], logits: ir.Value) -> None:
        self.graph, self.layers, self.logits = graph, layers, logits
        self.first = graph[0]
        named = {value.name: value for value in graph.inputs}
        self.ids = _input(IDS, ir.DataType.INT64, _ROW, named.get(IDS))
        self.positions = _input(POSITIONS, ir.DataType.INT64, _ROW, named.get(POSITIONS))
        self.indices = _input(WRITE, ir.DataType.INT64, ("batch",))
        self.past: list[ir.Value] = []
        self.present: list[ir.Value] = []
        self._masks: dict[int | None, ir.Value] = {}

    def write(self, stands: Sequence[Stand]) -> None:
        """Replace the layers and the values that inputs stand for, then the inputs and outputs."""
        for cache in (cache for layer in self.layers for cache in (layer.ends.keys, layer.ends.values)):
            cache.past.name, cache.present.name = f"{cache.past.name}{APPENDED}", f"{cache.present.name}{APPENDED}"
        for index, layer in enumerate(self.layers):
            self._layer(index, layer)
        for stand in stands:
            nodes = replacement(stand, self.positions, self.ids, self.first)
            self._insert(self.first, nodes, f"{stand.value.name}_given")
            ir.convenience.replace_all_uses_with(stand.value, nodes[-1].outputs[0])
        self._ends()
        _tidy(self.graph)

    def _layer(self, index: int, layer: Layer) -> None:
        ends = layer.ends
        keys, values = (
            self._scatter(cache, past_name(index, kind))
            for cache, kind in zip((ends.keys, ends.values), KINDS, strict=True)
        )
        last = match.maker(ends.context)
        inputs = [ends.query, keys, values, self._mask(layer)]
        node = ir.node("Attention", inputs, {"scale": layer.scale}, name=f"{last.name}_cached")
        self._insert(last, [node], str(last.name))
        context, name = node.outputs[0], ends.context.name
        ends.context.name, context.name, context.type = f"{name}{APPENDED}", name, ends.context.type
        ir.convenience.replace_all_uses_with(ends.context, context)

    def _scatter(self, cache: Cache, name: str) -> ir.Value:
        """A cache input, and the node that writes into it."""
        shape, dtype = ("batch", cache.heads, COLUMNS, cache.dim), cache.past.dtype
        assert dtype is not None
        past = _input(name, dtype, shape)
        node = ir.node("TensorScatter", [past, cache.new, self.indices], {"axis": -2, "mode": "linear"})
        self._insert(match.maker(cache.present), [node], present_name(name))
        present = node.outputs[0]
        present.type, present.shape = past.type, ir.Shape(shape)
        self.past.append(past)
        self.present.append(present)
        return present

    def _mask(self, layer: Layer) -> ir.Value:
        """0 where a query may look and ``MASKED`` elsewhere, [batch, 1, sequence, max_seq] of the caches' type."""
        if layer.window in self._masks:
            return self._masks[layer.window]
        dtype = layer.ends.keys.past.dtype
        assert dtype is not None
        scope = "mask" if layer.window is None else f"mask_{layer.window}"
        nodes: list[ir.Node] = []

        def constant(name: str, number: Any, kind: Any = np.int64) -> ir.Value:
            return match.add_constant(self.first, f"{scope}/{name}", np.array(number, kind))

        def op(op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
            nodes.append(ir.node(op_type, inputs, attributes))
            return nodes[-1].outputs[0]

        length = op("Squeeze", op("Shape", self.past[0], start=2, end=3))
        keys = op("Range", constant("first", 0), length, constant("next", 1))
        queries = op("Unsqueeze", self.positions, constant("axes", [1, 3]))
        seen = op("LessOrEqual", keys, queries)
        if layer.window is not None:
            oldest = op("Sub", queries, constant("window", [layer.window]))
            seen = op("And", seen, op("Greater", keys, oldest))
        kind = dtype.numpy()
        mask = op("Where", seen, constant("shown", 0.0, kind), constant("hidden", MASKED, kind))
        self._insert(self.first, nodes, scope)
        self._masks[layer.window] = mask
        return mask

    def _ends(self) -> None:
        """The inputs and outputs of the layout, logits as float32."""
        logits, last = self.logits, match.maker(self.logits)
        if logits.dtype != ir.DataType.FLOAT:
            logits.name = f"{LOGITS}_computed"
            node = ir.node("Cast", [logits], {"to": ir.DataType.FLOAT}, name="logits/Cast")
            self.graph.insert_after(last, node)
            logits = node.outputs[0]
        vocabulary = (match.dims(self.logits) or (None,))[-1]
        logits.name, logits.type = LOGITS, ir.TensorType(ir.DataType.FLOAT)
        logits.shape = ir.Shape((*_ROW, vocabulary))
        self.graph.outputs.clear()
        self.graph.outputs.extend([logits, *self.present])
        self.graph.inputs.clear()
        self.graph.inputs.extend([self.ids, self.positions, self.indices, *self.past])

    def _insert(self, before: ir.Node, nodes: Sequence[ir.Node], name: str) -> None:
        """Put nodes before another one, with names after ``name`` unless they have some; the last value is ``name``."""
        for node in nodes:
            node.name = node.name or f"{name}/{node.op_type}"
            node.outputs[0].name = f"{node.name}_output"
        nodes[-1].outputs[0].name = name
        self.graph.insert_before(before, nodes)


def _input(name: str, dtype: ir.DataType, shape: tuple[int | str, ...], old: ir.Value | None = None) -> ir.Value:
    value = ir.Value(name=name) if old is None else old
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
    return value


def _tidy(graph: ir.Graph) -> None:
    """Remove what nobody reads, and infer shapes from those of the new inputs."""
    import onnx_ir.passes.common as common

    model = ir.Model(graph, ir_version=11)
    common.RemoveUnusedNodesPass()(model)
    graph.sort()
    for node in graph:
        for value in node.outputs:
            sizes = match.dims(value) or ()
            if not value.is_graph_output() and any(not isinstance(size, int) for size in sizes):
                value.shape = ir.Shape([size if isinstance(size, int) else None for size in sizes])
    common.NameFixPass()(model)
    common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
