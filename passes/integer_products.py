"""Multiply integers, scale the sums and add the bias in one operator.

1. ``DequantizeLinear, DequantizeLinear -> MatMul -> Add`` becomes onnxruntime's MatMulIntegerToFloat, which reads the
   integers of both and the bias as they are stored.
2. So does ``Gemm``; its weight is stored transposed where the node asks for that, ``alpha`` goes into the scales and
   ``beta`` into the bias.

onnxruntime finds the first half of 1 itself when it loads a model, but adds the bias in a pass of its own over the
whole output, and leaves a Gemm with a float bias in float (1.31). The equation is the same, but ``(q_x - z) q_w`` is
summed in int32 and multiplied with ``s_x s_w`` once, where floats were rounded at every term. A sum that differs in its
last bit may end up on the other side of a step of the next quantizer, so numbers change behind that one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.base import Decision, Outcome, Pass
from qexport.passes.match import add_constant, array, consumer, dims, maker, operands, producer, replace
from qexport.passes.target import find_target
from qexport.passes.writing.islands import CONTRIB

OP = "MatMulIntegerToFloat"
Float = NDArray[np.float32]


@dataclass(frozen=True)
class Product:
    """A product between quantizers, as it is matched.

    Attributes:
        node: The MatMul or Gemm.
        activation: The node that dequantizes its first input.
        weight: The node that dequantizes its second one.
        output: The last value: its own, or that of the Add behind it.
        bias: What is added, ``[N]`` before ``beta``; ``None`` where nothing is.
    """

    node: ir.Node
    activation: ir.Node
    weight: ir.Node
    output: ir.Value
    bias: ir.Value | None


@dataclass(frozen=True)
class IntegerProducts(Pass):
    """Merge quantized products and their biases into onnxruntime's operator for both."""

    exact: ClassVar[bool] = False

    target: str = "ort-cpu"

    def call(self, model: ir.Model) -> Outcome:
        """Rewrite the main graph, which is the one that gets quantized, for targets that read the operator."""
        if not find_target(self.target).integer_products:
            return Outcome(model, False)
        decisions = [_merge(found) for node in tuple(model.graph) if (found := _find(node)) is not None]
        changed = any(d.action == "fused" for d in decisions)
        if changed:
            model.opset_imports.setdefault(CONTRIB, 1)
        return Outcome(model, changed, tuple(decisions))


def _find(node: ir.Node) -> Product | None:
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
        return None
    activation, weight = (producer(value, "DequantizeLinear") for value in node.inputs[:2])
    if activation is None or weight is None:
        return None
    if node.op_type == "Gemm":
        return Product(node, activation, weight, node.outputs[0], node.inputs[2] if len(node.inputs) > 2 else None)
    output, bias = _added(node, _width(weight, node))
    return Product(node, activation, weight, output, bias)


def _added(product: ir.Node, width: int) -> tuple[ir.Value, ir.Value | None]:
    """The sum of a product and a bias of one number a column, and that bias; the product alone if there is none."""
    output = product.outputs[0]
    add, rank = consumer(output, "Add"), len(dims(output) or ())
    for own, bias in operands(add):
        numbers = array(bias)
        if add is None or own is not output or numbers is None or add.graph is not product.graph:
            continue
        if numbers.shape[-1:] == (width,) and numbers.size == width and numbers.ndim <= max(rank, 1):
            return add.outputs[0], bias
    return output, None


def _merge(found: Product) -> Decision:
    node = found.node
    reason = _reason_not(found)
    if reason is not None:
        return Decision(node.name or "", node.op_type, "skipped", reason)
    x, s, z = found.activation.inputs[:3]
    inputs = [x, _weight(found), s, _scales(found), z, None, _bias(found)]
    while inputs[-1] is None:
        inputs.pop()
    made, name = ir.node(OP, inputs, domain=CONTRIB), node.name
    replace({node, maker(found.output)}, found.output, [made])
    made.name = name
    return Decision(name or "", node.op_type, "fused", "with its bias" if len(inputs) > 5 else "without a bias")


def _reason_not(found: Product) -> str | None:
    """Why a product stays as it is, if it does."""
    node, scale, zero = found.node, array(found.activation.inputs[1]), _zero_point(found.activation)
    if scale is None or scale.size != 1:
        return "its input has several scales, or computed ones"
    if scale.dtype != np.float32:
        return "it is not computed in float32"
    if zero is None or zero.dtype != np.uint8:
        return "its input is not uint8"  # signed activations are multiplied several times more slowly
    if node.attributes.get_int("transA", 0):
        return "transposed activation"
    if node.op_type == "Gemm" and found.bias is not None and _vector(found) is None:
        return "its bias is computed, or no vector"
    return _misfit(found)


def _misfit(found: Product) -> str | None:
    """Why a weight is none that the operator reads, if it is."""
    held, scale, zero = array(found.weight.inputs[0]), array(found.weight.inputs[1]), _zero_point(found.weight)
    if held is None or scale is None or held.dtype != np.int8 or held.ndim != 2:
        return "its weight is no stored int8 matrix"
    if scale.dtype != np.float32 or (zero is not None and zero.any()):
        return "its weight is not symmetric in float32"
    along = found.weight.attributes.get_int("axis", 1) % 2
    if scale.size > 1 and (scale.ndim > 1 or along != 1 - _transposed(found.node)):
        return "the scales of its weight are not those of output channels"
    return None


def _transposed(node: ir.Node) -> int:
    return node.attributes.get_int("transB", 0)


def _width(weight: ir.Node, node: ir.Node) -> int:
    """The number of columns of the product; 0 where the weight is no stored matrix."""
    held = array(weight.inputs[0])
    return held.shape[1 - _transposed(node)] if held is not None and held.ndim == 2 else 0


def _zero_point(node: ir.Node) -> NDArray[np.generic] | None:
    return array(node.inputs[2]) if len(node.inputs) > 2 else None


def _weight(found: Product) -> ir.Value | None:
    value = found.weight.inputs[0]
    numbers = array(value)
    if not _transposed(found.node) or value is None or numbers is None:
        return value
    return add_constant(found.node, f"{value.name}/transposed", np.ascontiguousarray(numbers.T))


def _scales(found: Product) -> ir.Value | None:
    value, alpha = found.weight.inputs[1], found.node.attributes.get_float("alpha", 1.0)
    numbers = array(value)
    if alpha == 1.0 or value is None or numbers is None:
        return value
    return add_constant(found.node, f"{value.name}/alpha", np.asarray(numbers, np.float32) * np.float32(alpha))


def _bias(found: Product) -> ir.Value | None:
    value, numbers = found.bias, _vector(found)
    if value is None or numbers is None:
        return None
    same = array(value)
    if same is not None and same.shape == numbers.shape and np.array_equal(same, numbers):
        return value
    return add_constant(found.node, f"{value.name}/vector", numbers)


def _vector(found: Product) -> Float | None:
    """The bias as ``[N]``, times ``beta``; ``None`` where it is computed or has another number for each row."""
    numbers, width = array(found.bias), _width(found.weight, found.node)
    if numbers is None or (numbers.size != 1 and (numbers.size, *numbers.shape[-1:]) != (width, width)):
        return None
    beta = np.float32(found.node.attributes.get_float("beta", 1.0))
    return np.ascontiguousarray(np.broadcast_to(np.asarray(numbers, np.float32).reshape(-1) * beta, (width,)))
