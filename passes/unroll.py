"""Let a decoder read what it has just said: several tokens of a draft in one call.

A step of a small decoder takes as long in the caller as in the graph, and between two steps nothing happens but taking
the most likely token, or drawing one. So that goes into the graph, behind it the same decoder once more, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qexport.errors import UsageError
from qexport.passes import match
from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.caching.last_row import select
from qexport.passes.caching.pick import Picker
from qexport.passes.one_token import OneToken
from qexport.passes.portable import (
    IDS,
    LAST,
    LOGITS,
    MAX_POSITIONS,
    PAST,
    POSITIONS,
    WRITE,
    parse_positions,
    present_name,
    step_name,
)


@dataclass(frozen=True)
class Unroll(Pass):
    """Give a portable decoder the outputs of ``passes.portable`` for several steps.

    1. The first step reads ``input_ids`` as the decoder does. Of each row, what follows the token at ``last`` is chosen
       from the logits there; the head of the graph computes no others.
    2. Every further step is a copy for one token (``one_token``) that reads the token before, at the next position and
       column, and the caches as that step left them. Weights are shared, and so are inputs of whole sequences.
    3. Positions stay inside of what the model has: what a row makes behind its last one means nothing.

    A step's caches are outputs so that the caller can bind all of them to the buffers of the past: onnxruntime writes
    in place between an input and an output of one address, and copies a whole buffer where there is something else.
    """

    exact: ClassVar[bool] = False

    steps: int = 4
    """Tokens of a call."""
    drawn: bool = False
    """Whether tokens are drawn from the distribution, instead of the most likely being taken."""
    vocabulary: int | None = None
    """Tokens that can be chosen, the first ones; all by default."""

    def __post_init__(self) -> None:
        """Check the options."""
        for name, number in (("steps", self.steps), ("vocabulary", self.vocabulary)):
            if number is not None and number < 1:
                raise UsageError(f"{name} is {number!r}, expected a number above 0")

    def call(self, model: ir.Model) -> Outcome:
        """Unroll the main graph in place, or say why not."""
        graph = model.graph
        if any(value.name == LAST for value in graph.inputs):
            return Outcome(model, False)
        reason = refusal(graph)
        where = graph.name or ""
        if reason is not None:
            return Outcome(model, False, (Decision(where, "Graph", "skipped", reason),))
        body = model.clone()
        OneToken()(body)
        _Writer(model, self).write(body.graph)
        chosen = "tokens are drawn" if self.drawn else "the most likely tokens"
        return Outcome(model, True, (Decision(where, "Graph", "unrolled", chosen, f"{self.steps} steps"),))


def refusal(graph: ir.Graph) -> str | None:
    """Why a graph is no portable decoder, if it is none."""
    inputs, outputs = ({value.name: value for value in values} for values in (graph.inputs, graph.outputs))
    past = [name for name in inputs if name is not None and name.startswith(PAST)]
    wanted = [name for name in (IDS, POSITIONS, WRITE) if name not in inputs]
    wanted += [name for name in (LOGITS, *map(present_name, past)) if name not in outputs]
    if wanted or not past:
        return f"no decoder in the portable layout: {', '.join(wanted) or 'caches'} missing"
    others = set(outputs) - {LOGITS, *map(present_name, past)}
    if others:
        return f"output {min(map(str, others))} belongs to one step"
    if _vocabulary(outputs[LOGITS]) is None:
        return "the size of the vocabulary is not known"
    return next((reason for name in past if (reason := _unlike(inputs[name], outputs[present_name(name)]))), None)


def _vocabulary(logits: ir.Value) -> int | None:
    """How many tokens logits [batch, sequence, vocabulary] are for, if that is known."""
    sizes = match.dims(logits)
    size = sizes[2] if sizes is not None and len(sizes) == 3 else None
    return size if isinstance(size, int) else None


def _unlike(past: ir.Value, present: ir.Value) -> str | None:
    """Why a cache is not one that tokens are written into at ``write_indices``, if it is not."""
    node = match.producer(present, "TensorScatter")
    if node is None or node.inputs[0] is not past:
        return f"{past.name} is not written by TensorScatter"
    column, mode = (*node.inputs, None)[2], node.attributes.get_string("mode", "linear")
    if column is None or column.name != WRITE or mode != "linear":
        return f"{past.name} is not written at {WRITE}"
    readers = {user for user in past.consumers() if user is not node and user.op_type != "Shape"}
    return f"{past.name} is read before it is written" if readers else None


class _Writer:
    """Edits one model."""

    def __init__(self, model: ir.Model, options: Unroll) -> None:
        self.graph, self.steps = model.graph, options.steps
        self.ports = {str(value.name): value for value in model.graph.inputs}
        self.most = parse_positions(model.metadata_props.get(MAX_POSITIONS, ""))
        self.logits = next(value for value in model.graph.outputs if value.name == LOGITS)
        self.size = _vocabulary(self.logits) or 0
        self.picker = Picker(model.graph, options.steps, min(options.vocabulary or self.size, self.size), options.drawn)

    def write(self, body: ir.Graph) -> None:
        """Choose a token, and for every further step append a copy of ``body`` and choose another."""
        graph, picker, op = self.graph, self.picker, self.picker.op
        present = {str(value.name): value for value in graph.outputs if value is not self.logits}
        last = picker.port(LAST, ir.DataType.INT64, "batch")
        place = _before(graph[0], "Unsqueeze", [last, picker.constant("axes_1_2", [1, 2])])
        graph.outputs.clear()
        token = self._pick(select(self.logits, place))
        if self.steps > 1:
            position = op("GatherND", self.ports[POSITIONS], place, batch_dims=1)
            column, one = op("Add", self.ports[WRITE], last), picker.constant("one", [1])
        for step in range(1, self.steps):
            position, column = op("Add", position, one), op("Add", column, one)
            if self.most is not None:
                position = op("Min", position, picker.constant("last_position", [self.most - 1]))
            given = {IDS: token, POSITIONS: position, WRITE: column}
            given |= {name: present[present_name(name)] for name in self.ports if name.startswith(PAST)}
            for name, value in present.items():
                value.name = step_name(step, name)
            graph.outputs.extend(present.values())
            present = self._copy(body, given, f"step.{step + 1}/")
            token = self._pick(present.pop(LOGITS))
        graph.outputs[:0] = [*picker.results(), *present.values()]

    def _pick(self, logits: ir.Value) -> ir.Value:
        picker = self.picker
        if picker.size < self.size:
            bounds = [picker.constant(name, [size]) for name, size in (("first", 0), ("end", picker.size), ("axis", 2))]
            logits = picker.op("Slice", logits, *bounds)
        return picker.pick(logits)

    def _copy(self, body: ir.Graph, given: Mapping[str, ir.Value], scope: str) -> dict[str, ir.Value]:
        """Append a copy that reads ``given`` instead of inputs, and the others as they are; its outputs by name."""
        copy, initializers = body.clone(), self.graph.initializers
        made = {str(value.name): value for value in copy.outputs}
        copy.outputs.clear()
        for value in copy.inputs:
            _hand_over(value, given.get(str(value.name)), self.ports[str(value.name)])
        for name, value in tuple(copy.initializers.items()):
            kept = copy.initializers.pop(name)
            if name not in initializers:
                initializers[name] = kept
            ir.convenience.replace_all_uses_with(value, initializers[name])
        nodes = list(copy)
        copy.remove(nodes)
        for node in nodes:
            node.name = f"{scope}{node.name}"
            for value in node.outputs:
                value.name = value.name if value.name in made else f"{scope}{value.name}"
        self.graph.extend(nodes)
        made[LOGITS].name = f"{scope}{LOGITS}"
        return made


def _hand_over(value: ir.Value, new: ir.Value | None, port: ir.Value) -> None:
    """Let the readers of an input read ``new``, or the input of the whole graph.

    Who asks for the shape of a cache asks the input: no step changes it, and so it is found once.
    """
    for node, index in tuple(value.uses()):
        shared = new is None or (node.op_type == "Shape" and port.name is not None and port.name.startswith(PAST))
        node.replace_input_with(index, port if shared else new)


def _before(node: ir.Node, op: str, inputs: list[ir.Value]) -> ir.Value:
    """The result of a new node in front of another one."""
    new = ir.node(op, inputs)
    assert node.graph is not None
    node.graph.insert_before(node, new)
    return new.outputs[0]
