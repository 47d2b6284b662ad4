"""Keep integers between operators: DequantizeLinear, an operator and QuantizeLinear become one integer operator.

1. ``DQ -> Conv -> Q`` becomes QLinearConv, ``DQ, DQ -> MatMul -> Q`` QLinearMatMul; of onnxruntime's own operators
   (``contrib``), ``DQ, DQ -> Add -> Q`` becomes QLinearAdd and ``DQ, DQ -> Gemm -> Q`` QGemm.
2. A bias is stored as int32 at the scale of the sums it joins, ``s_x s_w`` of its channel.
3. What stands between the operator and its quantizer may be a Relu or Clip that the quantizer's own saturation stands
   for, which is dropped, or something that only moves or compares elements (MaxPool, Reshape, ...), which from then on
   works on the integers.

Where both ends of an operator are quantized, chains ``Q -> integers ... integers -> DQ`` arise. An output that is also
read in float stays as it is.

Equations: Jacob et al. 2018, section 2.2 and 2.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.match import Names, array, producer, sweep
from qexport.passes.target import find_target
from qexport.passes.writing.islands import CLIPS, CONTRIB, FORMS, Form, Island, Numbers, find_island


@dataclass(frozen=True)
class QLinear(Pass):
    """Merge operators with the quantizers around them, so that chains of them stay in integers."""

    exact: ClassVar[bool] = False

    target: str = "ort-cpu"
    contrib: bool = True
    """Whether onnxruntime's own operators stand in where ONNX has none."""

    def call(self, model: ir.Model) -> Outcome:
        """Rewrite the main graph; a target that reads no such operators is a ``UsageError``."""
        find_target(self.target).demand("qlinear", "step qlinear")
        done, refused = [], []
        editor, opset = _Editor(model.graph), model.opset_imports.get("", 1)
        for node in tuple(model.graph):
            if node.op_type == "QuantizeLinear" or not any(producer(v, "DequantizeLinear") for v in node.inputs):
                continue
            form = self._form(node)
            found = find_island(node, form, opset) if form is not None else "it has no integer form"
            if form is not None and isinstance(found, Island):
                editor.merge(found, form)
                done.append((node, form))
            else:
                refused.append(Decision(node.name or "", node.op_type, "skipped", str(found)))
        if any(form.domain == CONTRIB for _, form in done):
            model.opset_imports.setdefault(CONTRIB, 1)
        fused = (Decision(node.name or "", node.op_type, "fused", form.op) for node, form in done)
        return Outcome(model, bool(done), (*fused, *refused))

    def _form(self, node: ir.Node) -> Form | None:
        form = FORMS.get(node.op_type) if node.domain == "" else None
        return None if form is None or (form.domain == CONTRIB and not self.contrib) else form


class _Editor:
    """Edits one graph; keeps the constants that it has made, so that operators share them."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._names = Names(graph)
        self._made: dict[ir.Value, ir.Value] = {}

    def merge(self, island: Island, form: Form) -> None:
        """Put the integer form in the place of the operator, and let what is behind it work on integers."""
        node, quantizer = island.node, island.writes.node
        attributes = [attribute for attribute in node.attributes.values() if attribute.name not in form.drops]
        made = ir.Node(form.domain, form.op, self._inputs(island, form), attributes, num_outputs=1, name=node.name)
        self.graph.insert_after(node, made)
        last = self._integers(made.outputs[0], node.outputs[0], island.writes)
        for step in island.behind:
            if step.op_type not in CLIPS:
                step.replace_input_with(0, last)
                last = self._integers(step.outputs[0], step.outputs[0], island.writes)
        name = quantizer.outputs[0].name
        ir.convenience.replace_all_uses_with(quantizer.outputs[0], last, replace_graph_outputs=True)
        read = [*node.inputs, *quantizer.inputs[1:]]
        gone = [node, *(step for step in island.behind if step.op_type in CLIPS), quantizer]
        read += [value for step in gone for value in step.inputs[1:]]
        self.graph.remove(gone, safe=True)
        last.name = name
        sweep(read)

    def _inputs(self, island: Island, form: Form) -> list[ir.Value | None]:
        inputs: list[ir.Value | None] = []
        for read in island.reads:
            inputs += [read.integers, *self._scaling(read)]
        inputs += self._scaling(island.writes)
        if form.bias_at is not None:
            steps, name = island.bias_steps, f"{island.node.outputs[0].name}/bias"
            inputs.insert(form.bias_at, None if steps is None else self._initializer(name, steps.astype(np.int32)))
        return inputs

    def _scaling(self, numbers: Numbers) -> list[ir.Value]:
        """Scale, in float32, and zero point as initializers."""
        return [self._constant(value) for value in numbers.node.inputs[1:3] if value is not None]

    def _constant(self, value: ir.Value) -> ir.Value:
        numbers = array(value)
        if value.is_initializer() and value.dtype != ir.DataType.FLOAT16:
            return value
        if value not in self._made and numbers is not None:
            wide = numbers.astype(np.float32) if value.dtype == ir.DataType.FLOAT16 else numbers
            self._made[value] = self._initializer(f"{value.name}/float", wide)
        return self._made[value]

    def _initializer(self, name: str, numbers: NDArray[np.generic]) -> ir.Value:
        name = self._names.fresh(name)
        value = ir.Value(name=name, const_value=ir.tensor(numbers, name=name), shape=ir.Shape(numbers.shape))
        value.type = ir.TensorType(ir.DataType.from_numpy(numbers.dtype))
        self.graph.register_initializer(value)
        return value

    def _integers(self, value: ir.Value, like: ir.Value, numbers: Numbers) -> ir.Value:
        """Make ``value`` the integers of ``like``."""
        value.type = ir.TensorType(ir.DataType.from_numpy(numbers.zero.dtype))
        value.shape = None if like.shape is None else like.shape.copy()
        value.name = self._names.fresh(f"{like.name}/integers")
        return value
