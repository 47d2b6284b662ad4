"""Reverse-mode differentiation on the graph: a model that computes gradients of its own outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from qexport.calibration.gradients.layouts import split
from qexport.calibration.gradients.rules import RULES, STOPS
from qexport.calibration.gradients.tape import FLOATS, Tape, Value, refuse
from qexport.errors import UsageError

OPSET = 17  # sizes and axes are inputs from here on, or can be told as attributes as before

Grads = dict[Value, list[Value]]


def cotangent(output: str) -> str:
    """Name of the input that takes the weights ``u`` of an output."""
    return f"qexport.cotangent/{output}"


def gradient(name: str) -> str:
    """Name of the output that gives the gradient of a value."""
    return f"qexport.gradient/{name}"


def differentiate(model: ir.Model, wrt: Sequence[str], outputs: Sequence[str] | None = None) -> ir.Model:
    """A copy of ``model`` that computes the gradient of ``sum(output * u)``, summed over ``outputs``, as well.

    Nodes are added in reverse order, one rule per operator (vector-Jacobian products; Griewank and Walther 2008,
    "Evaluating Derivatives", chapter 3). Sizes may be symbolic, and so may those that broadcasting repeats.

    Args:
        model: It is not changed.
        wrt: Names of initializers, inputs or inner values; the gradient of each has its shape and type, and is the
            output called ``gradient(name)``. An inner value is taken for independent of what it is computed from.
        outputs: Names of float outputs, all of them by default. Each brings an input called ``cotangent(output)``.

    Raises:
        UsageError: No value has such a name, or it is no float; an operator between has no rule; the opset is too old.
    """
    opset = model.opset_imports.get("", 1)
    if opset < OPSET:
        hint = "place raise-opset before"
        raise UsageError(f"gradients need opset {OPSET}, the model has {opset}", where="graph", hint=hint)
    work = model.clone()
    ShapeInferencePass(check_type=False, strict_mode=False)(work)
    graph = work.graph
    sources, chosen = _named(graph, wrt), _outputs(graph, outputs)
    makers = tuple(graph)
    tape = Tape(graph, opset)
    grads: Grads = {}
    for value in chosen:
        u = ir.val(cotangent(value.name or ""), value.dtype, value.shape)
        graph.inputs.append(u)
        grads.setdefault(value, []).append(u)
    active = _reached(makers, sources)
    for node in reversed(makers):
        _pull(tape, node, grads, active)
    for name, value in zip(dict.fromkeys(wrt), sources, strict=True):
        found = _total(tape, grads, value) or tape.zeros(tape.shape(value), value)
        result = tape.op("Identity", found)
        result.name, result.shape = gradient(name), value.shape
        result.type = value.type
        graph.outputs.append(result)
    RemoveUnusedNodesPass()(work)
    return work


def _named(graph: ir.Graph, wrt: Iterable[str]) -> list[Value]:
    known = {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    known.update({value.name: value for node in graph for value in node.outputs})
    found = []
    for name in dict.fromkeys(wrt):
        if name not in known:
            hint = "give the name of an initializer, of an input or of what a node of the main graph makes"
            raise UsageError(f"no value is called {name!r}", where="wrt", hint=hint)
        if known[name].dtype not in (*FLOATS, None):
            raise UsageError(f"value {name!r} has no gradient, it is no float", where="wrt", hint="leave it out")
        found.append(known[name])
    return found


def _outputs(graph: ir.Graph, names: Sequence[str] | None) -> list[Value]:
    floats = {value.name: value for value in graph.outputs if value.dtype in FLOATS}
    wanted = list(floats) if names is None else list(dict.fromkeys(names))
    missing = [name for name in wanted if name not in floats]
    if missing or not wanted:
        what = f"the model has no float output called {missing[0]!r}" if missing else "the model has no float output"
        raise UsageError(what, where="outputs", hint=f"it has {sorted(map(str, floats))}" if floats else None)
    return [floats[name] for name in wanted]


def _reached(makers: Sequence[ir.Node], sources: Iterable[Value]) -> set[Value]:
    """Float values that change with ``sources``."""
    found = set(sources)
    for node in makers:
        if (node.domain == "" and node.op_type in STOPS) or found.isdisjoint(_reads(node)):
            continue
        if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
            raise refuse(node, "integers have none", "place the step before the weights are quantized")
        found.update(value for value in node.outputs if value.dtype in (*FLOATS, None))
    return found


def _reads(node: ir.Node) -> Iterable[Value | None]:
    """What a node reads, its subgraphs included."""
    yield from node.inputs
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                yield from inner.inputs


def _total(tape: Tape, grads: Grads, value: Value) -> Value | None:
    """The sum of all that came back to a value; it is one value afterwards."""
    parts = grads.get(value, [])
    while len(parts) > 1:
        parts.append(tape.add(parts.pop(0), parts.pop(0)))
    return parts[0] if parts else None


def _pull(tape: Tape, node: ir.Node, grads: Grads, active: set[Value]) -> None:
    """Take the gradients of what a node makes to what it reads."""
    if active.isdisjoint(node.outputs) or active.isdisjoint(_reads(node)):
        return
    if not any(value in grads for value in node.outputs):
        return
    if node.domain != "" or (node.op_type not in RULES and node.op_type != "Split"):
        raise refuse(node, "nothing is known of its slope")
    above = [_total(tape, grads, value) for value in node.outputs]
    if node.op_type == "Split":
        found = split(tape, node, above)
    elif above[0] is None or any(part is not None for part in above[1:]):
        raise refuse(node, "its further outputs are read")
    else:
        found = RULES[node.op_type](tape, node, above[0])
    for index, value in enumerate(node.inputs):
        if value is None or value not in active:
            continue
        part = found[index] if index < len(found) else None
        if part is None:
            raise refuse(node, f"its input {index} is a parameter that must not depend on what is differentiated")
        grads.setdefault(value, []).append(part)
