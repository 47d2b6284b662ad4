"""Read a decoder with a cache as one without: whole rows from their first token on, as calibration and proofs do."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from qexport.calibration.reading.spec import is_state, keeps_cache
from qexport.passes.portable import IDS, POSITIONS, PRESENT, WRITE


def read_whole_rows(work: ir.Model) -> None:
    """Compute the inputs that a call without history has, and drop the caches from the outputs, in place.

    Positions count from 0, keys and values are written from column 0 on, and the caches are zeros with a column for
    each token. What is left to feed is what a graph without a cache reads; ``logits`` are those of a first call.
    Models without a cache stay as they are.
    """
    graph = work.graph
    if not keeps_cache(work):
        return
    ids = next(value for value in graph.inputs if value.name == IDS)
    maker = _Maker(ids)
    for value in [value for value in graph.inputs if is_state(value.name)]:
        graph.inputs.remove(value)
        value.replace_all_uses_with(maker.make(value))
    graph.insert_before(graph[0], maker.nodes)
    carried = [value for value in graph.outputs if (value.name or "").startswith(PRESENT)]
    for value in carried:
        graph.outputs.remove(value)


class _Maker:
    """Makes what stands for an input out of the token ids."""

    def __init__(self, ids: ir.Value) -> None:
        self.ids = ids
        self.nodes: list[ir.Node] = []
        self.batch, self.length = (self._op("Shape", ids, start=axis, end=axis + 1) for axis in (0, 1))

    def make(self, value: ir.Value) -> ir.Value:
        """The value of ``position_ids``, ``write_indices`` or a cache."""
        if value.name == POSITIONS:
            length = self._op("Squeeze", self.length)
            row = self._op("Range", self._constant(0), length, self._constant(1))
            return self._op("Expand", row, self._op("Shape", self.ids))
        if value.name == WRITE:
            return self._zeros(self.batch, ir.DataType.INT64)
        assert value.shape is not None
        assert value.dtype is not None
        heads, size = (self._constant([axis]) for axis in (value.shape[1], value.shape[3]) if isinstance(axis, int))
        return self._zeros(self._op("Concat", self.batch, heads, self.length, size, axis=0), value.dtype)

    def _zeros(self, shape: ir.Value, dtype: ir.DataType) -> ir.Value:
        made = self._op("ConstantOfShape", shape, value=ir.tensor([0], dtype))
        made.type = ir.TensorType(dtype)
        return made

    def _constant(self, number: int | list[int]) -> ir.Value:
        return self._op("Constant", value=ir.tensor(np.array(number, np.int64)))

    def _op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=f"whole_rows/{op_type}_{len(self.nodes)}")
        node.outputs[0].name = f"{node.name}:0"
        self.nodes.append(node)
        return node.outputs[0]
