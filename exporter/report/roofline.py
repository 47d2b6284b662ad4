"""Where each product stands between what the machine computes and what it reads at most."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Literal

import onnx_ir as ir
from pydantic import TypeAdapter, ValidationError

from qexport.exporter.precision.costs import Kernels, flops
from qexport.exporter.report.times import nodes_of
from qexport.exporter.report.values import Dot, Roofline
from qexport.passes.match import constant, producer
from qexport.runtime.accounting.machine import Machine, fingerprint, measure_machine
from qexport.runtime.profile import Kernel
from qexport.safe_io import Cache

KIND = "machines"  # of the cache's entries
THREADS = 1  # profiles are made with one
_MACHINE = TypeAdapter(Machine)


def roofline(plain: ir.Model, result: ir.Model, kernels: Kernels, cache: Cache) -> Roofline:
    """Put a dot for every product and convolution of both profiles under the machine's peaks.

    Peaks are measured once for each machine, where there is a cache.
    """
    machine = peaks(cache)
    dots = [*_dots("float", plain.graph, kernels[0]), *_dots("result", result.graph, kernels[1])]
    told = machine.fingerprint
    return Roofline(
        machine=f"{told.processor}, {told.runtime}",
        threads=machine.threads,
        flops=machine.flops,
        flops_int8=machine.flops_int8,
        memory=machine.memory,
        dots=tuple(dots),
    )


def peaks(cache: Cache) -> Machine:
    """What this machine can do with one thread: as it was measured before, or measured now."""
    known = fingerprint()
    key = hashlib.sha256(repr((asdict(known), THREADS)).encode()).hexdigest()
    entry = cache.entry(KIND, f"{key}.json")
    try:
        found = _MACHINE.validate_json(entry.read() or b"")
    except ValidationError:
        found = _measured()
        entry.write(_MACHINE.dump_json(found))
    return found


@functools.cache
def _measured() -> Machine:
    return measure_machine(THREADS)


def _dots(model: Literal["float", "result"], graph: ir.Graph, kernels: Sequence[Kernel]) -> Iterator[Dot]:
    for kernel, node in zip(kernels, nodes_of(graph, kernels), strict=True):
        if node is None:
            continue
        weights = _weights(node)
        largest = max(weights, key=lambda tensor: tensor.nbytes, default=None)
        work = flops(kernel, () if largest is None else largest.shape.numpy())
        moved = kernel.bytes + sum(tensor.nbytes for tensor in weights)
        if work and moved and kernel.seconds > 0:
            yield Dot(node.name or "", model, work / moved, work / kernel.seconds, 1e3 * kernel.seconds)


def _weights(node: ir.Node) -> list[ir.TensorProtocol]:
    """The constants that a node reads as they are stored, those behind DequantizeLinear included."""
    found = []
    for value in node.inputs:
        reads = producer(value, "DequantizeLinear")
        stored = (constant(v) for v in (reads.inputs if reads is not None else (value,)))
        found += [tensor for tensor in stored if tensor is not None]
    return found
