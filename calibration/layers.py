"""What one layer computes, in float and through its quantizers, on excerpts of its input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.errors import BuildFailed
from qexport.passes.numbers.formats import FORMATS
from qexport.passes.numbers.notes import KERNEL_KEY
from qexport.passes.numbers.range import Range, integers_for
from qexport.passes.numbers.weights import stored_numbers
from qexport.passes.placement import Site
from qexport.passes.target import Target
from qexport.passes.writing.qdq import needs_half
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.session import SessionOptions

QUIET = 0.01  # share of the mean power that is added to every row's, so that rows of next to nothing do not decide
Floats = NDArray[np.float32]
Operator = Callable[[Floats], Floats]


@dataclass(frozen=True, slots=True)
class Layer:
    """One site with excerpts of its input; ``errors`` rates it, ``losses`` is what a search minimises."""

    site: Site
    pieces: Sequence[Floats]
    target: Target

    def errors(self, spans: Sequence[Range]) -> list[float]:
        """Squared output error over squared output for each range, weights quantized as well.

        Nothing where there is no excerpt, or none that the operator takes (a value that a product and a convolution
        read is cut for the convolution).
        """
        power, errors = self._rows(spans)
        return [float(error.sum() / max(power.sum(), 1e-30)) for error in errors]

    def losses(self, spans: Sequence[Range]) -> NDArray[np.float64]:
        """Relative squared output error: mean over rows of each row's own, and of all rows together, ``[2, spans]``.

        A row is one position of a product, one window of a convolution. What reads the output mostly normalizes each
        position by itself, so a small error of a small row is worth a large error of a large one: on sentence encoders
        a few rows are a hundred times the others, and the sum of absolute errors would see nothing else.
        """
        power, errors = self._rows(spans)
        if not errors:
            return np.zeros((2, 0))
        each = [float((error / (power + QUIET * power.mean() + 1e-30)).mean()) for error in errors]
        return np.array([each, [float(error.sum() / max(power.sum(), 1e-30)) for error in errors]])

    def _rows(self, spans: Sequence[Range]) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
        """Squared output of every row, and squared error for each range."""
        try:
            return self._measured(spans) if self.pieces else (np.zeros(0), [])
        except (BuildFailed, ValueError):
            return np.zeros(0), []

    def _measured(self, spans: Sequence[Range]) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
        tensor = self.site.kernel
        kernel = np.asarray(tensor.numpy(), np.float32)
        kind, half = FORMATS[self.target.activation].weight, needs_half(self.target, tensor.dtype)
        value = self.site.node.inputs[self.site.weight or 0]
        numbers, scale = stored_numbers(value, tensor, self.site.axis, half=half, kind=kind)
        others = tuple(i for i in range(kernel.ndim) if i != self.site.axis)
        exact = _operator(self.site, kernel)
        rounded = _operator(self.site, numbers.astype(np.float32) * np.expand_dims(scale, others))
        truth = [exact(piece) for piece in self.pieces]
        power = np.concatenate([_squares(y) for y in truth])

        def error(span: Range) -> NDArray[np.float64]:
            quantizer = integers_for(span, self.target.activation)
            found = (rounded(quantizer.apply(piece)) for piece in self.pieces)
            return np.concatenate([_squares(y - z) for y, z in zip(truth, found, strict=True)])

        return power, [error(span) for span in spans]


def kernel_of(node: ir.Node) -> NDArray[np.generic] | None:
    """The float weight of a node as it was when the node was calibrated, if it was."""
    found = node.meta.get(KERNEL_KEY)
    return found.numpy() if isinstance(found, ir.TensorProtocol) else None


def sqnr(relative_error: float) -> float:
    """Signal over quantization noise in dB, from the squared error over the squared signal."""
    return float(-10 * np.log10(max(relative_error, 1e-20)))


def _squares(y: Floats) -> NDArray[np.float64]:
    """Sum of squares of each row."""
    return np.asarray(np.square(y, dtype=np.float64).reshape(len(y), -1).sum(axis=1))


def _operator(site: Site, weight: Floats) -> Operator:
    """The bare operator with the node's attributes and ``weight``, without bias."""
    if site.node.op_type in ("MatMul", "Gemm"):
        matrix = weight if site.axis == 1 else weight.T
        return lambda x: np.asarray(x @ matrix, np.float32)
    session = _session(site.node, weight)
    return lambda x: np.asarray(session.run({"x": x})["y"], np.float32)


def _session(node: ir.Node, weight: Floats) -> OrtSession:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(weight.shape))
    w.const_value = ir.tensor(weight, name="w")
    bare = ir.Node("", node.op_type, [x, w], list(node.attributes.values()))
    y = bare.outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=[bare], initializers=[w], opset_imports={"": 20}, name="layer")
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return OrtSession(model, SessionOptions(threads=1))
