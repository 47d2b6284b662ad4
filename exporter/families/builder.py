"""A small graph builder for model families: named nodes, weights streamed from safetensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.errors import ModelInvalid

MAX_POSITIONS = "qexport.max_positions"  # metadata of a model: the longest sequence it has positions for
COPY = "qexport.copy_of"  # meta of an initializer: the weight that it repeats
Weights = Callable[[str, tuple[int, ...]], NDArray[Any]]  # (tensor name, expected shape) -> array, read when asked for


_FLOATS = ("F32", "F16", "BF16", "F64")  # numpy knows bfloat16 since onnx_ir has loaded ml_dtypes
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def open_weights(path: Path, anchor: str) -> Weights:
    """Return a reader of single tensors of one file, as float32.

    Names are as ``anchor`` has them: what stands before it in the file (``bert.`` in a checkpoint with a head) is left
    away everywhere, and LayerNorm's old ``gamma`` and ``beta`` are ``weight`` and ``bias``.

    Raises:
        ModelInvalid: Not safetensors, or several models; when read: missing, of another shape, or no float type.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ModelInvalid(f"not a safetensors file: {error}", where=str(path)) from error
    stored: list[str] = sorted(file.keys())  # type: ignore[no-untyped-call]  # safetensors has no types
    prefix = _prefix(stored, anchor, str(path))
    names = {_modern(name.removeprefix(prefix)): name for name in stored if name.startswith(prefix)}

    def read(name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        if name not in names:
            such = f", such as {stored[0]!r}" if stored else ""
            hint = f"the file holds {len(stored)} tensors{such}"
            raise ModelInvalid(f"weight {name!r} is missing", where=str(path), hint=hint)
        view = file.get_slice(names[name])  # type: ignore[no-untyped-call]  # as above
        found, kind = tuple(view.get_shape()), view.get_dtype()
        if found != shape:
            raise ModelInvalid(f"weight {name!r} is {list(found)}, config.json asks for {list(shape)}", where=str(path))
        if kind not in _FLOATS:
            hint = f"save the model as float; {', '.join(_FLOATS)} are read"
            raise ModelInvalid(f"weight {name!r} is of type {kind}", where=str(path), hint=hint)
        tensor = np.asarray(file.get_tensor(names[name]))  # type: ignore[no-untyped-call]  # as above
        with np.errstate(over="ignore"):  # infinities are admission's to judge
            return tensor.astype(np.float32, copy=False)

    return read


def _prefix(stored: list[str], anchor: str, where: str) -> str:
    found = [name.removesuffix(anchor) for name in stored if name == anchor or name.endswith(f".{anchor}")]
    if "" in found or not found:
        return ""
    if len(found) > 1:
        shown = ", ".join(map(repr, found))
        raise ModelInvalid(f"several models in one file: {shown}", where=where, hint="save the one to export alone")
    return found[0]


def _modern(name: str) -> str:
    old = next((old for old in _OLD_NAMES if name.endswith(old)), None)
    return name if old is None else name.removesuffix(old) + _OLD_NAMES[old]


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

    def linear(
        self, scope: str, x: ir.Value, weights: Weights, shape: tuple[int, int], *, bias: bool = True
    ) -> ir.Value:
        """``x W^T + b`` with the torch layout ``[out, in]`` of ``scope.weight`` stored as ``[in, out]``."""
        kernel = np.ascontiguousarray(weights(f"{scope}.weight", shape).T)
        product = self.op(scope, "MatMul", x, self.weight(f"{scope}.weight", kernel))
        if not bias:
            return product
        return self.op(scope, "Add", product, self.weight(f"{scope}.bias", weights(f"{scope}.bias", shape[:1])))

    def layer_norm(self, scope: str, x: ir.Value, weights: Weights, width: int, epsilon: float) -> ir.Value:
        """LayerNormalization over the last axis, of size ``width``."""
        names = [f"{scope}.weight", f"{scope}.bias"]
        gamma, beta = (self.weight(name, weights(name, (width,))) for name in names)
        return self.op(scope, "LayerNormalization", x, gamma, beta, axis=-1, epsilon=epsilon)

    def rms_norm(self, scope: str, x: ir.Value, weights: Weights, width: int, epsilon: float) -> ir.Value:
        """``x / sqrt(mean(x x) + epsilon) * weight`` over the last axis, of size ``width``, in small operators."""
        gamma = self.weight(f"{scope}.weight", weights(f"{scope}.weight", (width,)))
        mean = self.op(scope, "ReduceMean", self.op(scope, "Mul", x, x), self.constant("axis_last", [-1]), keepdims=1)
        root = self.op(scope, "Sqrt", self.op(scope, "Add", mean, self.constant(f"epsilon_{epsilon:g}", epsilon)))
        return self.op(scope, "Mul", self.op(scope, "Div", x, root), gamma)
