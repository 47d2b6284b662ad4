"""A small graph builder for model families: named nodes, weights streamed from safetensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.errors import ModelInvalid

Weights = Callable[[str, tuple[int, ...]], NDArray[Any]]  # (tensor name, expected shape) -> array, read when asked for


def open_weights(path: Path) -> Weights:
    """Return a reader of single tensors of one file; a missing one or another shape is ``ModelInvalid``."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ModelInvalid(f"not a safetensors file: {error}", where=str(path)) from error
    names: set[str] = set(file.keys())  # type: ignore[no-untyped-call]  # safetensors has no types

    def read(name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        if name not in names:
            raise ModelInvalid(
                f"weight {name!r} is missing",
                where=str(path),
                hint=f"the file holds {len(names)} tensors, such as {sorted(names)[0]!r}",
            )
        tensor = np.asarray(file.get_tensor(name))  # type: ignore[no-untyped-call]  # as above
        if tensor.shape != shape:
            raise ModelInvalid(
                f"weight {name!r} is {list(tensor.shape)}, config.json asks for {list(shape)}", where=str(path)
            )
        return tensor

    return read


class GraphBuilder:
    """Appends nodes to one graph; ``op`` names each node after the module it comes from."""

    def __init__(self, name: str, opset: int) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name=name)
        self._used: set[str] = set()

    def input(self, name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
        """Add a graph input; strings are symbolic dimensions."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> None:
        """Make ``value`` a graph output called ``name``."""
        value.name = name
        value.dtype = dtype
        value.shape = ir.Shape(shape)
        self.graph.outputs.append(value)

    def weight(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Add an initializer."""
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
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

    def linear(self, scope: str, x: ir.Value, weights: Weights, shape: tuple[int, int]) -> ir.Value:
        """``x W^T + b`` with the torch layout ``[out, in]`` of ``scope.weight`` stored as ``[in, out]``."""
        kernel = np.ascontiguousarray(weights(f"{scope}.weight", shape).T)
        product = self.op(scope, "MatMul", x, self.weight(f"{scope}.weight", kernel))
        return self.op(scope, "Add", product, self.weight(f"{scope}.bias", weights(f"{scope}.bias", shape[:1])))

    def layer_norm(self, scope: str, x: ir.Value, weights: Weights, width: int, epsilon: float) -> ir.Value:
        """LayerNormalization over the last axis, of size ``width``."""
        names = [f"{scope}.weight", f"{scope}.bias"]
        gamma, beta = (self.weight(name, weights(name, (width,))) for name in names)
        return self.op(scope, "LayerNormalization", x, gamma, beta, axis=-1, epsilon=epsilon)
