"""Names and order: every value has one writer, every reader a writer, and nothing depends on itself."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import onnx
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]  # protobuf ships no types
from google.protobuf.message import Message  # type: ignore[import-untyped]  # the same

from qexport.errors import ModelInvalid
from qexport.exporter.admit.subject import Body, Subject, place, quoted
from qexport.exporter.admit.tensors import FORMATS, MOST_DIMS

_INPUT, _INITIALIZER = -1, -2

Needs = list[list[int]]  # of each node, the nodes it waits for


def check_text(subject: Subject) -> None:
    """Text is UTF-8, wherever it is; protobuf hands anything else over as bytes."""
    for text in _texts(subject.model):
        if not isinstance(text, str):
            raise ModelInvalid(f"the text {quoted(text)} is not UTF-8")


def _texts(model: onnx.ModelProto) -> Iterator[object]:
    """Every text of the message and of those inside, without recursion."""
    messages: list[Message] = [model]
    while messages:
        for field, value in messages.pop().ListFields():
            if field.type == FieldDescriptor.TYPE_STRING:
                yield from (value,) if isinstance(value, str | bytes) else value
            elif field.type == FieldDescriptor.TYPE_MESSAGE:
                messages.extend((value,) if isinstance(value, Message) else value)


def check_interface(subject: Subject) -> None:
    """There is a graph with outputs, its inputs say their type, and no value has more dimensions than arrays have."""
    graph = subject.model.graph
    if not subject.model.HasField("graph"):
        raise ModelInvalid("the model has no graph", hint="the file is truncated or not an ONNX model")
    if not graph.output:
        raise ModelInvalid("the graph has no outputs", hint="the file is truncated or the export went wrong")
    for value in graph.input:
        if not value.type.WhichOneof("value"):
            raise ModelInvalid(f"input {quoted(value.name)} has no type", where="graph")
        kind = _data_type(value.type)
        if kind not in FORMATS:
            raise ModelInvalid(f"input {quoted(value.name)} has the unknown data type {kind}", where="graph")
    for value in (*graph.input, *graph.output, *graph.value_info):
        rank = len(value.type.tensor_type.shape.dim)
        if rank > MOST_DIMS:
            raise ModelInvalid(f"{quoted(value.name)} has {rank} dimensions, {MOST_DIMS} are the most", where="graph")


def _data_type(kind: onnx.TypeProto) -> int:
    """The data type of a tensor, or of the tensors in a sequence, an optional or a map; 0 where it is not told."""
    inner = {"sequence_type": "elem_type", "optional_type": "elem_type", "map_type": "value_type"}
    while (name := kind.WhichOneof("value")) in inner:
        kind = getattr(getattr(kind, name), inner[name])
    return int(getattr(kind, name).elem_type) if name in ("tensor_type", "sparse_tensor_type") else 0


def check_writers(subject: Subject) -> None:
    """Single static assignment, also against the names a subgraph sees; duplicates raise ``ModelInvalid``."""
    written: dict[int, dict[str, int]] = {}
    for index, body in subject.running():
        names = written[index] = _writers(body)
        parent = body.parent
        while parent is not None:
            shadowed = next((name for name in names if name in written[parent]), None)
            if shadowed is not None:
                outer = subject.bodies[parent].where
                what = (
                    f"value {quoted(shadowed)} is written again inside a subgraph, it is already a name of the {outer}"
                )
                raise ModelInvalid(what, where=body.where)
            parent = subject.bodies[parent].parent
        _check_outputs(body, names)


def _writers(body: Body) -> dict[str, int]:
    """Name to the index of the node that writes it, or what else defines it."""
    names: dict[str, int] = {}
    for name in _input_names(body):
        _define(body, names, name, _INPUT)
    inputs = frozenset(names)
    initializers = _initializer_names(body)
    _refuse_twice(initializers, "initializer", body)
    for name in initializers:
        if name not in inputs:  # an initializer may be the default of an input
            _define(body, names, name, _INITIALIZER)
    for index, node in enumerate(body.proto.node):
        for name in node.output:
            if name:
                _define(body, names, name, index)
    return names


def _input_names(body: Body) -> list[str]:
    if isinstance(body.proto, onnx.GraphProto):
        return [value.name for value in body.proto.input]
    return list(body.proto.input)


def _output_names(body: Body) -> list[str]:
    if isinstance(body.proto, onnx.GraphProto):
        return [value.name for value in body.proto.output]
    return list(body.proto.output)


def _initializer_names(body: Body) -> list[str]:
    if isinstance(body.proto, onnx.FunctionProto):
        return []
    dense = [tensor.name for tensor in body.proto.initializer]
    return dense + [sparse.values.name for sparse in body.proto.sparse_initializer]


def _define(body: Body, names: dict[str, int], name: str, writer: int) -> None:
    if not name:
        raise ModelInvalid("an input or initializer has no name", where=body.where)
    if name not in names:
        names[name] = writer
        return
    first, second = (_writer(body, index) for index in (names[name], writer))
    raise ModelInvalid(
        f"value {quoted(name)} is written twice: by {first} and by {second}", where=body.where, hint=_advice(body, name)
    )


def _writer(body: Body, index: int) -> str:
    return {_INPUT: "an input", _INITIALIZER: "an initializer"}.get(index) or place(body.proto.node[index])


def _advice(body: Body, name: str) -> str:
    if name in _output_names(body):
        return (
            "an output of the export has the name of a value inside the model: "
            "rename the output in the export, e.g. output_names=['result']"
        )
    return "export the model again; every value has exactly one writer"


def _refuse_twice(names: Sequence[str], kind: str, body: Body) -> None:
    if len(set(names)) != len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]  # add returns None, which is the point
        raise ModelInvalid(f"{kind} {quoted(twice)} is there twice", where=body.where)


def _check_outputs(body: Body, names: dict[str, int]) -> None:
    outputs = _output_names(body)
    _refuse_twice(outputs, "output", body)
    for name in outputs:
        if name not in names:
            hint = "put an Identity node into the subgraph" if body.parent is not None else None
            raise ModelInvalid(f"output {quoted(name)} is not written by any of its nodes", where=body.where, hint=hint)


def check_readers(subject: Subject) -> None:
    """Everything that is read is defined, and no node waits for itself; raise ``ModelInvalid``."""
    for index, needs in dependencies(subject).items():
        cycle = find_cycle(needs)
        if cycle:
            body = subject.bodies[index]
            names = " -> ".join(place(body.proto.node[node]) for node in cycle[:6])
            raise ModelInvalid(f"the nodes form a cycle: {names}", where=body.where)


def dependencies(subject: Subject) -> dict[int, Needs]:
    """Of every running body, which nodes each node waits for, names used inside its subgraphs included."""
    found: dict[int, Needs] = {}
    captured: dict[int, dict[int, dict[str, str]]] = {}  # body -> node -> outer name -> who reads it
    for index, body in reversed(list(subject.running())):
        found[index], outer = _needs(body, captured.get(index, {}))
        if body.parent is not None:
            captured.setdefault(body.parent, {}).setdefault(body.owner, {}).update(outer)
        elif outer:
            name, reader = next(iter(outer.items()))
            raise ModelInvalid(f"{reader} reads {quoted(name)}, which nothing writes", where=body.where)
    return found


def _needs(body: Body, captured: dict[int, dict[str, str]]) -> tuple[Needs, dict[str, str]]:
    names = _writers(body)
    outer: dict[str, str] = {}
    needs: Needs = []
    for index, node in enumerate(body.proto.node):
        waits: set[int] = set()
        for name in (*node.input, *captured.get(index, ())):
            if not name:
                continue
            writer = names.get(name)
            if writer is None:
                outer.setdefault(name, captured.get(index, {}).get(name) or place(node))
            elif writer >= 0:
                waits.add(writer)
        needs.append(sorted(waits))
    return needs, outer


def topological(needs: Needs) -> tuple[list[int], list[int]]:
    """Sort by need, keeping the given order wherever it is right; return the order and what cannot be sorted."""
    users: list[list[int]] = [[] for _ in needs]
    waiting = [len(node) for node in needs]
    for index, node in enumerate(needs):
        for other in node:
            users[other].append(index)
    ready = [index for index, count in enumerate(waiting) if count == 0]
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for user in users[index]:
            waiting[user] -= 1
            if waiting[user] == 0:
                heapq.heappush(ready, user)
    return order, [index for index, count in enumerate(waiting) if count]


def find_cycle(needs: Needs) -> list[int]:
    """One cycle in the order of the data, its first node again at the end; empty when there is none."""
    left = set(topological(needs)[1])
    if not left:
        return []
    node = min(left)
    path: dict[int, None] = {}
    while node not in path:
        path[node] = None
        node = next(other for other in needs[node] if other in left)
    walked = list(path)
    return [node, *reversed(walked[walked.index(node) :])]
