"""Products with int8 weights whose activations are quantized anew at every call.

Per tensor, in the spelling that onnxruntime merges into one kernel (DynamicQuantizeMatMul, or MatMulIntegerToFloat
where several products share the integers)::

    q, s, z = DynamicQuantizeLinear(x)
    y = Cast(MatMulInteger(q, W8, z)) * (s * w)

Per token, ``s`` being one number a row::

    s = max(-min(x), max(x), tiny) / 127
    q = QuantizeLinear(x, s, 128)
    y = Cast(MatMulInteger(q, W8, 128)) * s * w

``w`` holds one scale a column. The integers of a token lie around 128 because onnxruntime 1.31 multiplies signed
activations ten times more slowly, and the scales are two factors because it takes a product of them for the scale of
a whole tensor, and multiplies every row by the first.

Per token and column: "vector-wise" of Dettmers et al. 2022, section 3.1.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.passes.match import array, replace
from qexport.passes.numbers.range import SMALLEST_FLOAT32
from qexport.passes.numbers.weights import misfit, quantize_weight
from qexport.passes.placement import Site
from qexport.passes.target import Target
from qexport.passes.writing.qdq import Editor, float_type

Granularity = Literal["tensor", "token"]
NEEDS = {"tensor": 11, "token": 21}
"""First opset of DynamicQuantizeLinear, and of QuantizeLinear with one scale for each block of a row."""
FLOAT, UINT8, INT32 = ir.DataType.FLOAT, ir.DataType.UINT8, ir.DataType.INT32
MIDDLE = 128  # what stands for zero in a token's integers
SMALLEST_ROW = 127 * SMALLEST_FLOAT32  # the scale of a smaller row would be denormal, that of a zero row zero


def unfit(site: Site) -> str | None:
    """Why the activations of ``site`` cannot be quantized at every call, if they cannot."""
    if site.node.op_type not in ("MatMul", "Gemm"):
        return "an integer convolution is slower than a float one"  # three to ten times, onnxruntime 1.31
    if float_type(site) != FLOAT:
        return "only float32 is quantized at every call"
    if site.node.attributes.get_float("beta", 1.0) != 1.0 and _bias(site) is not None and array(_bias(site)) is None:
        return "its bias is computed and scaled"
    return misfit(site.kernel.numpy(), site.axis, half=False)


def matrix(site: Site) -> NDArray[np.float32]:
    """The weight as ``[K, N]``, without the factor ``alpha``."""
    weight = np.asarray(site.kernel.numpy(), np.float32)
    return weight if site.axis == 1 else np.ascontiguousarray(weight.T)


class PerCall(Editor):
    """Puts integer products where float ones were; products of one activation share its integers."""

    def __init__(self, graph: ir.Graph, target: Target, granularity: Granularity) -> None:
        super().__init__(graph, target)
        self._granularity = granularity
        self._integers: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
        self._kernels: dict[tuple[ir.Value, int], tuple[ir.Value, NDArray[np.float32]]] = {}

    def replace(self, site: Site) -> None:
        """Put the integer product where a site was that is not :func:`unfit`."""
        x, weight = site.node.inputs[:2]
        assert x is not None
        assert weight is not None
        if (weight, site.axis) not in self._kernels:
            self._kernels[weight, site.axis] = self.store(f"{weight.name}", matrix(site))
        self.put(site, self.product(site, x, *self._kernels[weight, site.axis]))

    def store(self, name: str, weight: NDArray[np.float32]) -> tuple[ir.Value, NDArray[np.float32]]:
        """Hold ``weight``, ``[K, N]``, as integers; returns them and the scales of the columns."""
        integers, scale = quantize_weight(weight, 1)
        return self._initializer(f"{name}/int8", integers), scale

    def product(self, site: Site, x: ir.Value, kernel: ir.Value, scale: NDArray[np.float32]) -> list[ir.Node]:
        """The nodes that multiply ``x`` with an integer kernel, quantizing it first; the last makes the product."""
        name = site.node.name or f"{site.node.outputs[0].name}"
        if x not in self._integers:
            make = self._per_tensor if self._granularity == "tensor" else self._per_token
            self.graph.insert_before(site.node, make(x, int(kernel.shape[0])))  # type: ignore[index,arg-type]  # an initializer has sizes
        q, s, zero = self._integers[x]
        columns = self._initializer(f"{name}/scale", scale * np.float32(site.node.attributes.get_float("alpha", 1.0)))
        total = self.node("MatMulInteger", [q, kernel, zero], name, INT32)
        cast = self.node("Cast", [total.outputs[0]], name, FLOAT, to=FLOAT)
        if self._granularity == "tensor":
            both = self.node("Mul", [s, columns], name, FLOAT)
            return [total, cast, both, self.node("Mul", [cast.outputs[0], both.outputs[0]], name, FLOAT)]
        rows = self.node("Mul", [cast.outputs[0], s], name, FLOAT)
        return [total, cast, rows, self.node("Mul", [rows.outputs[0], columns], name, FLOAT)]

    def put(self, site: Site, nodes: list[ir.Node]) -> None:
        """Replace the node of ``site`` by ``nodes``, its bias added behind."""
        bias = _bias(site)
        if bias is not None:
            beta, numbers = site.node.attributes.get_float("beta", 1.0), array(bias)
            if beta != 1.0 and numbers is not None:
                bias = self._initializer(f"{bias.name}/scaled", np.asarray(numbers, np.float32) * np.float32(beta))
            nodes = [*nodes, self.node("Add", [nodes[-1].outputs[0], bias], f"{site.node.name}", FLOAT)]
        replace([site.node], site.node.outputs[0], nodes)

    def node(
        self, op: str, inputs: list[ir.Value | None], scope: str, dtype: ir.DataType, **attributes: int
    ) -> ir.Node:
        """A node with one output, both named after ``scope``."""
        made = self._node(op, inputs, scope, **attributes)
        self._describe(made, f"{made.name}:0", dtype, None)
        return made

    def _per_tensor(self, x: ir.Value, _inner: int) -> list[ir.Node]:
        name = self._names.fresh(f"{x.name}/DynamicQuantizeLinear")
        node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3, name=name)
        for value, part, dtype in zip(
            node.outputs, ("quantized", "scale", "zero_point"), (UINT8, FLOAT, UINT8), strict=True
        ):
            value.name, value.type = self._names.fresh(f"{x.name}/{part}"), ir.TensorType(dtype)
        self._integers[x] = (node.outputs[0], node.outputs[1], node.outputs[2])
        return [node]

    def _per_token(self, x: ir.Value, inner: int) -> list[ir.Node]:
        name, last = f"{x.name}", self._initializer(f"{x.name}/last_axis", np.array([-1]))
        middle = self._initializer(f"{name}/zero_point", np.array(MIDDLE, np.uint8))
        floor = self._initializer(f"{name}/floor", np.array(SMALLEST_ROW, np.float32))
        steps = self._initializer(f"{name}/steps", np.array(127, np.float32))
        high = self.node("ReduceMax", [x, last], name, FLOAT, keepdims=1)
        low = self.node("ReduceMin", [x, last], name, FLOAT, keepdims=1)
        turned = self.node("Neg", [low.outputs[0]], name, FLOAT)
        reach = self.node("Max", [high.outputs[0], turned.outputs[0], floor], name, FLOAT)
        scale = self.node("Div", [reach.outputs[0], steps], name, FLOAT)
        shape = self.node("Shape", [scale.outputs[0]], name, ir.DataType.INT64)
        zeros = self.node("Expand", [middle, shape.outputs[0]], name, UINT8)
        inputs: list[ir.Value | None] = [x, scale.outputs[0], zeros.outputs[0]]
        integers = self.node("QuantizeLinear", inputs, name, UINT8, axis=-1, block_size=inner)
        self._integers[x] = (integers.outputs[0], scale.outputs[0], middle)
        return [high, low, turned, reach, scale, shape, zeros, integers]


def _bias(site: Site) -> ir.Value | None:
    return site.node.inputs[2] if len(site.node.inputs) > 2 else None
