"""A small graph builder for model families: named nodes, weights streamed from a checkpoint, one float type."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.exporter.families.form import SCORING, Form
from qexport.exporter.families.weights import Array, Stored, Weights, as_float32, demand_finite
from qexport.passes.portable import MAX_POSITIONS

COPY = "qexport.copy_of"  # meta of an initializer: the weight that it repeats
Change = Callable[[Array], Array]  # what happens to a stored tensor on its way into the graph


def transposed(array: Array) -> Array:
    """``[out, in]`` as torch stores it to ``[in, out]`` as MatMul reads it."""
    return np.ascontiguousarray(array.T)


class GraphBuilder:
    """Appends nodes to one graph; ``op`` names each node after the module it comes from."""

    def __init__(self, name: str, opset: int, weights: Weights, form: Form = SCORING) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name=name)
        self.weights, self.form, self.dtype = weights, form, form.dtype
        self._used: set[str] = set()

    def input(self, name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
        """Add a graph input; strings are symbolic dimensions."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> None:
        """Make ``value`` a graph output called ``name``; a float32 output of a graph in half precision is cast."""
        if dtype == ir.DataType.FLOAT != self.dtype:
            value = self.op(name, "Cast", value, to=dtype)
        value.name = name
        value.dtype = dtype
        value.shape = ir.Shape(shape)
        self.graph.outputs.append(value)

    def finish(self, positions: int | None = None) -> ir.Model:
        """The model, with the longest sequence that it has positions for."""
        version = 11 if self.graph.opset_imports[""] > 22 else 10
        model = ir.Model(self.graph, ir_version=version, producer_name="qexport")
        if positions is not None:
            model.metadata_props[MAX_POSITIONS] = str(positions)
        return model

    def weight(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Add an initializer; float32 becomes the type of the graph."""
        if array.dtype == np.float32:
            array = array.astype(self.dtype.numpy(), copy=False)
        return self._register(name, ir.tensor(array, name=name))

    def parameter(
        self, name: str, shape: tuple[int, ...], change: Change | None = None, *, stored: str | None = None
    ) -> ir.Value:
        """Add the tensor ``stored`` (``name`` if not given) of the checkpoint, expected in ``shape``, and changed.

        What ``change`` makes may have another order of axes or another size, but follows from the shape alone.
        """
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        found = self.weights.check(stored or name, shape)
        read = partial(_read, found, change, self.dtype, name, finite=self.weights.finite)
        if not self.form.lazy:
            return self._register(name, read())
        changed = shape if change is None else change(np.broadcast_to(np.float32(0), shape)).shape
        return self._register(name, ir.LazyTensor(read, self.dtype, ir.Shape(changed), name=name))

    def _register(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def constant(self, name: str, number: float | list[int]) -> ir.Value:
        """Add a small constant: a float scalar or a list of int64."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return self.weight(name, np.array(number, np.int64 if isinstance(number, list) else np.float32))

    def op(self, scope: str, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Append one node called ``scope/op_type`` (numbered when repeated) and return its output."""
        name, count = f"{scope}/{op_type}", 1
        while name in self._used:
            count += 1
            name = f"{scope}/{op_type}_{count}"
        self._used.add(name)
        node = ir.node(op_type, list(inputs), attributes, name=name)
        node.outputs[0].name = f"{name}:0"
        self.graph.append(node)
        return node.outputs[0]

    def linear(self, scope: str, x: ir.Value, shape: tuple[int, int], *, bias: bool = True) -> ir.Value:
        """``x W^T + b`` with the torch layout ``[out, in]`` of ``scope.weight`` stored as ``[in, out]``."""
        product = self.op(scope, "MatMul", x, self.parameter(f"{scope}.weight", shape, transposed))
        return self.op(scope, "Add", product, self.parameter(f"{scope}.bias", shape[:1])) if bias else product

    def head(
        self, name: str, shape: tuple[int, int], table: str | None = None, *, stored: str | None = None
    ) -> ir.Value:
        """The matrix [width, vocabulary] that makes logits, of ``name`` [vocabulary, width].

        Where embeddings are tied a copy of their ``table``, which quantizes like any other weight; ``stored`` is what
        the checkpoint calls that table, where it calls it otherwise.
        """
        head = self.parameter(name, shape, transposed, stored=stored or table)
        if table is not None:
            head.meta[COPY] = table
        return head

    def count(self, scope: str, length: ir.Value) -> ir.Value:
        """0, 1, ... below ``length``, which has no axes."""
        zero, one = (self.weight(f"{scope}/{name}", np.array(n, np.int64)) for name, n in (("first", 0), ("next", 1)))
        return self.op(scope, "Range", zero, length, one)

    def layer_norm(self, scope: str, x: ir.Value, width: int, epsilon: float) -> ir.Value:
        """LayerNormalization over the last axis, of size ``width``."""
        gamma, beta = (self.parameter(f"{scope}.{part}", (width,)) for part in ("weight", "bias"))
        return self.op(scope, "LayerNormalization", x, gamma, beta, axis=-1, epsilon=epsilon)

    def rms_norm(self, scope: str, x: ir.Value, width: int, epsilon: float) -> ir.Value:
        """``x / sqrt(mean(x x) + epsilon) * weight`` over the last axis, of size ``width`` (Zhang & Sennrich 2019).

        One operator from opset 23 on, which sums in float32; small ones before, in float32 too: squares of 16 bits
        overflow from 256 on.
        """
        gamma = self.parameter(f"{scope}.weight", (width,))
        if self.graph.opset_imports[""] > 22:
            return self.op(scope, "RMSNormalization", x, gamma, axis=-1, epsilon=epsilon)
        half = self.dtype != ir.DataType.FLOAT
        wide = self.op(scope, "Cast", x, to=ir.DataType.FLOAT) if half else x
        mean = self.op(
            scope, "ReduceMean", self.op(scope, "Mul", wide, wide), self.constant("axis_last", [-1]), keepdims=1
        )
        root = self.op(scope, "Sqrt", self.op(scope, "Add", mean, self._epsilon(epsilon)))
        scaled = self.op(scope, "Div", wide, root)
        return self.op(scope, "Mul", self.op(scope, "Cast", scaled, to=self.dtype) if half else scaled, gamma)

    def _epsilon(self, number: float) -> ir.Value:
        """In float32, whatever the type of the graph."""
        name = f"epsilon_{number:g}"
        held = self.graph.initializers.get(name)
        return held if held is not None else self._register(name, ir.tensor(np.array(number, np.float32), name=name))


def _read(found: Stored, change: Change | None, dtype: ir.DataType, name: str, *, finite: bool) -> ir.Tensor[Any]:
    array = as_float32(found.read())
    if finite:
        demand_finite(array, dtype.numpy(), name, found.where)
    with np.errstate(over="ignore"):
        if change is not None:
            array = change(array)  # by itself, so that no more than two of its size are in memory
        array = array.astype(dtype.numpy(), copy=False)
    return ir.Tensor(array, dtype=dtype, name=name)
