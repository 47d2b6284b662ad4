"""What one layer computes, in float and through its quantizers, on excerpts of its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.errors import BuildFailed
from qexport.passes.placement import Site
from qexport.passes.range import Range, integers_for
from qexport.passes.target import Target
from qexport.passes.weights import quantize_weight
from qexport.runtime.session import Session, SessionOptions

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Layer:
    """One site with excerpts of its input; ``error(span)`` is what a search minimises."""

    site: Site
    pieces: Sequence[Floats]
    target: Target

    def outputs(self, weight: Floats, span: Range | None = None) -> list[Floats]:
        """Outputs of the bare operator for each piece, its input quantized to ``span`` if given."""
        session = _operator(self.site.node, weight)
        numbers = None if span is None else integers_for(span, self.target.activation)
        pieces = self.pieces if numbers is None else [numbers.apply(piece).astype(np.float32) for piece in self.pieces]
        return [session.run({"x": piece})["y"] for piece in pieces]

    def errors(self, spans: Sequence[Range]) -> list[float]:
        """Squared output error over squared output for each range, weights quantized as well.

        Nothing where there is no excerpt, or none that the operator takes (a value that a product and a convolution
        read is cut for the convolution).
        """
        try:
            return self._errors(spans) if self.pieces else []
        except BuildFailed:
            return []

    def _errors(self, spans: Sequence[Range]) -> list[float]:
        kernel = np.asarray(self.site.kernel.numpy(), np.float32)
        integers, scale = quantize_weight(kernel, self.site.axis, half=self.target.rest == "float16")
        others = tuple(i for i in range(kernel.ndim) if i != self.site.axis)
        stored = integers.astype(np.float32) * np.expand_dims(scale, others)
        truth = self.outputs(kernel)
        power = max(sum(float(np.square(y).sum()) for y in truth), 1e-30)
        return [
            sum(float(np.square(y - z).sum()) for y, z in zip(truth, self.outputs(stored, span), strict=True)) / power
            for span in spans
        ]


def sqnr(relative_error: float) -> float:
    """Signal over quantization noise in dB, from the squared error over the squared signal."""
    return float(-10 * np.log10(max(relative_error, 1e-20)))


def _operator(node: ir.Node, weight: Floats) -> Session:
    """A session that computes ``y = op(x, weight)`` with the node's attributes, without bias."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(weight.shape))
    w.const_value = ir.tensor(weight, name="w")
    bare = ir.Node("", node.op_type, [x, w], list(node.attributes.values()))
    y = bare.outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=[bare], initializers=[w], opset_imports={"": 20}, name="layer")
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return Session(model, SessionOptions(threads=1))
