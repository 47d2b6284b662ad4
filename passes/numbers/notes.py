"""Notes that calibration leaves on nodes and values, and who has to drop them: whoever changes what they tell of."""

from __future__ import annotations

import onnx_ir as ir

from qexport.passes.numbers.extreme import EXTREME_KEY
from qexport.passes.numbers.range import RANGE_KEY, SQNR_KEY

KERNEL_KEY = "qexport.kernel"
"""The float weight of a node, as it was when the node was calibrated."""
SKETCH_KEY = "qexport.sketch"
"""A reduced histogram of a value, for the report."""
ERROR_KEY = "qexport.output-error"
"""The relative squared error of the model's output with this node alone quantized."""


def forget_layer(node: ir.Node) -> None:
    """Drop what was noted of a node whose weight is another one now."""
    for key in (KERNEL_KEY, SQNR_KEY, ERROR_KEY):
        node.meta.pop(key, None)


def forget_range(value: ir.Value) -> None:
    """Drop what was measured of a value whose numbers are others now."""
    for key in (RANGE_KEY, EXTREME_KEY, SKETCH_KEY):
        value.meta.pop(key, None)
