"""The weight of a layer as ``[K, N]``, its inputs in the order in which engines group them for 2:4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.statistics.gram import Gram
from qexport.passes.match import add_constant, sweep
from qexport.passes.numbers.groups import CODES_KEY
from qexport.passes.placement import Site

Matrix = NDArray[np.float64]
Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Kernel:
    """The constant weight of a MatMul, Gemm or Conv without groups.

    Attributes:
        site: The layer.
    """

    site: Site

    @property
    def inputs(self) -> int:
        """Inputs of an output; input channels of a convolution."""
        return int(self.site.kernel.numpy().shape[1 if self.site.node.op_type == "Conv" else 1 - self.site.axis])

    @property
    def outputs(self) -> int:
        """Outputs, or output channels."""
        return int(self.site.kernel.numpy().shape[self.site.axis])

    def matrix(self) -> Matrix:
        """The weight ``[K, N]``; K of a convolution is its kernel's positions times input channels, in this order."""
        return self.laid(np.asarray(self.site.kernel.numpy(), np.float64))

    def laid(self, numbers: NDArray[Number]) -> NDArray[Number]:
        """Any numbers with the weight's shape, or that broadcast to it, in the order of :meth:`matrix`."""
        wide = np.broadcast_to(numbers, self.site.kernel.numpy().shape)
        return wide.transpose(self._axes).reshape(-1, self.outputs)

    def hessian(self, gram: Gram) -> Matrix:
        """``X^T X`` with rows and columns in the order of :meth:`matrix`."""
        order = self._order
        return gram.hessian if order is None else np.asarray(gram.hessian[np.ix_(order, order)])

    def row(self, numbers: NDArray[Number]) -> NDArray[Number]:
        """A number of each input as a Gram matrix has them, in the order of :meth:`matrix`."""
        order = self._order
        return numbers if order is None else numbers[order]

    def store(self, matrix: Matrix) -> bool:
        """Put ``matrix`` in place of the weight, in its type; whether that changes anything."""
        node, tensor = self.site.node, self.site.kernel
        held = node.inputs[1]
        assert held is not None
        old = tensor.numpy()
        shape = [old.shape[axis] for axis in self._axes]
        kernel = matrix.reshape(shape).transpose(np.argsort(self._axes)).astype(old.dtype)
        if np.array_equal(kernel, old):
            return False
        if held.is_initializer() and len(held.uses()) == 1:
            held.const_value = ir.tensor(np.ascontiguousarray(kernel), tensor.dtype, name=held.name)
            held.meta.pop(CODES_KEY, None)
        else:
            node.replace_input_with(1, add_constant(node, f"{held.name}/own", np.ascontiguousarray(kernel)))
            sweep([held])
        return True

    @property
    def _order(self) -> NDArray[np.intp] | None:
        """Where a row of patches, channels first, has the inputs of :meth:`matrix`; ``None`` for the same order."""
        if self.site.node.op_type != "Conv":
            return None
        shape = self.site.kernel.numpy().shape[1:]
        return np.moveaxis(np.arange(int(np.prod(shape))).reshape(shape), 0, -1).ravel()

    @property
    def _axes(self) -> tuple[int, ...]:
        """Axes of the stored weight in the order of the matrix."""
        rank = len(self.site.kernel.shape)
        return (*range(2, rank), 1, 0) if self.site.node.op_type == "Conv" else (1 - self.site.axis, self.site.axis)
