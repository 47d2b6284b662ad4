"""Run float16 and bfloat16 graphs on a CPU as they would run elsewhere: in float32, rounded after every operator.

onnxruntime's CPU has next to no kernels for 16-bit floats. It computes float16 graphs in float32 from end to end, so
that nothing overflows and no digit is lost, and refuses bfloat16 ones. A device adds up in float32 as well, but writes
every result in 16 bits; so does this.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from qexport.passes.match import Names

SHORT = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_F32 = ir.DataType.FLOAT
_TYPES = ("to", "dtype", "output_dtype")
_TENSORS = ("value",)
_KEEPS = frozenset(
    [
        *("Abs", "Concat", "Constant", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Neg", "Relu"),
        *("Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    ]
)
"""What only moves or selects numbers, which are rounded already."""


def computes_in(model: ir.Model, dtypes: tuple[ir.DataType, ...] = SHORT) -> bool:
    """Whether a node of the main graph makes values of one of ``dtypes``."""
    return any(value.dtype in dtypes for node in model.graph for value in node.outputs)


def emulate(model: ir.Model, dtypes: tuple[ir.DataType, ...] = SHORT) -> None:
    """Turn ``model``, in place, to float32, every value that was of 16 bits rounded to them; values keep their names.

    Types of inputs and outputs stay. A model that makes no values of ``dtypes``, or has control flow or functions,
    stays as it is.
    """
    if model.functions or any(node.graph is not model.graph for node in model.graph.all_nodes()):
        return
    if not computes_in(model, dtypes):
        return
    names = Names(model.graph)
    for value in model.graph.initializers.values():
        if not _looked_up(value):
            _widen_constant(value)
    for value in model.graph.inputs:
        if value.dtype in SHORT and not value.is_initializer():
            _replace_uses(value, _cast(model.graph, value, _F32, names, None))
    for node in list(model.graph):
        _widen_attributes(node)
        for value in node.outputs:
            if value.dtype in SHORT:
                _round(model.graph, node, value, names)


def widen(model: ir.Model) -> None:
    """Turn ``model``, in place, to float32 with the weights that it has, no result rounded; inputs are float32 too."""
    for graph in model.graphs():
        for value in (*graph.initializers.values(), *graph.inputs):
            _widen_constant(value)
            if value.dtype in SHORT:
                value.type = ir.TensorType(_F32)
    for node in model.graph.all_nodes():
        _widen_attributes(node)


def _looked_up(value: ir.Value) -> bool:
    """Whether a constant is only a table that rows are taken from: these are widened after, not all of it before."""
    users = value.uses()
    taken = (use.node.op_type == "Gather" and use.node.domain == "" and use.idx == 0 for use in users)
    return bool(users) and not value.is_graph_output() and all(taken)


def _widen_constant(value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is not None and tensor.dtype in SHORT:
        wide = partial(_widened, tensor)
        value.const_value = ir.LazyTensor(wide, _F32, ir.Shape(tensor.shape.numpy()), name=value.name)
        value.type = ir.TensorType(_F32)


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _widen_attributes(node: ir.Node) -> None:
    for name in _TYPES:
        if node.attributes.get_int(name, 0) in SHORT:
            node.attributes[name] = ir.AttrInt64(name, _F32)
    for name in _TENSORS:
        tensor = node.attributes.get_tensor(name, None)
        if tensor is not None and tensor.dtype in SHORT:
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(tensor.numpy().astype(np.float32)))


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value, names: Names) -> None:
    """Let ``node`` make float32, and everybody read it rounded under the old name."""
    short, name = value.dtype, value.name or ""
    assert short is not None
    if node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].dtype in SHORT:
        if not value.is_graph_output():
            value.name = names.fresh(f"{name}/rows")
            wide = _cast(graph, value, _F32, names, node)
            _replace_uses(value, wide)
            wide.name = name
        return
    value.type = ir.TensorType(_F32)
    if node.op_type in _KEEPS and not value.is_graph_output():
        return
    value.name = names.fresh(f"{name}/exact")
    narrow = _cast(graph, value, short, names, node)
    wide = _cast(graph, narrow, _F32, names, narrow.producer())
    for user, index in list(value.uses()):
        if user is not narrow.producer():
            user.replace_input_with(index, wide)
    if value.is_graph_output():
        narrow.name = name
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = narrow
    else:
        wide.name = name


def _cast(graph: ir.Graph, value: ir.Value, to: ir.DataType, names: Names, after: ir.Node | None) -> ir.Value:
    name = names.fresh(f"{value.name}/{to.name.lower()}")
    node = ir.node("Cast", [value], {"to": to}, name=names.fresh(f"{name}/Cast"))
    made = node.outputs[0]
    made.name, made.type, made.shape = name, ir.TensorType(to), value.shape
    if after is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(after, node)
    return made


def _replace_uses(old: ir.Value, new: ir.Value) -> None:
    for user, index in list(old.uses()):
        if user is not new.producer():
            user.replace_input_with(index, new)
