"""Bytes: of a model as a file, of the engine, of the folder, and of what a build holds in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir

INLINE = 1024
"""Bytes of a tensor from which it is counted and not written to be counted."""

ENGINE_NODE = 20_000
"""Bytes that an engine of TensorRT-RTX has for every node beside the weights of the file."""

REPORT_BYTES = 1_500_000
"""Report, tables, manifest and results of a build of usual size."""

STATISTICS_BYTES = 1_900_000
"""Bytes that one measured value takes in the cache: a histogram, and excerpts for each step that looks at it."""

BASE_MEMORY, COPIES = 300_000_000, 4
"""Bytes of the interpreter with all its libraries, and how often a build holds the weights of the model as it came."""


def file_bytes(model: ir.Model) -> int:
    """Size of the file that a model is saved to, weights in a file of their own included; ``model`` stays as it is."""
    weights = list(_large(model))
    with _described(weights):
        rest: int = ir.to_proto(model).ByteSize()
    return rest + sum(tensor.nbytes for _, tensor in weights)


def _large(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.nbytes >= INLINE:
                yield value, tensor


@contextmanager
def _described(weights: list[tuple[ir.Value, ir.TensorProtocol]]) -> Iterator[None]:
    """Inside the block large weights are names of places in a file, which cost nothing to write."""
    try:
        for value, tensor in weights:
            value.const_value = ir.ExternalTensor(
                "w", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name or ""
            )
        yield
    finally:
        for value, tensor in weights:
            value.const_value = tensor


def engine_bytes(size: int, nodes: int) -> int:
    """About how large an engine is whose model file has ``size`` bytes and so many nodes."""
    return size + ENGINE_NODE * nodes


def cache_bytes(measured: int, models: int) -> int:
    """About what a build keeps for the next one: of so many measured values, and models of so many bytes."""
    return measured * STATISTICS_BYTES + models


def build_memory(weights: int) -> int:
    """About how much memory a build takes at most for a model whose weights take so many bytes."""
    return BASE_MEMORY + COPIES * weights
