"""What is admitted: a parsed model, the folder beside it, the limits, and every body of nodes in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from qexport.errors import ModelInvalid, ResourceExhausted

Graphlike = onnx.GraphProto | onnx.FunctionProto


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a model may ask for.

    Attributes:
        max_model_bytes: Size of the model file; protobuf itself ends at 2 GB.
        max_external_bytes: Sum over all tensors of the bytes they read from files; shared bytes count each time.
        max_value_bytes: Size of a single value, where constants of the model tell its shape.
        max_nodes: Nodes of the whole model when every function call is expanded.
        max_nesting: Depth of subgraphs in subgraphs, and of functions that call functions.
        min_opset: Oldest version of the default operator set.
        max_opset: Newest.
        min_ir: Oldest version of the file format.
        max_ir: Newest.
        domains: Operator domains outside the standard that are let through.
        allow_nonfinite: Whether weights may hold NaN and Inf.
    """

    max_model_bytes: int = 2**31 - 1
    max_external_bytes: int = 1 << 36
    max_value_bytes: int = 1 << 34
    max_nodes: int = 1_000_000
    max_nesting: int = 32
    min_opset: int = 7
    max_opset: int = field(default_factory=onnx.defs.onnx_opset_version)
    min_ir: int = 3
    max_ir: int = int(onnx.IR_VERSION)
    domains: frozenset[str] = frozenset({"com.microsoft"})
    allow_nonfinite: bool = False


@dataclass(frozen=True, slots=True)
class Body:
    """A list of nodes with names of its own: the graph, a subgraph, a function, a training graph.

    Attributes:
        proto: The graph or function.
        where: How messages call it.
        parent: Index of the body whose names it sees, if it is a subgraph.
        owner: Index in the parent of the node that holds it.
        depth: 0 outside of subgraphs.
        opsets: Operator set versions that hold in it, the default domain as ``""``.
        runs: Whether it is part of inference; training graphs are not.
    """

    proto: Graphlike
    where: str
    parent: int | None
    owner: int
    depth: int
    opsets: dict[str, int]
    runs: bool = True


@dataclass(frozen=True, slots=True)
class Subject:
    """A model under examination; ``bodies`` lists parents before their children."""

    model: onnx.ModelProto
    root: Path | None
    limits: Limits
    bodies: tuple[Body, ...]

    def running(self) -> Iterator[tuple[int, Body]]:
        """Bodies that inference runs, with their index."""
        return ((index, body) for index, body in enumerate(self.bodies) if body.runs)


def examine(model: onnx.ModelProto, root: Path | None, limits: Limits) -> Subject:
    """Find every body, without recursion.

    Raises:
        ModelInvalid: Subgraphs nest deeper than the limit.
        ResourceExhausted: There are more nodes than the limit.
    """
    bodies = _roots(model)
    nodes = 0
    for index, body in enumerate(bodies):  # grows while it runs
        nodes += len(body.proto.node)
        if nodes > limits.max_nodes:
            raise ResourceExhausted(f"more than {limits.max_nodes} nodes")
        for inner in _inner(index, body):
            if inner.depth > limits.max_nesting:
                raise ModelInvalid(f"subgraphs nest more than {limits.max_nesting} deep", where=inner.where)
            bodies.append(inner)
    return Subject(model, root, limits, tuple(bodies))


def _roots(model: onnx.ModelProto) -> list[Body]:
    opsets = versions(model.opset_import)
    bodies = [Body(model.graph, "graph", None, -1, 0, opsets)]
    for function in model.functions:
        where = f"function {quoted(function.name)}"
        bodies.append(Body(function, where, None, -1, 0, versions(function.opset_import)))
    for training in model.training_info:
        bodies.append(Body(training.initialization, "training initialization", None, -1, 0, opsets, runs=False))
        bodies.append(Body(training.algorithm, "training algorithm", None, -1, 0, opsets, runs=False))
    return bodies


def _inner(index: int, body: Body) -> Iterator[Body]:
    for owner, node in enumerate(body.proto.node):
        for attribute in node.attribute:
            for graph in graphs_in(attribute):
                where = f"{place(node)}, {attribute.name}"
                yield Body(graph, where, index, owner, body.depth + 1, body.opsets, body.runs)


def versions(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    """Domain to version, the default domain as ``""``."""
    return {standard(entry.domain): entry.version for entry in imports}


def standard(domain: str) -> str:
    """The default domain has two spellings; return the empty one for both."""
    return "" if domain == "ai.onnx" else domain


def graphs_in(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    """Subgraphs of an attribute, whatever type it claims to have."""
    return ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs)


def place(node: onnx.NodeProto) -> str:
    """How messages call a node: its name, or its first output when it has none."""
    outputs = [name for name in node.output if name]
    label = quoted(node.name) if node.name or not outputs else f"that writes {quoted(outputs[0])}"
    return f"node {label} ({node.op_type})"


def quoted(name: object, limit: int = 80) -> str:
    """``repr`` of a name, cut when it is very long."""
    text = repr(name)
    return text if len(text) <= limit else f"{text[:limit]}…{text[-1]}"
