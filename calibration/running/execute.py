"""Open an in-memory model in onnxruntime without copying its weights, with any inner value as an extra output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from qexport.calibration.running.emulate import SHORT, emulate
from qexport.calibration.running.literal import dequantize_weights
from qexport.calibration.running.whole_rows import read_whole_rows
from qexport.runtime.backends.ort import OrtSession
from qexport.runtime.session import SessionOptions

SHARED_FROM = 4096  # bytes; smaller tensors travel inside the model, where constant folding sees them
_SHAREABLE = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8, ir.DataType.UINT8}


def open_model(model: ir.Model, options: SessionOptions | None = None, taps: Sequence[str] = ()) -> OrtSession:
    """Return a session over ``model``; ``taps`` names inner values to add to its outputs.

    The model is not changed. Weights are handed over by reference: sessions hold what onnxruntime packs for itself, and
    a copy while they open. On a CPU, bfloat16 is emulated in float32, and so is float16 where ``options`` ask for a
    literal run. A decoder with a cache reads whole rows. Its threads do not spin, as others run in turn with it.
    """
    asked = replace(options or SessionOptions(), spin=False)
    work = model.clone()
    read_whole_rows(work)
    if asked.literal:
        dequantize_weights(work, taps)
    if asked.providers[0] == "CPUExecutionProvider":
        emulate(work, SHORT if asked.literal else (ir.DataType.BFLOAT16,))
    proto, weights = take_apart(work, taps)
    return OrtSession(proto.SerializeToString(), asked, weights)


def skeleton(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """Return the graph with its small constants, and its large weights by name, not copied."""
    return take_apart(model.clone())


def take_apart(work: ir.Model, taps: Sequence[str] = ()) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """Do the same in place: afterwards nothing but the returned arrays holds the weights."""
    _add_outputs(work.graph, taps)
    weights: dict[str, NDArray[Any]] = {}
    for name, value in work.graph.initializers.items():
        tensor = value.const_value
        used = value.uses() or value.is_graph_output()
        if tensor is None or tensor.nbytes < SHARED_FROM or tensor.dtype not in _SHAREABLE or not used:
            continue
        weights[name] = np.ascontiguousarray(tensor.numpy())
        value.const_value = ir.ExternalTensor(
            "shared", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(weights[name].shape), name=name
        )
    return ir.to_proto(work), weights


def _add_outputs(graph: ir.Graph, taps: Sequence[str]) -> None:
    present = {value.name for value in graph.outputs}
    wanted = set(taps) - present
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        if value.name in wanted:
            if value.type is None:
                value.type = ir.TensorType(ir.DataType.FLOAT)
            graph.outputs.append(value)
