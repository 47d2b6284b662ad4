"""Run a model of any size in the memory of a few layers: segment by segment, all calls through one before the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from qexport.calibration.running.emulate import SHORT, emulate, widen
from qexport.exporter.onnx_file import release_pages
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.session import SessionOptions

BUDGET = 192 << 20
"""Bytes of weights that are in memory at a time, unless a single one has more."""

Feeds: TypeAlias = Mapping[str, NDArray[Any]]
Outputs: TypeAlias = dict[str, NDArray[Any]]

_SHARED_FROM = 4096  # bytes; smaller tensors travel inside of a segment
_SHAREABLE = {ir.DataType.FLOAT, *SHORT}
_WHOLE = 1 << 62


@dataclass(slots=True)
class _Segment:
    """Nodes that run together.

    Attributes:
        nodes: In order.
        weights: The initializers that they read, by name.
        inputs: Names of what else they read, in the order of their first use.
        outputs: Names of what somebody behind them reads.
        bytes: Size of the weights.
    """

    nodes: list[ir.Node] = field(default_factory=list)
    weights: dict[str, ir.Value] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    bytes: int = 0


def run_streamed(
    model: ir.Model,
    calls: Sequence[Feeds],
    carried: Mapping[str, str] | None = None,
    *,
    budget: int = BUDGET,
    rounded: bool = True,
) -> list[Outputs]:
    """Run all ``calls`` in order; the graph runs as it is written, not optimized.

    Types of 16 bits are emulated in float32, and leave as float32.

    Args:
        model: The model; its weights are best mapped from a file. It is not changed.
        calls: Inputs of each call. A call that leaves out an input that is carried goes on where the one before ended.
        carried: Input name to the output of the call before that it takes its value from. Such an output is not
            among those returned.
        budget: Most bytes of weights to hold at a time.
        rounded: Whether every result of 16 bits is rounded to them.

    Returns:
        Of each call the outputs by name.

    Raises:
        BuildFailed: onnxruntime refuses the model or a call.
    """
    kept = dict(carried or {})
    work = _in_float32(model, rounded=rounded)
    segments = _cut(work, kept, budget)
    wanted = [name for value in work.graph.outputs if (name := value.name or "") not in kept.values()]
    values: list[Outputs] = [{name: _without_short(array) for name, array in call.items()} for call in calls]
    for place, segment in enumerate(segments):
        later = {name for other in segments[place + 1 :] for name in other.inputs} | set(wanted)
        _run(work, segment, values, kept)
        for call in values:
            for name in call.keys() - later - kept.keys():
                del call[name]
        release_pages(model)
    return [{name: call[name] for name in wanted} for call in values]


def _run(model: ir.Model, segment: _Segment, values: list[Outputs], carried: Mapping[str, str]) -> None:
    """Take every call through one segment; ``values`` holds what each knows so far."""
    started = {name: array for call in reversed(values) for name, array in call.items()}
    session = _open(model, segment, started)
    state: Outputs = {}
    for call in values:
        state.update((name, call[name]) for name in carried if name in call)
        found = session.run({name: call[name] if name in call else state[name] for name in segment.inputs})
        state.update((past, found[present]) for past, present in carried.items() if present in found)
        call.update(found)


# ---------------------------------------------------------------- cutting


def _cut(model: ir.Model, carried: Mapping[str, str], budget: int) -> list[_Segment]:
    """Segments in order, each with at most ``budget`` bytes of weights or a single node.

    A model with control flow or functions, or in which a cache is read away from where it is written, is one segment.
    """
    plain = not model.functions and all(node.graph is model.graph for node in model.graph.all_nodes())
    segments = list(_segments(model.graph, budget if plain else _WHOLE))
    if not all(_together(model.graph, segments, past, present) for past, present in carried.items()):
        segments = list(_segments(model.graph, _WHOLE))
    if not plain:
        segments[0].weights.update(model.graph.initializers)
    _connect(model.graph, segments)
    return segments


def _segments(graph: ir.Graph, budget: int) -> Iterator[_Segment]:
    segment = _Segment()
    for node in graph:
        read = {v.name or "": v for v in node.inputs if v is not None and v.is_initializer()}
        more = sum(_bytes(value) for name, value in read.items() if name not in segment.weights)
        if segment.nodes and segment.bytes + more > budget:
            yield segment
            segment, more = _Segment(), sum(map(_bytes, read.values()))
        segment.nodes.append(node)
        segment.weights.update(read)
        segment.bytes += more
    yield segment


def _bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes


def _together(graph: ir.Graph, segments: list[_Segment], past: str, present: str) -> bool:
    """Whether everything that reads a cache is in the segment that writes it; its shape may be read anywhere."""
    value = next((value for value in graph.inputs if value.name == past), None)
    readers = [use.node for use in value.uses() if use.node.op_type != "Shape"] if value is not None else []
    writers = [s for s in segments if any(v.name == present for node in s.nodes for v in node.outputs)]
    return len(writers) == 1 and all(node in writers[0].nodes for node in readers)


def _connect(graph: ir.Graph, segments: list[_Segment]) -> None:
    """Fill in what goes from segment to segment."""
    ends = [value.name or "" for value in graph.outputs]
    for place, segment in enumerate(segments):
        made = {value.name or "": None for node in segment.nodes for value in node.outputs if value.name}
        read = {v.name or "": None for node in segment.nodes for v in _read(node) if not v.is_initializer()}
        segment.inputs = [name for name in read if name not in made]
        behind = {v.name for other in segments[place + 1 :] for node in other.nodes for v in _read(node)}
        segment.outputs = [name for name in made if name in behind or name in ends]
    for value in graph.outputs:
        if value.is_initializer():
            segments[-1].weights[value.name or ""] = value
            segments[-1].outputs.append(value.name or "")


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads from outside, the bodies in its attributes included."""
    yield from (value for value in node.inputs if value is not None)
    for body in _bodies(node):
        inner = {*body.inputs, *(value for each in body for value in each.outputs)}
        yield from (value for each in body for value in _read(each) if value not in inner)
        yield from (value for value in body.outputs if value not in inner)


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


