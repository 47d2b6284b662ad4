"""Choosing tokens inside of a graph: the most likely, or one that is drawn; for ``unroll``."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qexport.passes.portable import CHANCES, SHARPNESS, TOKENS, UNIFORM

BELOW_ONE = 1 - 2.0**-52
"""Any number times this is less than the number, also when it is rounded."""


class Picker:
    """Appends to a graph what chooses tokens, with one call of ``pick`` for each step.

    A drawn token is the first whose cumulated probability is above ``uniform`` of the whole (inverse transform
    sampling, Devroye 1986, II.2), so never one without any. Softmax is in float32, as logits are; the sums are in
    float64, and ``chances`` are the probabilities by these sums.
    """

    def __init__(self, graph: ir.Graph, steps: int, size: int, drawn: bool) -> None:
        """Write for ``steps`` tokens, each out of ``size``; drawn, or else the most likely."""
        self.graph, self.steps, self.size, self.drawn = graph, steps, size, drawn
        self._tokens: list[ir.Value] = []
        self._chances: list[ir.Value] = []
        if drawn:
            self._sharpness = self.port(SHARPNESS, ir.DataType.FLOAT, 1)
            uniform = self.port(UNIFORM, ir.DataType.DOUBLE, "batch", steps)
            below = self.op("Min", uniform, self.constant("below_one", [BELOW_ONE]))
            self._uniform = self.op("Unsqueeze", below, self.constant("axes_2", [2]))

    def op(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        """The result of a new node."""
        node = ir.node(op_type, inputs, attributes)
        self.graph.append(node)
        return node.outputs[0]

    def port(self, name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        """A new input."""
        value = ir.val(name, dtype, shape)
        self.graph.inputs.append(value)
        return value

    def constant(self, name: str, numbers: list[int] | list[float]) -> ir.Value:
        """An initializer, one for all who ask for the name."""
        name = f"unroll/{name}"
        if name not in self.graph.initializers:
            array = np.array(numbers)
            tensor = ir.tensor(array, name=name)
            value = ir.val(name, tensor.dtype, array.shape, const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def pick(self, logits: ir.Value) -> ir.Value:
        """The token int64 [batch, 1] for logits [batch, 1, size]."""
        token = self._draw(logits) if self.drawn else self._first_largest(logits)
        self._tokens.append(token)
        return token

    def results(self) -> list[ir.Value]:
        """The outputs for all tokens that were picked."""
        found = [self._join(self._tokens, TOKENS, ir.DataType.INT64, "batch", self.steps)]
        if self.drawn:
            found.append(self._join(self._chances, CHANCES, ir.DataType.DOUBLE, "batch", self.steps, self.size))
        return found

    def _draw(self, logits: ir.Value) -> ir.Value:
        step = self.constant(f"step_{len(self._chances)}", [len(self._chances)])
        last = self.constant("last_token", [self.size - 1])
        softmax = self.op("Softmax", self.op("Mul", logits, self._sharpness), axis=-1)
        chances = self.op("Cast", softmax, to=ir.DataType.DOUBLE)
        cumulated = self.op("CumSum", chances, self.constant("tokens", [2]))
        whole = self.op("Gather", cumulated, last, axis=2)
        self._chances.append(self.op("Div", chances, whole))
        place = self.op("Mul", whole, self.op("Gather", self._uniform, step, axis=1))
        above = self.op("Cast", self.op("Greater", cumulated, place), to=ir.DataType.UINT8)
        return self._first_largest(above)

    def _first_largest(self, scores: ir.Value) -> ir.Value:
        return self.op("ArgMax", scores, axis=-1, keepdims=0)

    def _join(self, parts: list[ir.Value], name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        value = self.op("Concat", *parts, axis=1)
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        return value
