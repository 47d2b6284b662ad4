"""Values that would take more memory than there is: small files can ask for them by a shape that is a constant.

Nothing is folded to find out. What is not known counts as 1, so no sound model is refused; shapes that only data or
long computations tell are for the limits of the process that runs the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from qexport.errors import ResourceExhausted
from qexport.exporter.admit.external import pieces, reference
from qexport.exporter.admit.functions import Key, known
from qexport.exporter.admit.graphs import dependencies, topological
from qexport.exporter.admit.shapes import RULES, SMALL, UNKNOWN, Call, Known, Shape
from qexport.exporter.admit.subject import Body, Subject, place, quoted, standard
from qexport.exporter.admit.tensors import FORMATS, needed_bytes

Names: TypeAlias = dict[str, Known]

_DEEPEST = 64  # bodies in bodies, calls included; admission allows 32 of each kind
_NUMBERS = {TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.BOOL}
_LOGICAL = frozenset({"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Not"})
_UNTOLD = (LookupError, ValueError, TypeError, ArithmeticError)  # a shape that is not known, or a node used wrongly


def check_sizes(subject: Subject) -> None:
    """Raise ``ResourceExhausted`` naming the first value that is larger than ``Limits.max_value_bytes`` for certain."""
    orders = {index: topological(needs)[0] for index, needs in dependencies(subject).items()}
    inner: dict[tuple[int, int], list[int]] = {}
    for index, body in enumerate(subject.bodies):
        if body.parent is not None:
            inner.setdefault((body.parent, body.owner), []).append(index)
    _Walk(subject, orders, inner, known(subject), {}).visit(0, {}, 0)


@dataclass(frozen=True, slots=True)
class _Walk:
    """Goes through all nodes in an order in which they could run, into subgraphs and into calls of functions.

    A function is entered once for inputs of which the same is known: a few that call each other are a million calls.
    """

    subject: Subject
    orders: Mapping[int, list[int]]
    inner: Mapping[tuple[int, int], list[int]]
    functions: Mapping[Key, int]
    calls: dict[tuple[int, int, tuple[Known, ...]], list[Known]]

    def visit(self, index: int, names: Names, depth: int) -> None:
        """Judge the values of a body and put into ``names`` what is known of them.

        Subgraphs share the names of what is around them, as no name is written again inside.
        """
        body, limit = self.subject.bodies[index], self.subject.limits.max_value_bytes
        names.update(_given(body, self.subject.root))
        nodes = list(body.proto.node)
        for position in self.orders[index]:
            node = nodes[position]
            if depth < _DEEPEST:
                for child in self.inner.get((index, position), ()):
                    self.visit(child, names, depth + 1)
            written = self._written(node, names, depth)
            for name, found in zip_longest(node.output, written[: len(node.output)], fillvalue=UNKNOWN):
                names[str(name)] = found
                if found is not UNKNOWN and found.nbytes > limit and name:
                    raise _too_large(f"the value {quoted(name)} would take {found.nbytes} bytes", limit, node, body)

    def _written(self, node: onnx.NodeProto, names: Names, depth: int) -> list[Known]:
        inputs = tuple([names.get(name, UNKNOWN) if name else UNKNOWN for name in node.input])
        domain = standard(node.domain)
        called = self.functions.get((domain, node.op_type, node.overload)) if self.functions else None
        if called is None:
            return [_result(Call(node, inputs))] if domain == "" else []
        if depth >= _DEEPEST:
            return []
        key = (called, depth, inputs)
        if key not in self.calls:
            function = self.subject.model.functions[called - 1]
            inside: Names = dict(zip(function.input, inputs, strict=False))
            self.visit(called, inside, depth + 1)
            self.calls[key] = [inside.get(name, UNKNOWN) for name in function.output]
        return self.calls[key]


def _too_large(what: str, limit: int, node: onnx.NodeProto, body: Body) -> ResourceExhausted:
    inside = "" if body.where == "graph" else f"{body.where}, "
    hint = "the shape is a constant of the model: export it again with a smaller one"
    return ResourceExhausted(f"{what}, the limit is {limit}", where=f"{inside}{place(node)}", hint=hint)


def _given(body: Body, root: Path | None) -> Iterator[tuple[str, Known]]:
    """Inputs with the shapes they declare, and initializers."""
    if isinstance(body.proto, onnx.FunctionProto):
        return
    for value in body.proto.input:
        if value.type.WhichOneof("value") == "tensor_type":
            yield value.name, _declared(value.type.tensor_type)
    for tensor in body.proto.initializer:
        yield tensor.name, _constant(tensor, root)


def _declared(kind: onnx.TypeProto.Tensor) -> Known:
    form = FORMATS.get(kind.elem_type)
    if not kind.HasField("shape"):
        return Known(None, form.bits if form else 1)
    shape = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim)
    return Known(shape, form.bits if form else 1)


def _constant(tensor: TensorProto, root: Path | None) -> Known:
    shape = tuple(tensor.dims)
    small = tensor.data_type in _NUMBERS and math.prod(shape) <= SMALL
    return Known(shape, FORMATS[tensor.data_type].bits, cache(partial(_elements, tensor, root)) if small else None)


def _elements(tensor: TensorProto, root: Path | None) -> NDArray[Any]:
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    assert root is not None, "external data without a folder was refused before"
    data = b"".join(pieces(root, reference(tensor, ""), needed_bytes(tensor)))
    return np.frombuffer(data, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tuple(tensor.dims))


def _result(call: Call) -> Known:
    """What is known of the first output of a standard operator."""
    try:
        if call.node.op_type == "Constant":
            return _written_out(call)
        array = _folded(call)
        if array is not None:
            return _known(array)
        rule = RULES.get(call.node.op_type)
        return UNKNOWN if rule is None else Known(rule(call), _bits(call))
    except _UNTOLD:
        return UNKNOWN


def _written_out(call: Call) -> Known:
    attribute = call.node.attribute[0]
    if attribute.name == "value":
        return _constant(attribute.t, None) if attribute.t.data_location != TensorProto.EXTERNAL else UNKNOWN
    array = np.asarray(onnx.helper.get_attribute_value(attribute))
    return _known(array) if array.size <= SMALL and array.dtype.kind in "if" else Known(array.shape, 8)


def _known(array: NDArray[Any]) -> Known:
    return Known(array.shape, 8 * array.itemsize, lambda: array)


def _bits(call: Call) -> int:
    """Bits of an element of the output: of what it is converted to or filled with, else of the input it stems from."""
    kind = call.node.op_type
    if kind in ("Cast", "RandomNormal", "RandomUniform"):
        return FORMATS[call.attribute("to", call.attribute("dtype", TensorProto.FLOAT))].bits
    if kind == "ConstantOfShape":
        value = call.attribute("value")
        return 32 if value is None else FORMATS[value.data_type].bits
    if kind in _LOGICAL:
        return 8
    source = {"OneHot": 2, "Where": 1}.get(kind, 0)
    return call.inputs[source].bits if source < len(call.inputs) else 1


def _folded(call: Call) -> NDArray[Any] | None:
    """The output of the few operators that shapes are computed with, on small constants; ``None`` for all others."""
    kind = call.node.op_type
    if kind == "Shape":
        return _shape_of(call)
    fold = FOLDS.get(kind)
    if fold is None or any(known.read is None for known in call.inputs):
        return None
    arrays = [known.array for known in call.inputs]
    try:
        with np.errstate(all="ignore"):
            found = np.asarray(fold(call, *arrays))
    except _UNTOLD:
        return None
    return found if found.size <= SMALL else None


def _shape_of(call: Call) -> NDArray[Any] | None:
    shape: Shape = call.shape(0)
    start, end = call.attribute("start", 0), call.attribute("end", len(shape))
    part = shape[start:end]
    return None if None in part else np.array(part, np.int64)


def _cast(call: Call, array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(onnx.helper.tensor_dtype_to_np_dtype(call.attribute("to")))


def _axes(call: Call, axes: NDArray[Any] | None) -> tuple[int, ...]:
    told = call.attribute("axes") if axes is None else axes.reshape(-1).tolist()
    return tuple(told or ())


FOLDS: Mapping[str, Callable[..., Any]] = {
    "Identity": lambda _, x: x,
    "Cast": _cast,
    "Neg": lambda _, x: -x,
    "Add": lambda _, x, y: x + y,
    "Sub": lambda _, x, y: x - y,
    "Mul": lambda _, x, y: x * y,
    "Div": lambda _, x, y: x // y if x.dtype.kind in "iu" else x / y,
    "Pow": lambda _, x, y: np.power(x, y).astype(x.dtype),
    "Equal": lambda _, x, y: x == y,
    "Where": lambda _, c, x, y: np.where(c, x, y),
    "Max": lambda _, x, y: np.maximum(x, y),
    "Min": lambda _, x, y: np.minimum(x, y),
    "Concat": lambda call, *x: np.concatenate(x, axis=call.attribute("axis", 1)),
    "Gather": lambda call, x, i: np.take(x, i, axis=call.attribute("axis", 0)),
    "Unsqueeze": lambda call, x, axes=None: np.expand_dims(x, _axes(call, axes)),
    "Squeeze": lambda call, x, axes=None: np.squeeze(x, _axes(call, axes) or None),
    "Reshape": lambda call, x, shape=None: x.reshape(call.attribute("shape") or shape.tolist()),
    "ReduceProd": lambda _, x, *axes: np.prod(x).reshape((1,) * x.ndim),
    "ConstantOfShape": lambda call, shape: np.full(_small(shape), _fill(call)),
}
"""Operator to numpy's word for it; the first argument is the call."""


def _small(shape: NDArray[Any]) -> tuple[int, ...]:
    if math.prod(shape.tolist()) > SMALL:
        raise LookupError
    return tuple(shape.tolist())


def _fill(call: Call) -> Any:
    value = call.attribute("value")
    return np.float32(0) if value is None else numpy_helper.to_array(value).reshape(-1)[0]