# ---------------------------------------------------------------- running


def _open(model: ir.Model, segment: _Segment, known: Feeds) -> OrtSession:
    """A session over one segment; large weights are handed over where they lie."""
    graph, shared = onnx.GraphProto(name="segment"), {}
    for name, value in segment.weights.items():
        tensor = value.const_value
        if tensor is None:
            continue
        if tensor.nbytes >= _SHARED_FROM and tensor.dtype in _SHAREABLE:
            shared[name] = np.ascontiguousarray(tensor.numpy())
            info = graph.input.add(name=name)
            info.type.tensor_type.elem_type = tensor.dtype
            info.type.tensor_type.shape.dim.extend(
                onnx.TensorShapeProto.Dimension(dim_value=size) for size in tensor.shape.numpy()
            )
            continue
        held = ir.to_proto(tensor)
        held.name = name
        graph.initializer.append(held)
    graph.node.extend(ir.to_proto(node) for node in segment.nodes)
    for name in segment.inputs:
        info = graph.input.add(name=name)
        info.type.tensor_type.elem_type = ir.DataType.from_numpy(known[name].dtype)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in segment.outputs)
    proto = onnx.ModelProto(ir_version=model.ir_version, graph=graph)
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    proto.functions.extend(ir.to_proto(function) for function in model.functions.values())
    options = SessionOptions(threads=0, spin=False, optimize=False, lean=True)
    return OrtSession(proto.SerializeToString(), options, shared)


def _in_float32(model: ir.Model, *, rounded: bool) -> ir.Model:
    """The model itself, or a copy that does in float32 what was to be done in 16 bits."""
    held = (*model.graph.inputs, *model.graph.initializers.values())
    if not any(value.dtype in SHORT for value in held):
        return model
    work = model.clone()
    if not rounded:
        widen(work)
        return work
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(work)
    emulate(work, SHORT)
    for value in work.graph.inputs:
        if value.dtype in SHORT:
            _take_float32(work.graph, value)
    for value in list(work.graph.outputs):
        if value.dtype in SHORT:
            _widen(work.graph, value)
    return work


def _without_short(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float32) if ir.DataType.from_numpy(array.dtype) in SHORT else array


def _take_float32(graph: ir.Graph, value: ir.Value) -> None:
    """Let an input of 16 bits be float32, and its readers read it without a cast."""
    value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in [node for node in value.consumers() if node.op_type == "Cast"]:
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)


def _widen(graph: ir.Graph, value: ir.Value) -> None:
    """Give an output of 16 bits as float32, under its name."""
    node, name = value.producer(), value.name
    if node is None:
        return
    value.name = f"{name}/short"
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
    cast.outputs[0].name, cast.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
    graph.insert_after(node, cast)
    graph.outputs[graph.outputs.index(value)] = cast.outputs[0]
