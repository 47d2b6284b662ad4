"""A graph as torch's exporter leaves it, brought to the conventions of this project; needs no torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from qexport.errors import BuildFailed
from qexport.exporter.doors.inputs import AskedInput

_SCOPES = "pkg.torch.onnx.name_scopes"
_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_IR_VERSIONS = {21: 10, 22: 10, 23: 11, 24: 11}
"""IR version that came with a version of the operators."""


def tidy(model: ir.Model, inputs: Sequence[AskedInput], outputs: Sequence[str], root: str) -> ir.Model:
    """Give everything its name, and drop what tells of the machine.

    1. Inputs and outputs have the names asked for, free dimensions theirs, in expressions (``2*batch``) as well.
    2. Every output is a value of its own: no input, no weight, no other output.
    3. Weights are arrays, have the module's names without ``root``, and those that share memory are one.
    4. No two values or nodes share a name; nodes are called by their place in the module.
    5. No stack traces, doc strings or other notes.

    Args:
        model: The graph; it is changed.
        inputs: Its inputs, in order.
        outputs: Names of its outputs, in order.
        root: What stands before the name of every weight and place.

    Raises:
        BuildFailed: It has other inputs or outputs than these.
    """
    RemoveUnusedNodesPass()(model)
    graph = model.graph
    for kind, found, wanted in (("inputs", graph.inputs, inputs), ("outputs", graph.outputs, outputs)):
        if len(found) != len(wanted):
            raise BuildFailed(f"torch made a graph of {len(found)} {kind} of a module with {len(wanted)}")
    _separate_outputs(graph)
    _own_weights(graph, root)
    _name_nodes(graph, root)
    _rename_dims(graph, inputs)
    _name_values(graph, [one.name for one in inputs], outputs)
    _strip(model)
    NameFixPass()(model)
    model.ir_version = max(model.ir_version, _IR_VERSIONS.get(model.opset_imports.get("", 0), 10))
    return model


def _separate_outputs(graph: ir.Graph) -> None:
    """Put an Identity before every output that is an input, a weight, or an output already."""
    seen: set[ir.Value] = set()
    for place, value in enumerate(graph.outputs):
        if value in seen or value.is_graph_input() or value.is_initializer():
            node = ir.node("Identity", [value])
            copy = node.outputs[0]
            copy.type, copy.shape = value.type, value.shape
            if copy.type is None and value.const_value is not None:
                copy.dtype, copy.shape = value.const_value.dtype, ir.Shape(value.const_value.shape.numpy())
            graph.append(node)
            graph.outputs[place] = copy
        seen.add(value)


def _own_weights(graph: ir.Graph, root: str) -> None:
    """Turn torch's tensors into arrays, and weights with the same memory into one."""
    first: dict[tuple[object, ...], ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            continue
        array = np.asarray(tensor.numpy())
        key = (array.__array_interface__["data"][0], array.shape, array.strides, tensor.dtype)
        if array.size and (same := first.setdefault(key, value)) is not value:
            value.replace_all_uses_with(same)
            del graph.initializers[str(value.name)]
            continue
        value.const_value = ir.Tensor(array, dtype=tensor.dtype, shape=ir.Shape(array.shape), name=value.name)
        name = str(value.name).removeprefix(root)
        value.name = name if name not in graph.initializers else value.name


def _name_nodes(graph: ir.Graph, root: str) -> None:
    """Call nodes by their place, ``layer1.0.conv1/Conv``, as torch noted it."""
    for node in graph.all_nodes():
        scopes = _scopes(node.metadata_props.get(_SCOPES, ""))
        place = next((scope for scope in reversed(scopes[:-1]) if scope.startswith(root)), "")
        node.name = f"{place.removeprefix(root)}/{node.op_type}".removeprefix("/")


def _scopes(text: str) -> list[str]:
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return [str(scope) for scope in found] if isinstance(found, list) else []


# ---------------------------------------------------------------- names


def _name_values(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name inputs and outputs; what had such a name before gives it up."""
    ends = [*graph.inputs, *graph.outputs]
    wanted = [*inputs, *outputs]
    taken = set(wanted)
    others = [value for value in _values(graph) if value not in set(ends)]
    names = {value.name for value in others}
    for value in others:
        if value.name in taken:
            value.name = _fresh(value.name, names | taken)
            names.add(value.name)
    for number, value in enumerate(ends):  # first out of each other's way
        value.name = _fresh(f"end_{number}", names | taken)
    for value, name in zip(ends, wanted, strict=True):
        value.name = name


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs


def _fresh(name: str | None, taken: set[str | None]) -> str:
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"


def _rename_dims(graph: ir.Graph, inputs: Sequence[AskedInput]) -> None:
    """Replace torch's symbols by the names asked for."""
    names = {
        str(found): dim
        for value, one in zip(graph.inputs, inputs, strict=True)
        for found, dim in zip(value.shape or (), one.shape, strict=True)
        if isinstance(dim, str)
    }
    taken = set(names.values())
    for value in set(_values(graph)):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names, taken) for dim in value.shape])
    for value, one in zip(graph.inputs, inputs, strict=True):
        value.shape = ir.Shape(one.shape)


def _renamed(dim: int | ir.SymbolicDim, names: Mapping[str, str], taken: set[str]) -> int | str | None:
    """A dimension with its symbols renamed; symbols nobody asked for keep their names unless somebody took them."""
    if isinstance(dim, int):
        return dim
    if dim.value is None:
        return None
    if str(dim.value).isdigit():
        return int(str(dim.value))

    def new(match: re.Match[str]) -> str:
        return names.get(match[0]) or (f"{match[0]}_" if match[0] in taken else match[0])

    return _SYMBOL.sub(new, str(dim.value))


# ---------------------------------------------------------------- notes


def _strip(model: ir.Model) -> None:
    """Leave no metadata and no doc strings: torch writes stack traces and paths there."""
    graph = model.graph
    model.doc_string = graph.doc_string = None
    graph.name = "torch"
    holders: list[ir.Model | ir.Graph | ir.Node | ir.Value] = [model, graph, *graph.all_nodes(), *_values(graph)]
    for holder in holders:
        holder.metadata_props.clear()
        holder.meta.clear()
        holder.doc_string = None
    for value in graph.initializers.values():
        if value.const_value is not None:
            value.const_value.metadata_props.clear()
